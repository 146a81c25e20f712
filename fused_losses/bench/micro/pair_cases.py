"""The cases over pairs: ours, and the losses as their authors or users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import functional
from fused_losses.bench.micro import peers
from fused_losses.bench.micro.cases import Case, against_eager, backward

TEMPERATURE = 0.07
ALPHA, BETA, BASE = 2.0, 50.0, 0.5  # multi-similarity
RELAXED, GAMMA = 0.4, 80.0  # circle
SPREAD = 2.0  # uniformity
PEERS_MOST = 2048  # rows


def eager_info_nce(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss as open_clip writes it: one product, cross entropy of it and of its transpose."""
    logits = scale * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def eager_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As open_clip writes it."""
    logits = scale * x @ y.T + bias
    signs = 2 * torch.eye(len(x), device=x.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(x)


def eager_supervised_contrastive(x: Tensor, labels: Tensor) -> Tensor:
    """As the authors of SupContrast write it."""
    logits = x @ x.T / TEMPERATURE
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(x), device=x.device, dtype=logits.dtype)
    positives = (labels[:, None] == labels).to(logits.dtype) * others
    log_share = logits - (logits.exp() * others).sum(dim=1, keepdim=True).log()
    return -((positives * log_share).sum(dim=1) / positives.sum(dim=1)).mean()


def eager_nt_xent(x: Tensor) -> Tensor:
    """SimCLR's: row i + N/2 is the other view of row i."""
    logits = (x @ x.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    views = torch.arange(len(x), device=x.device).roll(len(x) // 2)
    return F.cross_entropy(logits, views)


def eager_uniformity(x: Tensor) -> Tensor:
    """Over a matrix of products, which is faster than the authors' torch.pdist."""
    norms = x.square().sum(dim=1)
    kernel = (-SPREAD * (norms[:, None] + norms - 2 * x @ x.T)).exp()
    others = 1 - torch.eye(len(x), device=x.device, dtype=kernel.dtype)
    return ((kernel * others).sum() / (len(x) * (len(x) - 1))).log()


def pdist_uniformity(x: Tensor) -> Tensor:
    """As the authors write it."""
    return torch.pdist(x).square().mul(-SPREAD).exp().mean().log()


def eager_multi_similarity(x: Tensor, labels: Tensor) -> Tensor:
    """As pytorch-metric-learning writes it: masked logsumexps, a column of zeros for the 1."""
    similarity = x @ x.T
    same = labels[:, None] == labels
    positives = same & ~torch.eye(len(x), device=x.device, dtype=torch.bool)

    def log_one_more(z: Tensor, kept: Tensor) -> Tensor:
        z = z.masked_fill(~kept, torch.finfo(z.dtype).min)
        return torch.cat([z, z.new_zeros(len(z), 1)], dim=1).logsumexp(dim=1)

    attract = log_one_more(ALPHA * (BASE - similarity), positives) / ALPHA
    return (attract + log_one_more(BETA * (similarity - BASE), ~same) / BETA).mean()


def eager_circle(x: Tensor, labels: Tensor) -> Tensor:
    """As the paper has it: masked logsumexps of weighted similarities."""
    s = x @ x.T
    same = labels[:, None] == labels
    positives = same & ~torch.eye(len(x), device=x.device, dtype=torch.bool)
    pull = (1 + RELAXED - s.detach()).relu() * (s - 1 + RELAXED) * -GAMMA
    push = (s.detach() + RELAXED).relu() * (s - RELAXED) * GAMMA
    near = pull.masked_fill(~positives, -torch.inf).logsumexp(dim=1)
    return F.softplus(near + push.masked_fill(same, -torch.inf).logsumexp(dim=1)).mean()


def eager_attention(query: Tensor, key: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """The softmax of the whole matrix, at 1/sqrt(D); a fixed sum of what comes out."""
    weights = (query @ key.T * query.shape[1] ** -0.5).softmax(dim=1)
    return (weights @ value * slope).sum()


def _unit(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(*shape, device=device), dim=-1).to(dtype).requires_grad_()


def info_nce(
    n: int = 8192,
    d: int = 512,
    device: str = "cpu",
    rivals: str = "all",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """CLIP's symmetric InfoNCE at logit scale 50, which is learnt."""
    torch.manual_seed(seed)
    scale = torch.tensor(50.0, device=device, requires_grad=True)
    rows = (_unit(n, d, device=device, dtype=dtype) for _ in range(2))
    inputs = (*rows, scale)

    def fused(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
        return functional.info_nce(x, y, temperature=1 / scale, symmetric=True, **options)

    title = f"Symmetric InfoNCE, N=M={n:,} D={d}"
    flops = 4 * 2.0 * n * n * d
    return against_eager(title, fused, eager_info_nce, inputs, flops, rivals, kept=True)


def siglip(
    n: int = 8192,
    d: int = 512,
    device: str = "cpu",
    rivals: str = "all",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """SigLIP at its first scale and bias, both learnt."""
    torch.manual_seed(seed)
    numbers = (torch.tensor(v, device=device, requires_grad=True) for v in (10.0, -10.0))
    rows = (_unit(n, d, device=device, dtype=dtype) for _ in range(2))
    inputs = (*rows, *numbers)

    def fused(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return functional.sigmoid_contrastive(x, y, scale=scale, bias=bias, **options)

    title = f"SigLIP, N=M={n:,} D={d}"
    flops = 4 * 2.0 * n * n * d
    case = against_eager(title, fused, eager_siglip, inputs, flops, rivals, kept=True)
    if rivals != "none":
        case.providers |= peers.siglip(*inputs)
    return case


def attention(
    n: int = 8192,
    d: int = 512,
    device: str = "cpu",
    rivals: str = "all",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Similarity attention of n rows over n others, as wide as the rows."""
    torch.manual_seed(seed)
    rows = (torch.randn(n, d, device=device, dtype=dtype) for _ in range(3))
    inputs = (*(t.requires_grad_() for t in rows), torch.randn(n, d, device=device))

    def fused(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, **options: Any) -> Tensor:
        out = functional.similarity_attention(q, k, v, **options)
        assert isinstance(out, Tensor)  # no lse was asked for
        return (out * slope).sum()

    title = f"Similarity attention, N=M={n:,} D={d}"
    # products: 2 forward; backward the scores again, dP, dV, dQ and dK
    case = against_eager(title, fused, eager_attention, inputs, 7 * 2.0 * n * n * d, rivals)
    if rivals != "none":
        q, k, v, slope = inputs
        case.providers |= peers.attention(q, k, v, slope)
    return case


def _one_batch(
    title: str,
    fused: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    labelled: bool,
    n: int,
    d: int,
    device: str,
    rivals: str,
    seed: int,
    kept: bool = True,
) -> Case:
    """x against itself: each product is needed on one side of the diagonal only."""
    torch.manual_seed(seed)
    inputs: tuple[Tensor, ...] = (_unit(n, d, device=device),)
    if labelled:
        # eight rows a class, in no order
        inputs = (*inputs, torch.randperm(n, device=device) // 8)
    title, flops = f"{title}, N={n:,} D={d}", 4.0 * n * n * d
    case = against_eager(title, fused, eager, inputs, flops, rivals, kept)
    case.inputs = inputs
    return case


def _with_peer(case: Case, rivals: str, loss: str, **options: Any) -> Case:
    """Also pytorch-metric-learning's, which holds several matrices: not of large batches."""
    if rivals == "all" and len(case.inputs[0]) <= PEERS_MOST:
        case.providers |= peers.metric_learning(loss, *case.inputs, **options)
    return case


def supervised_contrastive(
    n: int = 8192, d: int = 512, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """SupCon, classes of eight."""

    def fused(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return functional.supervised_contrastive(x, labels, temperature=TEMPERATURE, **options)

    eager = eager_supervised_contrastive
    case = _one_batch("SupCon", fused, eager, True, n, d, device, rivals, seed)
    return _with_peer(case, rivals, "SupConLoss", temperature=TEMPERATURE)


def nt_xent(
    n: int = 8192, d: int = 512, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """SimCLR's NT-Xent, two views."""

    def fused(x: Tensor, **options: Any) -> Tensor:
        return functional.nt_xent(x, temperature=TEMPERATURE, **options)

    return _one_batch("NT-Xent", fused, eager_nt_xent, False, n, d, device, rivals, seed)


def uniformity(
    n: int = 8192, d: int = 512, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """Uniformity, against a matrix of products and against the authors' code."""

    def fused(x: Tensor, **options: Any) -> Tensor:
        return functional.uniformity(x, t=SPREAD, **options)

    case = _one_batch(
        "Uniformity", fused, eager_uniformity, False, n, d, device, rivals, seed, False
    )
    if rivals != "none":
        case.providers["eager, torch.pdist"] = lambda: backward(pdist_uniformity(*case.leaves))
    return case


def multi_similarity(
    n: int = 8192, d: int = 512, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """Multi-similarity without mining, classes of eight."""

    def fused(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return functional.multi_similarity(x, labels, alpha=ALPHA, beta=BETA, base=BASE, **options)

    eager = eager_multi_similarity
    case = _one_batch("Multi-similarity", fused, eager, True, n, d, device, rivals, seed)
    options = dict(alpha=ALPHA, beta=BETA, base=BASE)
    return _with_peer(case, rivals, "MultiSimilarityLoss", **options)


def circle(
    n: int = 8192, d: int = 512, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """Circle loss, classes of eight."""

    def fused(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return functional.circle(x, labels, m=RELAXED, gamma=GAMMA, **options)

    case = _one_batch("Circle", fused, eager_circle, True, n, d, device, rivals, seed)
    # a product in bf16 is off by 2^-8, of which gamma makes a third of an exponent
    low = ("autocast", "bf16", "mixed", "knob")
    case.tolerance = {name: 0.5 for name in case.providers if any(w in name for w in low)}
    # its gradients are those of rows that it normalises
    case.unlike = ("pytorch-metric-learning",)
    options = dict(m=RELAXED, gamma=GAMMA, distance="CosineSimilarity")
    return _with_peer(case, rivals, "CircleLoss", **options)

"""The cases of encoders of texts: ranking by other documents, guided, and late interaction."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import functional
from fused_losses.bench.measure import Provider
from fused_losses.bench.micro import text_peers
from fused_losses.bench.micro.cases import Case, against_eager, apart, knobbed, our_ways
from fused_losses.primitives.maxsim.op import maxsim as fused_maxsim

SCALE = 20.0  # multiple negatives
TEMPERATURE = 0.05  # guided
NOISE = 0.7  # of the other side's rows


def eager_maxsim(queries: Tensor, documents: Tensor) -> Tensor:
    """ColBERT's scores, and the cross entropy that trains them."""
    scores = eager_scores(queries, documents)
    return F.cross_entropy(scores, torch.arange(len(queries), device=queries.device))


def eager_scores(queries: Tensor, documents: Tensor) -> Tensor:
    """All products of tokens, as PyLate and ColBERT write it."""
    return torch.einsum("qid,bjd->qibj", queries, documents).max(dim=3).values.sum(dim=1)


def eager_multiple_negatives(x: Tensor, y: Tensor) -> Tensor:
    """As sentence-transformers writes it: scaled cosines, a cross entropy."""
    scores = SCALE * F.normalize(x) @ F.normalize(y).T
    return F.cross_entropy(scores, torch.arange(len(x), device=x.device))


def eager_guided(x: Tensor, y: Tensor, x_guide: Tensor, y_guide: Tensor) -> Tensor:
    """GISTEmbed: three matrices of cosines, and three of the guide's that rule pairs out."""
    x, y, g, h = (F.normalize(rows) for rows in (x, y, x_guide, y_guide))
    own = (g * h).sum(dim=1, keepdim=True)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    near = (
        (x @ y.T).masked_fill((g @ h.T > own) & ~itself, -torch.inf),
        (x @ x.T).masked_fill((g @ g.T > own) | itself, -torch.inf),
        (y @ y.T).masked_fill((h @ h.T > own) | itself, -torch.inf),
    )
    scores = torch.cat(near, dim=1) / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(x), device=x.device))


def _sides(n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    """Rows, and others near them."""
    x = torch.randn(n, d, device=device)
    return x, x + NOISE * torch.randn(n, d, device=device)


def multiple_negatives(
    n: int = 8192, d: int = 512, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """MultipleNegativesRankingLoss of n pairs."""
    torch.manual_seed(seed)
    x, y = (rows.requires_grad_() for rows in _sides(n, d, device))

    def fused(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return functional.multiple_negatives(x, y, scale=SCALE, **options)

    title = f"Multiple negatives ranking, N={n:,} D={d}"
    flops = 4 * 2.0 * n * n * d
    case = against_eager(title, fused, eager_multiple_negatives, (x, y), flops, rivals, kept=True)
    if rivals == "all":
        case.providers |= text_peers.multiple_negatives(x, y, SCALE)
    return case


def guided(
    n: int = 8192, d: int = 512, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """GISTEmbed of n pairs, the guide as wide as the rows."""
    torch.manual_seed(seed)
    x, y = (rows.requires_grad_() for rows in _sides(n, d, device))
    inputs = (x, y, *_sides(n, d, device))

    def fused(x: Tensor, y: Tensor, g: Tensor, h: Tensor, **options: Any) -> Tensor:
        return functional.guided_contrastive(x, y, g, h, temperature=TEMPERATURE, **options)

    # of three matrices, two of which are symmetric, the rows' with a gradient and the guide's
    flops = 2.0 * n * n * d * (4 + 1 + 2 * (2 + 0.5))
    title = f"Guided contrastive (GISTEmbed), N={n:,} D={d}"
    case = against_eager(title, fused, eager_guided, inputs, flops, rivals)
    # rounded products let the guide rule out other pairs
    low = ("autocast", "bf16", "mixed", "knob")
    case.tolerance = {name: 0.5 for name in case.providers if any(w in name for w in low)}
    if rivals == "all":
        case.providers |= text_peers.guided(*inputs, TEMPERATURE)
    return case


def _tokens(*shape: int, device: str) -> Tensor:
    return F.normalize(torch.randn(*shape, device=device), dim=-1)


def maxsim(
    q: int = 256,
    lq: int = 32,
    b: int = 1024,
    ld: int = 128,
    d: int = 128,
    device: str = "cpu",
    rivals: str = "all",
    seed: int = 0,
) -> Case:
    """ColBERT's MaxSim under a cross entropy."""
    torch.manual_seed(seed)
    made = (_tokens(q, lq, d, device=device), _tokens(b, ld, d, device=device))
    inputs = tuple(tokens.requires_grad_() for tokens in made)

    def fused(queries: Tensor, documents: Tensor, **options: Any) -> Tensor:
        scores = fused_maxsim(queries, documents, **options)
        return F.cross_entropy(scores, torch.arange(len(queries), device=queries.device))

    # the gradient follows the chosen tokens: two sums of rows, no matrix
    flops = 2.0 * q * lq * b * ld * d + 2 * 2.0 * q * lq * b * d
    title = f"MaxSim, {q} x {lq} query tokens, {b:,} x {ld} document tokens, D={d}"
    case = against_eager(title, fused, eager_maxsim, inputs, flops, rivals)
    # near ties: rounded products choose other tokens, and so do the gradients
    case.tolerance = {name: 0.5 for name in case.providers if "bf16" in name or "knob" in name}
    return case


def maxsim_scores(
    q: int = 256,
    lq: int = 32,
    b: int = 1024,
    ld: int = 128,
    d: int = 128,
    device: str = "cpu",
    rivals: str = "all",
    seed: int = 0,
) -> Case:
    """Scores of queries and documents that are searched: forward alone."""
    torch.manual_seed(seed)
    queries, documents = _tokens(q, lq, d, device=device), _tokens(b, ld, d, device=device)
    providers: dict[str, Provider] = {
        name: lambda o=options: fused_maxsim(queries, documents, **o)
        for name, options in our_ways(queries)
        if "mixed" not in name  # of gradients
    }
    ours = list(providers)
    if rivals != "none":
        providers["eager"] = lambda: eager_scores(queries, documents)
        if rivals == "all":
            compiled = torch.compile(apart(eager_scores))
            providers["torch.compile"] = lambda: compiled(queries, documents)
        if device == "cpu":
            given = (eager_scores, queries, documents)
            providers["eager, oneDNN knob"] = lambda: knobbed(*given)
        providers |= text_peers.maxsim_scores(queries, documents)
    sizes = f"{q} x {lq} query tokens, {b:,} x {ld} document tokens, D={d}"
    flops = 2.0 * q * lq * b * ld * d
    traffic = 4.0 * (queries.numel() + documents.numel() + q * b)
    case = Case(f"MaxSim's scores, {sizes}, forward", providers, ours, [], flops, traffic)
    case.result_mib = 4 * q * b / 2**20
    if rivals != "none":
        case.truth = lambda: [eager_scores(queries.double(), documents.double())]
    return case

"""The cases over a labelled batch (mining, losses of distances) and over neighbours in a bank."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import backends, functional, principal_rows
from fused_losses.bench.measure import Provider, free_bytes
from fused_losses.bench.micro import peers
from fused_losses.bench.micro.cases import Case, against_eager, apart, backward, knobbed
from fused_losses.bench.micro.peers import peer

BLOCK_BYTES = 64 << 20  # of hinges, under a mask of triplets
HINGE = 0.2
PER_CLASS = 4
PEERS_MOST = 2048  # rows
DECAY = -0.7  # of the spread along axis i, as of real embeddings
SUMMED = 1e-5  # relative L2 of sums in float32 from float64's


def _labels(n: int, device: str) -> Tensor:
    """Classes of four rows, in no order."""
    return torch.randperm(n, device=device) // PER_CLASS


def _classes(n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    """Unit rows around their class's centre, so that losses have something to say."""
    labels = _labels(n, device)
    centres = torch.randn(n // PER_CLASS + 1, d, device=device)
    return F.normalize(centres[labels] + torch.randn(n, d, device=device)), labels


def _bf16_screen(device: str) -> bool:
    where = torch.device(device)
    return device == "cpu" and not backends.reasons_against("cpu", where, torch.float32, "bf16")


# ---- batch-hard mining --------------------------------------------------------------------------


def masked_batch_hard(x: Tensor, labels: Tensor) -> Tensor:
    """The farthest positive and the nearest negative of every row, by masks. [2, N]"""
    distance = torch.cdist(x, x)
    same = labels[:, None] == labels
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    far = distance.masked_fill(~same | itself, -torch.inf).argmax(dim=1)
    near = distance.masked_fill(same, torch.inf).argmin(dim=1)
    return torch.stack([far, near])


def batch_hard_mining(
    n: int = 8192, d: int = 128, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """Classes of four. Steps return indices [2, N], which must be ours but for exact ties."""
    torch.manual_seed(seed)
    x, labels = _classes(n, d, device)

    def ours() -> Tensor:
        return torch.stack(functional.mine_triplets(x, labels)[1:3])

    providers: dict[str, Provider] = {"fused": ours}
    if rivals != "none":
        kinds = {"eager": lambda f: f}
        kinds |= {"torch.compile": torch.compile} if rivals == "all" else {}
        for name, made in kinds.items():
            f, g = made(apart(masked_batch_hard)), made(apart(masked_batch_hard))
            providers[name] = lambda f=f: f(x, labels)
            if device == "cpu":
                providers[f"{name}, oneDNN knob"] = lambda g=g: knobbed(g, x, labels)
        miners = peer("pytorch_metric_learning.miners")
        if miners is not None:
            # rows have norm 1: its normalisation would be work for nothing
            distances = importlib.import_module("pytorch_metric_learning.distances")
            miner = miners.BatchHardMiner(distance=distances.LpDistance(normalize_embeddings=False))
            providers["pytorch-metric-learning"] = lambda: torch.stack(miner(x, labels)[1:])
    wide = x.double()

    def differ(got: list[Tensor], want: list[Tensor]) -> float:
        """The share of choices at another distance than the judge's, in float64."""
        if len(got[0]) != len(want[0]):
            return 1.0
        rows = wide.repeat(2, 1)
        theirs, ours = ((rows - wide[t[0].long()]).norm(dim=1) for t in (got, want))
        return float(((theirs - ours).abs() > 1e-5 * ours).double().mean())

    # products in float32 lose digits of a distance: a rival may take the next row
    loose = {name: 0.05 if "knob" in name else 2e-3 for name in providers if name != "fused"}
    title = f"Batch-hard mining, N={n:,} D={d}, {PER_CLASS} a class, float32"
    floor = 4.0 * n * d + 16.0 * n
    case = Case(title, providers, ["fused"], [], float(n) * n * d, floor, tolerance=loose)
    case.differ = differ
    case.truth = None if rivals == "none" else lambda: [masked_batch_hard(wide, labels)]
    return case


# ---- neighbours ---------------------------------------------------------------------------------


def topk(
    n: int = 1024,
    m: int = 200_000,
    d: int = 256,
    k: int = 32,
    device: str = "cpu",
    rivals: str = "all",
    seed: int = 0,
) -> Case:
    """The k largest products with a bank. Steps return scores, which must be equal, best first."""
    torch.manual_seed(seed)
    x, y = (torch.randn(rows, d, device=device) for rows in (n, m))

    def ours(screen: str, **options: Any) -> Provider:
        return lambda: functional.pairwise_topk(x, y, k, "dot", screen=screen, **options)[0]

    providers: dict[str, Provider] = {"fused, fp32 screen": ours("fp32")}
    for backend in ("triton", "cuda") if device != "cpu" else ():
        if not backends.reasons_against(backend, x.device, x.dtype, "fp32"):
            providers[f"fused, fp32 screen, {backend}"] = ours("fp32", backend=backend)
    if _bf16_screen(device):
        providers["fused, bf16 screen"] = ours("bf16")
    title = f"Top-{k} of {n:,} queries by <x, y> over {m:,} x {d}, float32"
    return _against_faiss(title, providers, x, y, k, 2.0 * n * m * d, rivals)


def topk_principal(
    n: int = 1024,
    m: int = 200_000,
    d: int = 256,
    k: int = 32,
    device: str = "cpu",
    rivals: str = "all",
    seed: int = 0,
) -> Case:
    """As `topk`, of rows whose spread decays from axis to axis; the bank's axes are found before.

    faiss' Panorama, which reads coordinates in their order, has its bank turned to its axes, too;
    queries are turned within a step by both.
    """
    torch.manual_seed(seed)
    spread = torch.arange(1, d + 1, device=device) ** DECAY
    turn = torch.linalg.qr(torch.randn(d, d, device=device)).Q
    x, y = ((torch.randn(rows, d, device=device) * spread) @ turn for rows in (n, m))
    heads = principal_rows(y)
    screens = {"fused, principal axes": heads, "fused, fp32 screen": "fp32"}
    screens |= {"fused, bf16 screen": "bf16"} if _bf16_screen(device) else {}

    def ours(screen: Any) -> Provider:
        return lambda: functional.pairwise_topk(x, y, k, "dot", screen=screen)[0]

    providers = {name: ours(screen) for name, screen in screens.items()}
    width = heads.first.shape[1]
    title = f"Top-{k} of {n:,} queries by <x, y> over {m:,} x {d} of spread i^{DECAY}, float32"
    axes = torch.linalg.eigh(y.T.double() @ y.double()).eigenvectors.flip(1).to(y.dtype)
    case = _against_faiss(title, providers, x, y, k, 2.0 * n * m * width, rivals, axes)
    case.flops_of = f"products with the {width} coordinates that every pair needs"
    return case


def _against_faiss(
    title: str,
    providers: dict[str, Provider],
    x: Tensor,
    y: Tensor,
    k: int,
    flops: float,
    rivals: str,
    axes: Tensor | None = None,  # [D, D], those of Panorama's levels
) -> Case:
    """Our ways, PyTorch's and faiss'."""
    names = list(providers)
    on_cpu = x.device.type == "cpu"
    if rivals != "none":
        providers["matmul + topk"] = lambda: (x @ y.T).topk(k).values
        if on_cpu:
            providers["matmul + topk, oneDNN knob"] = lambda: knobbed(
                lambda a, b: (a @ b.T).topk(k).values, x, y
            )
        faiss = peer("faiss") if on_cpu else None
        if not on_cpu:
            providers |= peers.neighbours(x, y, k)
        if faiss is not None:
            providers |= peers.flat(faiss, x, y, k, axes)
    # screens change nothing: all are sums of float32
    tolerance = {name: SUMMED for name in providers if "knob" not in name}
    floor = 4.0 * (len(x) + len(y)) * x.shape[1] + 12.0 * len(x) * k
    case = Case(title, providers, names, [], flops, floor, tolerance=tolerance)
    if rivals != "none":
        case.truth = lambda: [(x.double() @ y.double().T).topk(k).values]
    return case


# ---- losses -------------------------------------------------------------------------------------


def eager_contrastive(x: Tensor, labels: Tensor) -> Tensor:
    """As pytorch-metric-learning: each side's mean over its terms that are not 0."""
    distance = torch.cdist(x, x)
    same = labels[:, None] == labels
    positives = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    attract = torch.where(positives, distance, 0)
    repel = torch.where(same, 0, F.relu(1.3 - distance))
    near, far = (part.sum() / (part > 0).sum().clamp_min(1) for part in (attract, repel))
    return near + far


def eager_batch_hard(x: Tensor, labels: Tensor) -> Tensor:
    """Hermans et al.'s loss from the matrix, soft margin."""
    distance = torch.cdist(x, x)
    same = labels[:, None] == labels
    far = distance.masked_fill(~same, -torch.inf).amax(dim=1)
    near = distance.masked_fill(same, torch.inf).amin(dim=1)
    return F.softplus(far - near).mean()


def gathered_triplets(x: Tensor, labels: Tensor) -> Tensor:
    """Every positive of a row, gathered, against all its negatives: [N, 3, N]."""
    distance = torch.cdist(x, x)
    same = labels[:, None] == labels
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    columns = (same & ~itself).float().topk(PER_CLASS - 1, dim=1).indices
    near = distance.gather(1, columns)
    hinge = F.relu(near[:, :, None] - distance[:, None] + HINGE)
    hinge = torch.where(same[:, None], 0, hinge)
    return hinge.sum() / (hinge > 0).sum().clamp_min(1)


def masked_triplets(x: Tensor, labels: Tensor) -> Tensor:
    """The N^3 triplets under a mask, a slice of anchors at a time; its own backward. The loss."""
    distance = torch.cdist(x, x)
    leaf = distance.detach().requires_grad_()
    same = labels[:, None] == labels
    positives = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    step = max(1, BLOCK_BYTES // (4 * len(x) ** 2))
    total, count = x.new_zeros(()), labels.new_zeros(())
    for i in range(0, len(x), step):
        rows = slice(i, i + step)
        mask = positives[rows, :, None] & ~same[rows, None]
        hinge = F.relu(leaf[rows, :, None] - leaf[rows, None] + HINGE)
        hinge = torch.where(mask, hinge, 0)
        part = hinge.sum()
        part.backward()
        total, count = total + part.detach(), count + (hinge > 0).sum()
    assert leaf.grad is not None
    distance.backward(leaf.grad / count.clamp_min(1))
    return total / count.clamp_min(1)


def all_triplets(
    n: int = 4096, d: int = 128, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """The hinge over all triplets, four rows a class."""
    torch.manual_seed(seed)
    rows, labels = _classes(n, d, device)
    x = rows.requires_grad_()

    def fused(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return functional.all_triplets(x, labels, margin=HINGE, **options)

    # products of half the pairs, and those of a gradient
    flops = 3.0 * n * n * d
    title = f"All triplets, N={n:,} D={d}, {PER_CLASS} a class"
    case = against_eager(title, fused, gathered_triplets, (x, labels), flops, rivals)
    if rivals == "none":
        return case
    case.providers["eager, N^3 mask in slices"] = lambda: masked_triplets(x, labels)
    case.turns["eager, N^3 mask in slices"] = 0
    losses = peer("pytorch_metric_learning.losses")
    # its mask of triplets in bytes, and the indices of the triplets that there are
    needed = 2 * n**3 + 12 * 8 * n * (PER_CLASS - 1) * n
    if losses is not None and needed > free_bytes():
        print(f"without TripletMarginLoss: it needs {needed / 2**30:,.0f} GiB, "
              f"{free_bytes() / 2**30:,.0f} GiB are free", file=sys.stderr)  # fmt: skip
    elif losses is not None:
        distance = importlib.import_module("pytorch_metric_learning.distances").LpDistance
        loss = losses.TripletMarginLoss(margin=HINGE, distance=distance(normalize_embeddings=False))
        case.providers["pytorch-metric-learning"] = lambda: backward(loss(x, labels))
        case.turns["pytorch-metric-learning"] = 1
    _loosen(case)
    return case


def _loosen(case: Case) -> None:
    """Products of few bits move distances across hinges, and choose other rows."""
    low = ("bf16", "mixed", "knob")
    case.tolerance = {name: 0.5 for name in case.providers if any(w in name for w in low)}


def _on_classes(
    title: str,
    fused: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    flops: float,
    n: int,
    d: int,
    device: str,
    rivals: str,
    seed: int,
) -> Case:
    torch.manual_seed(seed)
    x, labels = _classes(n, d, device)
    inputs = (x.requires_grad_(), labels)
    title = f"{title}, N={n:,} D={d}, {PER_CLASS} a class"
    case = against_eager(title, fused, eager, inputs, flops, rivals)
    case.inputs = inputs
    _loosen(case)
    return case


def contrastive(
    n: int = 8192, d: int = 128, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """Contrastive loss at a margin that many negatives are within."""

    def fused(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return functional.contrastive(x, labels, negative_margin=1.3, **options)

    flops = 4.0 * n * n * d
    given = (n, d, device, rivals, seed)
    case = _on_classes("Contrastive loss", fused, eager_contrastive, flops, *given)
    if rivals == "all" and n <= PEERS_MOST:
        options = dict(distance="LpDistance", neg_margin=1.3)
        case.providers |= peers.metric_learning("ContrastiveLoss", *case.inputs, **options)
    return case


def batch_hard_triplet(
    n: int = 8192, d: int = 128, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """The soft-margin batch-hard loss."""

    def fused(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return functional.batch_hard_triplet(x, labels, **options)

    # the gradient follows the chosen rows: no second matrix
    flops = float(n) * n * d + 12.0 * n * d
    given = (n, d, device, rivals, seed)
    case = _on_classes("Batch-hard triplet loss", fused, eager_batch_hard, flops, *given)
    if rivals == "all" and n <= PEERS_MOST:
        options = dict(distance="LpDistance", miner="BatchHardMiner", margin=0, smooth_loss=True)
        case.providers |= peers.metric_learning("TripletMarginLoss", *case.inputs, **options)
    return case

"""The cases over matrices of distances: ours, and what users write or install."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_losses import functional
from fused_losses.bench.measure import Provider
from fused_losses.bench.micro.cases import Case, apart, knobbed, our_ways
from fused_losses.bench.micro.peers import peer

BLOCK_BYTES = 64 << 20  # of differences, in an eager broadcast
# elementary operations a coordinate of a pair, a logarithm counted as ten
OPERATIONS = {
    "cityblock": 2,
    "chebyshev": 2,
    "minkowski": 4,
    "canberra": 5,
    "braycurtis": 4,
    "jensenshannon": 26,
}
P = 3.0  # minkowski's
OF_CDIST = {"cityblock": 1.0, "chebyshev": float("inf"), "minkowski": P}


def eager_distance(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Every difference at once, as the formula reads."""
    x, y = x[:, None], y[None]
    if metric == "jensenshannon":
        x, y = (t / t.sum(dim=-1, keepdim=True) for t in (x, y))
        middle = (x + y) / 2
        terms = torch.xlogy(x, x / middle) + torch.xlogy(y, y / middle)
        return (terms.sum(dim=-1) / 2).clamp_min(0).sqrt()
    apart = (x - y).abs()
    if metric == "cityblock":
        return apart.sum(dim=-1)
    if metric == "chebyshev":
        return apart.amax(dim=-1)
    if metric == "minkowski":
        return apart.pow(P).sum(dim=-1).pow(1 / P)
    if metric == "canberra":
        return (apart / (x.abs() + y.abs())).sum(dim=-1)
    return apart.sum(dim=-1) / (x + y).abs().sum(dim=-1)


def in_blocks(f: Callable[..., Tensor], x: Tensor, y: Tensor, metric: str) -> Tensor:
    """f a run of rows at a time; with a gradient each run is computed again in the backward."""
    step = max(1, BLOCK_BYTES // (4 * y.numel()))
    if not x.requires_grad:
        return torch.cat([f(rows, y, metric) for rows in x.split(step)])
    return torch.cat(
        [checkpoint(f, rows, y, metric, use_reentrant=False) for rows in x.split(step)]
    )


def distances(
    metric: str,
    n: int = 4096,
    d: int = 128,
    device: str = "cpu",
    rivals: str = "all",
    seed: int = 0,
    gradient: bool = False,
) -> Case:
    """One matrix of n x n, alone or with the gradient of a random sum of its elements."""
    torch.manual_seed(seed)
    x, y = (torch.randn(n, d, device=device) for _ in range(2))
    if metric == "jensenshannon":
        x, y = x.abs(), y.abs()
    slope = torch.randn(n, n, device=device) if gradient else None
    leaves = [x.requires_grad_(), y.requires_grad_()] if gradient else []

    def step(f: Callable[..., Tensor]) -> Provider:
        def run() -> Tensor:
            out = f(x, y)
            if slope is not None:
                out.backward(slope)
            return out.detach()

        return run

    given: dict[str, Any] = {"p": P} if metric == "minkowski" else {}
    providers = {"fused": step(lambda a, b: functional.pairwise_distance(a, b, metric, **given))}
    turns: dict[str, int] = {}
    if rivals != "none":
        kinds = {"eager, in blocks": eager_distance}
        if rivals == "all":
            kinds["torch.compile, in blocks"] = torch.compile(apart(eager_distance))
        for name, f in kinds.items():
            providers[name] = step(lambda a, b, f=f: in_blocks(f, a, b, metric))
            turns[name] = 1
        if metric in OF_CDIST:
            providers["torch.cdist"] = step(lambda a, b: torch.cdist(a, b, p=OF_CDIST[metric]))
        turns |= _installed(providers, metric, x, y, step, gradient)
    elements = float(n) * n
    passes = 1 if not gradient else 4  # values, and for the gradient of each side once more
    work = passes * OPERATIONS[metric] * elements * d
    traffic = 4 * elements * (2 if gradient else 1) + 8.0 * n * d * (2 if gradient else 1)
    what = "forward + backward" if gradient else "forward"
    name = f"{metric}, p={P:g}" if given else metric
    case = Case(
        f"Matrix of {name}, N=M={n:,} D={d}, float32, {what}",
        providers,
        ["fused"],
        leaves,
        work,
        traffic,
        flops_of="elementary operations",
    )
    case.turns, case.result_mib = turns, 4 * elements / 2**20
    return case


def _installed(
    providers: dict[str, Provider],
    metric: str,
    x: Tensor,
    y: Tensor,
    step: Callable[..., Provider],
    gradient: bool,
) -> dict[str, int]:
    """Adds scipy (no gradient) and torchpairwise; the turns they get, being slow."""
    given: dict[str, Any] = {"p": P} if metric == "minkowski" else {}
    turns = {}
    scipy = None if gradient or x.device.type != "cpu" else peer("scipy.spatial.distance")
    if scipy is not None:
        providers["scipy cdist"] = lambda: torch.from_numpy(
            scipy.cdist(x.numpy(), y.numpy(), metric, **given)
        )
        turns["scipy cdist"] = 1
    torchpairwise = peer("torchpairwise")
    if torchpairwise is not None:
        providers["torchpairwise"] = step(
            lambda a, b: torchpairwise.cdist(a, b, metric=metric, **given)
        )
        turns["torchpairwise"] = 1
    return turns


def euclidean(
    n: int = 4096, d: int = 128, device: str = "cpu", rivals: str = "all", seed: int = 0
) -> Case:
    """The Euclidean matrix of two views of the same samples, far from the origin; with its errors.

    Row j of y is row j of x and a little noise: that is where products cancel.
    """
    torch.manual_seed(seed)
    x = torch.randn(n, d, device=device) + 2
    y = x + 1e-2 * torch.randn(n, d, device=device)
    slope = torch.randn(n, n, device=device)
    leaves = [x.requires_grad_(), y.requires_grad_()]

    def step(f: Callable[..., Tensor]) -> Provider:
        def run() -> Tensor:
            out = f(x, y)
            out.backward(slope)
            return out.detach()

        return run

    providers: dict[str, Provider] = {}
    for name, options in our_ways(x):
        providers[name] = step(lambda a, b, o=options: functional.pairwise_distance(a, b, **o))
    names = list(providers)
    if rivals != "none":
        providers["torch.cdist"] = step(torch.cdist)
        direct = "donot_use_mm_for_euclid_dist"
        providers["torch.cdist, no products"] = step(
            lambda a, b: torch.cdist(a, b, compute_mode=direct)
        )
        plain = step(torch.cdist)
        providers["torch.cdist, oneDNN knob"] = lambda: knobbed(plain)
        if rivals == "all":
            providers["torch.compile of cdist"] = step(
                torch.compile(lambda a, b: torch.cdist(a, b))
            )

    def truth() -> list[Tensor]:
        a, b = (t.detach().double().requires_grad_() for t in (x, y))
        out = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        out.backward(slope.double())
        assert a.grad is not None and b.grad is not None
        return [out.detach(), a.grad, b.grad]

    # the distance's gradient follows the difference's direction, which rounding turns
    case = Case(
        f"Matrix of euclidean, N=M={n:,} D={d}, float32, forward + backward",
        providers,
        names,
        leaves,
        3 * 2.0 * n * n * d,
        8.0 * n * n + 16.0 * n * d,
        tolerance={name: 0.5 for name in providers if name != "fused fp32"},
    )
    case.truth, case.tells_errors = truth, True
    case.result_mib = 4 * n * n / 2**20
    return case


def _of(metric: str, gradient: bool) -> Callable[..., Case]:
    return lambda *sizes, **options: distances(metric, *sizes, gradient=gradient, **options)


MATRICES: dict[str, Callable[..., Case]] = {
    **{metric: _of(metric, False) for metric in OPERATIONS},
    **{f"{metric}_gradient": _of(metric, True) for metric in OPERATIONS},
    "euclidean_gradient": euclidean,
}

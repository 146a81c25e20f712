"""Every metric and similarity of pairs, and the options of the softmax losses, for the draws.

Calls and literal formulas, which follow SciPy and the papers and use nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from class_pair_draws import cosine, matrices
from pair_cases import TOWERS, Case
from pair_rows import Inputs, distance, proxies, square_distance, unit
from torch import Tensor

import fused_losses.functional as fl

Rows = Callable[[Tensor], Tensor]


def weighted(n: int, m: int, d: int) -> Inputs:
    t = matrices(n, m, d)
    t.weight = torch.rand(d) + 0.25
    return t


def spread(n: int, m: int, d: int) -> Inputs:
    """A variance a coordinate of each row of y."""
    t = matrices(n, m, d)
    t.variance = torch.rand(m, d) + 0.25
    return t


def triples(n: int, m: int, d: int) -> Inputs:
    t = matrices(n, m, d)
    return Inputs(x=t.x, y=t.y, z=t.x + torch.randn(n, d) / d**0.5, picked=torch.randint(m, (3, n)))


def safe(top: Tensor, below: Tensor, otherwise: float) -> Tensor:
    """A quotient; otherwise where below is 0."""
    return torch.where(below == 0, otherwise, top / torch.where(below == 0, 1, below))


def root(square: Tensor) -> Tensor:
    alive = ~(square <= 0)  # a NaN stays one
    return torch.where(alive, torch.where(alive, square, 1).sqrt(), 0)


def differences(t: Inputs) -> Tensor:
    return t.x[:, None] - t.y


def minkowski(t: Inputs, p: float, w: Tensor | float = 1.0) -> Tensor:
    """About the largest difference: a power of a small one is 0."""
    each = differences(t).abs()
    top = each.detach().amax(2, keepdim=True)
    top = torch.where((top == 0) | top.isinf(), 1, top)
    total = (w * torch.where(each == 0, 0, (each / top).clamp_min(1e-300).pow(p))).sum(2)
    alive = total > 0
    return torch.where(alive, torch.where(alive, total, 1).pow(1 / p), 0) * top[..., 0]


def moved(x: Tensor) -> Tensor:
    """By its own mean; a constant row is 0, with a slope."""
    found = x - x.mean(1, keepdim=True)
    return torch.where((x == x[:, :1]).all(1, keepdim=True), found - found.detach(), found)


def correlation(t: Inputs) -> Tensor:
    return cosine(Inputs(x=moved(t.x), y=moved(t.y)))


def angular(t: Inputs) -> Tensor:
    """The angle between both diagonals; a row of zeros is orthogonal to all but its like."""
    u, v = unit(t.x), unit(t.y)
    half = torch.atan2(distance(u, v), distance(u, -v))
    none = [(r == 0).all(1) for r in (t.x, t.y)]
    alone = torch.where(none[0][:, None] == none[1], 0.0, 0.5)
    dead = (none[0][:, None] | none[1]) & ~half.isnan()
    # one row of zeros: both chords pull along the other row, and what is left is rounding
    left = torch.where((none[0][:, None] ^ none[1]) & dead, half, 0)
    return torch.where(dead, alone + left - left.detach(), 2 / math.pi * torch.where(dead, 1, half))


def weighted_correlation(t: Inputs) -> Tensor:
    share = t.weight / t.weight.sum()
    x, y = (
        torch.where((r == r[:, :1]).all(1, keepdim=True), 0, r - (share * r).sum(1, keepdim=True))
        for r in (t.x, t.y)
    )
    return cosine(Inputs(x=x * t.weight.sqrt(), y=y * t.weight.sqrt()))


def canberra(t: Inputs, w: Tensor | float = 1.0) -> Tensor:
    return (w * safe(differences(t).abs(), t.x.abs()[:, None] + t.y.abs(), 0.0)).sum(2)


def braycurtis(t: Inputs) -> Tensor:
    apart, below = differences(t).abs().sum(2), (t.x[:, None] + t.y).abs().sum(2)
    return torch.where((below == 0) & (apart > 0), torch.inf, safe(apart, below, 0.0))


def none(t: Inputs) -> Tensor:
    """A count has no gradient."""
    return 0 * (t.x.sum() + t.y.sum())


def hamming(t: Inputs) -> Tensor:
    return (t.x[:, None] != t.y).to(t.x.dtype).mean(2) + none(t)


def jaccard(t: Inputs) -> Tensor:
    w = t.weight if hasattr(t, "weight") else torch.ones(t.x.shape[1], dtype=t.x.dtype)
    a, b = (t.x != 0)[:, None], t.y != 0
    return safe((w * (a != b)).sum(2), (w * (a | b)).sum(2), 0.0) + none(t)


def sizes(t: Inputs) -> Inputs:
    """Entries of at least 0."""
    return Inputs(x=t.x.abs(), y=t.y.abs())


def powers(x: Tensor) -> Tensor:
    dead = x <= 0  # a NaN is not
    return torch.where(dead, 0, torch.where(dead, 1, x).sqrt())


def hellinger(t: Inputs) -> Tensor:
    t = sizes(t)
    return distance(powers(t.x), powers(t.y)) / 2**0.5


def plogp(p: Tensor, m: Tensor) -> Tensor:
    """p log(p / m), 0 at p = 0."""
    some = ~(p <= 0) & ~(m <= 0)  # a NaN stays one
    return torch.where(some, p * (torch.where(some, p, 1) / torch.where(some, m, 1)).log(), 0)


def jensenshannon(t: Inputs) -> Tensor:
    """For near p and q each term by a series of its own: their sum cancels."""
    t = sizes(t)
    p, q = (r / r.sum(1, keepdim=True) for r in (t.x, t.y))
    p, q = p[:, None], q[None]
    m = (p + q) / 2
    some = m > 0
    # p = m (1 + r), q = m (1 - r): the linear parts cancel to nothing
    r = torch.where(some, (p - q) / torch.where(some, 2 * m, 1), 0)
    near = r.abs() < 0.03
    series = sum(r ** (2 * k) / (k * (2 * k - 1)) for k in range(1, 7))
    far_r = torch.where(near, 0.5, r)
    ends = [torch.where(1 + s * far_r > 0, 1 + s * far_r, 1) for s in (1, -1)]
    exact = sum(e * e.log() * (1 + s * far_r > 0) for e, s in zip(ends, (1, -1), strict=True))
    return root((m * torch.where(near, series, exact)).sum(2) / 2)


def kl(t: Inputs) -> Tensor:
    """A term at y = 0 < x is infinite and flat; the others keep their slopes."""
    t = sizes(t)
    x, y = t.x[:, None].expand(len(t.x), *t.y.shape), t.y.expand(len(t.x), *t.y.shape)
    terms = torch.where((x > 0) & (y == 0), torch.inf, plogp(x, y))
    return torch.where(x.isnan() | y.isnan(), torch.nan, terms).sum(2)


def snr(t: Inputs) -> Tensor:
    apart = moved((t.x[:, None] - t.y).flatten(0, 1)).square().sum(1).view(len(t.x), -1)
    power = moved(t.x).square().sum(1, keepdim=True)
    flat = power == 0
    found = apart / torch.where(flat, 1, power)
    # 0 at constant rows and inf around them: neither a slope nor a curve
    return torch.where(flat, torch.where(apart > 0, torch.inf, apart.detach()), found)


def ball(x: Tensor) -> Tensor:
    return x / 4


def poincare(t: Inputs) -> Tensor:
    x, y = ball(t.x), ball(t.y)
    room = [1 - r.square().sum(1) for r in (x, y)]
    inside = [r > 0 for r in room]
    a, b = (
        torch.where(i, torch.where(i, r, 1).rsqrt(), torch.nan)
        for i, r in zip(inside, room, strict=True)
    )
    return 2 * (distance(x, y) * a[:, None] * b).asinh()


def hyperboloid(x: Tensor) -> Tensor:
    return torch.cat([(1 + x.square().sum(1, keepdim=True)).sqrt(), x], dim=1)


def lorentz(t: Inputs) -> Tensor:
    x, y = hyperboloid(t.x), hyperboloid(t.y)
    square = square_distance(x[:, 1:], y[:, 1:]) - (x[:, None, 0] - y[:, 0]).square()
    return 2 * (root(square) / 2).asinh()


def inverse(d: int) -> Tensor:
    """A fixed inverse covariance with small whole entries."""
    step = torch.arange(d)
    return (2.0 * (step[:, None] == step) + 0.5 * ((step[:, None] - step).abs() == 1)).double()


def mahalanobis(t: Inputs) -> Tensor:
    apart = differences(t)
    return root((apart @ inverse(apart.shape[2]) * apart).sum(2))


def scaled(t: Inputs) -> Tensor:
    return root((differences(t).square() / t.variance).sum(2))


def called(metric: str, rows: Rows = lambda r: r, **options: Any) -> Callable[..., Tensor]:
    def call(t: Inputs, **more: Any) -> Tensor:
        given = options | more
        if metric == "mahalanobis" and "VI" in options:
            given["VI"] = inverse(t.x.shape[1])
        return fl.pairwise_distance(rows(t.x), rows(t.y), metric, **given)

    return call


def counted(metric: str) -> Callable[..., Tensor]:
    call = called(metric)
    return lambda t, **more: call(t, **more) + none(t)


def with_weight(metric: str) -> Callable[..., Tensor]:
    flat = metric in ("hamming", "jaccard")
    return lambda t, **more: (
        fl.pairwise_distance(t.x, t.y, metric, w=t.weight, **more) + (none(t) if flat else 0)
    )


absolute: Rows = torch.abs
METRICS: dict[str, tuple[Callable[..., Tensor], Callable[[Inputs], Tensor]]] = {
    "minkowski": (called("minkowski", p=3.0), lambda t: minkowski(t, 3.0)),
    "minkowski_below_1": (called("minkowski", p=1.5), lambda t: minkowski(t, 1.5)),
    "correlation": (called("correlation"), correlation),
    "angular": (called("angular"), angular),
    "canberra": (called("canberra"), canberra),
    "braycurtis": (called("braycurtis"), braycurtis),
    "hamming": (counted("hamming"), hamming),
    "jaccard": (counted("jaccard"), jaccard),
    "hellinger": (called("hellinger", absolute), hellinger),
    "jensenshannon": (called("jensenshannon", absolute), jensenshannon),
    "kl": (called("kl", absolute), kl),
    "snr": (called("snr"), snr),
    "poincare": (called("poincare", ball), poincare),
    "lorentz": (called("lorentz", hyperboloid), lorentz),
    "mahalanobis": (called("mahalanobis", VI=None), mahalanobis),
}
WEIGHTED: dict[str, Callable[[Inputs], Tensor]] = {
    "euclidean": lambda t: root((t.weight * differences(t).square()).sum(2)),
    "cityblock": lambda t: (t.weight * differences(t).abs()).sum(2),
    "sqeuclidean": lambda t: (t.weight * differences(t).square()).sum(2),
    "minkowski": lambda t: root((t.weight * differences(t).square()).sum(2)),  # p = 2
    # SciPy: a weight above 0 says that its coordinate takes part
    "chebyshev": lambda t: differences(t).abs().amax(2),
    "correlation": weighted_correlation,
    "canberra": lambda t: canberra(t, t.weight),
    "cosine": lambda t: cosine(Inputs(x=t.x * t.weight.sqrt(), y=t.y * t.weight.sqrt())),
    "braycurtis": lambda t: braycurtis(Inputs(x=t.x * t.weight, y=t.y * t.weight)),
    "hamming": lambda t: (t.weight * (t.x[:, None] != t.y)).sum(2) / t.weight.sum() + none(t),
    "jaccard": jaccard,
}


def similar(name: str, **options: Any) -> Callable[..., Tensor]:
    return lambda t, **more: fl.pairwise_similarity(t.x, t.y, name, **options, **more)


SIMILARITIES: dict[str, tuple[dict[str, Any], Callable[[Inputs], Tensor]]] = {
    "dot": ({}, lambda t: t.x @ t.y.T),
    "cosine": ({}, lambda t: unit(t.x) @ unit(t.y).T),
    "rbf": ({"gamma": 0.75}, lambda t: (-0.75 * square_distance(t.x, t.y)).exp()),
    "laplacian": ({"gamma": 0.75}, lambda t: (-0.75 * differences(t).abs().sum(2)).exp()),
    "polynomial": ({"gamma": 0.5}, lambda t: (0.5 * (t.x @ t.y.T) + 1).pow(3)),
    "sigmoid": ({"gamma": 0.5}, lambda t: (0.5 * (t.x @ t.y.T) + 1).tanh()),
}


# ---- softmax losses with their options, listed triplets -----------------------------------------


def optioned(n: int, m: int, d: int) -> Inputs:
    """Every option at once: a bias and a weight a class, an ignored row."""
    t = proxies(n, m, d)
    t.bias, t.weight = torch.randn(m), torch.rand(m) + 0.25
    t.targets[n // 2] = -100
    return t


def cross_entropy(t: Inputs, z: Tensor, smoothing: float) -> Tensor:
    """torch's: the target's weight in the mean, each class's own in what is spread."""
    kept = t.targets >= 0
    log_p = z - z.logsumexp(1, keepdim=True)
    own = t.targets[:, None] == torch.arange(z.shape[1])
    share = (1 - smoothing) * own.to(z.dtype) + smoothing / z.shape[1]
    rows = -(share * t.weight * log_p).sum(1)
    total = (own * t.weight).sum()
    return torch.where(kept, rows, 0).sum() / torch.where(kept.any(), total, 1)


def linear(t: Inputs, **more: Any) -> Tensor:
    options = {"linear_bias": t.bias, "weight": t.weight, "label_smoothing": 0.25} | more
    loss = fl.linear_cross_entropy(t.x, t.w, t.targets, ignore_index=-100, **options)
    # a mean over nothing is NaN
    return loss if bool((t.targets >= 0).any()) else 0 * loss.nan_to_num()


def margin(t: Inputs, **more: Any) -> Tensor:
    options = {"bias": t.bias, "class_weight": t.weight, "label_smoothing": 0.25} | more
    return fl.margin_softmax(t.x, t.w, t.targets, margin=None, scale=t.scale, **options)


def triplet(swap: bool, smooth: bool) -> tuple[Callable[..., Tensor], Callable[[Inputs], Tensor]]:
    def call(t: Inputs, backend: str | None = None) -> Tensor:
        rows = torch.cat([t.x, t.y])
        at = (torch.arange(len(t.x)), t.picked[0] + len(t.x), t.picked[1] + len(t.x))
        return fl.triplet_margin(
            rows, rows, rows, triplets=at, margin=0.5, swap=swap, smooth=smooth
        )

    def formula(t: Inputs) -> Tensor:
        near, far = t.y[t.picked[0]], t.y[t.picked[1]]
        # torch's: 1e-6 added to each coordinate
        a, b, c = (
            root((u - v + 1e-6).square().sum(1)) for u, v in ((t.x, near), (t.x, far), (near, far))
        )
        gap = a - (torch.minimum(b, c) if swap else b) + 0.5
        return (torch.logaddexp(gap, torch.zeros_like(gap)) if smooth else gap.clamp_min(0)).mean()

    return call, formula


OPTIONS = ("x", "w", "bias")
DRAWN = [
    *(
        Case(f"pairwise_{name}", matrices, call, f, TOWERS, function=fl.pairwise_distance)
        for name, (call, f) in METRICS.items()
    ),
    *(
        Case(
            f"pairwise_weighted_{name}",
            weighted,
            with_weight(name),
            f,
            TOWERS,
            function=fl.pairwise_distance,
        )
        for name, f in WEIGHTED.items()
    ),
    Case(
        "pairwise_scaled",
        spread,
        lambda t, **more: called("mahalanobis", variance=t.variance)(t, **more),
        scaled,
        TOWERS,
        function=fl.pairwise_distance,
    ),
    *(
        Case(
            f"similarity_{name}",
            matrices,
            similar(name, **options),
            f,
            TOWERS,
            function=fl.pairwise_similarity,
        )
        for name, (options, f) in SIMILARITIES.items()
    ),
    Case(
        "linear_cross_entropy_options",
        optioned,
        linear,
        lambda t: cross_entropy(t, t.x @ t.w.T + t.bias, 0.25),
        OPTIONS,
        function=fl.linear_cross_entropy,
    ),
    Case(
        "margin_softmax_options",
        optioned,
        margin,
        lambda t: cross_entropy(t, t.scale * (unit(t.x) @ unit(t.w).T) + t.bias, 0.25),
        (*OPTIONS, "scale"),
        function=fl.margin_softmax,
    ),
    *(
        Case(
            f"triplet_margin_{swap:d}{smooth:d}",
            triples,
            *triplet(swap, smooth),
            TOWERS,
            function=fl.triplet_margin,
        )
        for swap in (False, True)
        for smooth in (False, True)
    ),
]

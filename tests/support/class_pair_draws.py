"""More functions for the draws: losses over classes, matrices, the k best, MaxSim.

Calls and literal formulas, which follow the papers and use nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pair_cases import TOWERS, Case
from pair_rows import Inputs, attention, distance, proxies, square_distance, unit
from torch import Tensor

import fused_losses.functional as fl
from fused_losses.margins import CosFace

CLASSES = ("x", "w")


def matrices(n: int, m: int, d: int) -> Inputs:
    """Two sets of rows that are no larger than 1."""
    t = attention(n, m, d)
    return Inputs(x=t.x / d**0.5, y=t.y / d**0.5)


def texts(n: int, m: int, d: int) -> Inputs:
    """Queries of three tokens and documents of four."""
    return Inputs(x=torch.randn(n, 3, d) / d**0.5, y=torch.randn(m, 4, d) / d**0.5)


def cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    rows = torch.arange(len(z))
    return (z.logsumexp(1) - z[rows, targets]).mean()


def linear(t: Inputs) -> Tensor:
    return cross_entropy(t.x @ t.w.T, t.targets)


def cosface(t: Inputs) -> Tensor:
    """64 (cos - 0.35 at the target)."""
    own = t.targets[:, None] == torch.arange(len(t.w))
    cosine = unit(t.x) @ unit(t.w).T
    return cross_entropy(64.0 * torch.where(own, cosine - 0.35, cosine), t.targets)


def smoothed(t: Inputs) -> Tensor:
    """Normalised softmax at scale 20, a tenth of the target spread evenly."""
    z = 20.0 * (unit(t.x) @ unit(t.w).T)
    log_p = z - z.logsumexp(1, keepdim=True)
    own = t.targets[:, None] == torch.arange(len(t.w))
    share = 0.9 * own.to(z.dtype) + 0.1 / len(t.w)
    return -(share * log_p).sum(1).mean()


def cosine(t: Inputs) -> Tensor:
    """|u - v|^2 / 2; rows of zeros are at 1 from all, from one another at 0."""
    dead = [(side == 0).all(1) for side in (t.x, t.y)]
    matrix = square_distance(unit(t.x), unit(t.y)) / 2
    found = torch.where(dead[0][:, None] == dead[1], torch.where(dead[0][:, None], 0, matrix), 1.0)
    return torch.where(matrix.isnan(), matrix, found)


def cosine_of_any(t: Inputs) -> Tensor:
    """As `cosine`, but a row of zeros is at 1 from all."""
    dead = (t.x == 0).all(1)[:, None] | (t.y == 0).all(1)
    return torch.where(dead, 1.0, cosine(t))


def best(matrix: Tensor, x: Tensor, largest: bool = False) -> Tensor:
    """The values of the k best a row, k = 5 or all; of equal ones the first.

    A pair with NaN is no candidate, and a row of x with NaN has none but NaN.
    """
    matrix = torch.where(matrix.isnan(), -torch.inf if largest else torch.inf, matrix)
    order = matrix.argsort(dim=1, descending=largest, stable=True)
    found = matrix.gather(1, order[:, :5])
    return torch.where(x.isnan().any(1, keepdim=True), torch.nan, found)


def late(t: Inputs) -> Tensor:
    return torch.einsum("qid,bjd->qbij", t.x, t.y).amax(3).sum(2)


def called(name: str, *arguments: str, **options: object) -> Callable[..., Tensor]:
    function = getattr(fl, name)
    return lambda t, **more: function(*(getattr(t, a) for a in arguments), **options, **more)


def nearest(metric: str, **options: object) -> Callable[..., Tensor]:
    def call(t: Inputs, **more: object) -> Tensor:
        return fl.pairwise_topk(t.x, t.y, min(5, len(t.y)), metric, **options, **more)[0]

    return call


OF_CLASSES = ("x", "w", "targets")
_euclidean = lambda t: distance(t.x, t.y)
MATRICES = {
    "euclidean": _euclidean,
    "sqeuclidean": lambda t: square_distance(t.x, t.y),
    "cityblock": lambda t: (t.x[:, None] - t.y).abs().sum(2),
    "chebyshev": lambda t: (t.x[:, None] - t.y).abs().amax(2),
    "cosine": cosine,
}
NEAREST = {
    "euclidean": lambda t: best(_euclidean(t), t.x),
    "dot": lambda t: best(t.x @ t.y.T, t.x, True),
    "cosine": lambda t: best(cosine_of_any(t), t.x),
}
_smooth = dict(margin=None, scale=20.0, label_smoothing=0.1)
_cosface = dict(margin=CosFace(0.35))
MORE = [
    Case(
        name,
        proxies,
        called(function, *OF_CLASSES, **options),
        formula,
        CLASSES,
        function=getattr(fl, function),
    )
    for name, function, options, formula in (
        ("linear_cross_entropy", "linear_cross_entropy", {}, linear),
        ("margin_softmax_cosface", "margin_softmax", _cosface, cosface),
        ("margin_softmax_smoothed", "margin_softmax", _smooth, smoothed),
    )
]
MORE += [
    Case(
        f"pairwise_{m}",
        matrices,
        called("pairwise_distance", "x", "y", metric=m),
        f,
        TOWERS,
        function=fl.pairwise_distance,
    )
    for m, f in MATRICES.items()
]
MORE += [
    Case(f"pairwise_topk_{m}", matrices, nearest(m), f, TOWERS, function=fl.pairwise_topk)
    for m, f in NEAREST.items()
]
MORE += [Case("maxsim_padded", texts, called("maxsim", "x", "y"), late, TOWERS, function=fl.maxsim)]

"""Distances and similarities of every pair of rows, as matrices. [..., N, M]

A metric is a transformation of the rows, a kind of `primitives.distances`, and a function of its
result; `METRICS` and `SIMILARITIES` say which.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.examples import EXACT, examples
from fused_losses.base.numerics import autocasts, no_autocast, row_dtype
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_plain, describe, number
from fused_losses.pairwise.metrics import (
    METRICS,
    PLAIN,
    WEIGHTED,
    MetricCall,
    check_values,
    jensenshannon,
    mahalanobis,
    minkowski,
)
from fused_losses.pairwise.own_metric import OwnMetric, check_alone, check_backend, own_distances
from fused_losses.pairwise.whitening import wide
from fused_losses.primitives.distances.inputs import FLAT

SIMILARITIES = ("dot", "cosine", "rbf", "laplacian", "polynomial", "sigmoid")


@plans.hands_out
def pairwise_distance(
    x: Tensor,  # [..., N, D]
    y: Tensor | None = None,  # [..., M, D]
    metric: str | OwnMetric = "euclidean",
    *,
    p: float = 2.0,
    w: Tensor | None = None,  # [D]
    VI: Tensor | None = None,  # [D, D]
    covariance: Tensor | None = None,  # [D, D] or [M, D, D]
    variance: Tensor | None = None,  # [..., M, D]
    base: float | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """The distance of every row of x to every row of y, [..., N, M]; y None: of x to itself.

    Args:
        x, y: float32, bfloat16, float16 or float64, alike; bool too for hamming and jaccard.
            Leading dimensions broadcast.
        metric: SciPy's meaning where SciPy has it: euclidean, sqeuclidean, cityblock, minkowski,
            chebyshev, cosine, correlation, canberra, braycurtis, hamming, jaccard, jensenshannon,
            mahalanobis. Others:
            hellinger   |sqrt x - sqrt y| / sqrt 2, entries >= 0
            kl          sum x log(x/y), rows not normalised
            angular     arccos(cos) / pi, in [0, 1]
            snr         var(y - x) / var(x) over the coordinates, x the anchor
            poincare    arccosh(1 + 2 |x - y|^2 / ((1 - |x|^2)(1 - |y|^2))), |x|, |y| < 1
            lorentz     arccosh(-<x, y>_L) of points (time, space...) with <x, x>_L = -1
            Or a function of your own (an `nn.Module`, too) of x [n, D] and y [m, D] that returns
            [n, m], each from its two rows alone; 16-bit rows come to it in float32. It is called
            on blocks of pairs, and again in the backward; gradients also flow to tensors that it
            holds. It has no options here.
        p: minkowski's exponent > 0; inf is chebyshev.
        w: weights >= 0 of the coordinates, for the metrics that have them in SciPy.
        VI, covariance, variance: mahalanobis's, one of them: the inverse covariance (SciPy's
            name), the covariance, or variances > 0 of each row of y (a diagonal each). None of
            them: the covariance of the rows of x and y together, as SciPy. A covariance [M, D, D]
            is one for each row of y (x and y of two dimensions): in time O(M D^3 + N M D^2).
        base: of jensenshannon's logarithm; None: e.
        precision: of the products, in the metrics that are made of them.

    Returns float32, float64 for float64 inputs; equal rows are at distance 0 exactly.
    Differentiable in the tensors (hamming and jaccard: none), with gradient 0 at distance 0; again
    where a metric is made of products: euclidean, sqeuclidean, cosine, correlation, angular,
    hellinger, snr, poincare, lorentz, mahalanobis (but not with variance). Differences come first
    where rows are near, weights and whitening after them: how many pairs are so near is read on
    the host.
    A negative entry gives NaN in hellinger, jensenshannon and kl, a row of sum 0 in jensenshannon,
    a row outside the ball in poincare. A row of zeros has cosine 0 with every other row in
    cosine, correlation and angular (SciPy: NaN), and is at 0 from another row of zeros.
    Raises ValueError, TypeError for bad arguments, RuntimeError where the backend cannot run.
    Time O(N M D); memory beyond the result, its like in the gradient, and a few [N, M] where a
    metric is a function of another, or has weights or whitening, or is a root of rows whose largest
    entry is beyond 2^50 or below 2^-20: O((N + M) D) plus a block.
    """
    check_plain(p=p, base=base)
    if callable(metric):
        check_alone(p=p, w=w, VI=VI, covariance=covariance, variance=variance, base=base)
        x, y = _rows(x, y, precision, bools=True)
        check_backend(backend, x)
        with no_autocast(x.device):
            return own_distances(metric, x, y)
    validation.check_choice("metric", metric, METRICS)
    x, y = _rows(x, y, precision, bools=metric in FLAT)
    d = x.shape[-1]
    if w is not None:
        check_weighted(metric)
        validation.check_vector("w", w, d, "one a coordinate", x)
        check_values("w", w, lambda v: v >= 0, "values >= 0")
        w = w.to(row_dtype(x.device))
    check_options(metric, p, VI=VI, covariance=covariance, variance=variance, base=base)
    call = MetricCall(x, y, w, precision, backend)
    with no_autocast(x.device):
        if metric == "minkowski":
            return minkowski(call, p)
        if metric == "jensenshannon":
            return jensenshannon(call, base)
        if metric == "mahalanobis":
            return mahalanobis(call, VI, covariance, variance)
        return PLAIN[metric](call)


@plans.hands_out
def pairwise_similarity(
    x: Tensor,  # [..., N, D]
    y: Tensor | None = None,  # [..., M, D]
    similarity: str = "cosine",
    *,
    gamma: float | Tensor | None = None,
    degree: float = 3,
    coef0: float | Tensor = 1.0,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """The similarity of every row of x with every row of y, [..., N, M]; y None: x with itself.

    Args:
        x, y: float32, bfloat16, float16 or float64, alike. Leading dimensions broadcast.
        similarity: "dot" <x, y>, "cosine", "rbf" exp(-gamma |x - y|^2),
            "laplacian" exp(-gamma sum |x - y|), "polynomial" (gamma <x, y> + coef0)^degree,
            "sigmoid" tanh(gamma <x, y> + coef0).
        gamma: None: 1 / D; a number or a scalar tensor, which may need a gradient; > 0 for rbf and
            laplacian. coef0: a number or a scalar tensor.

    Returns float32, float64 for float64 inputs; rbf and laplacian of equal rows are 1 exactly.
    Differentiable, and again but for laplacian. Raises ValueError, TypeError for bad arguments,
    RuntimeError where the backend cannot run.
    Time O(N M D); memory beyond the result: O((N + M) D), a block, and one or two [N, M].
    """
    check_plain(degree=degree)
    validation.check_choice("similarity", similarity, SIMILARITIES)
    x, y = _rows(x, y, precision, bools=False)
    if isinstance(degree, bool) or not isinstance(degree, Real):
        raise TypeError(f"degree: expected a number, got {type(degree).__name__}")
    degree = float(degree)
    gamma = 1 / max(x.shape[-1], 1) if gamma is None else gamma
    gamma = number("gamma", gamma, x, positive=similarity in ("rbf", "laplacian"))
    coef0 = number("coef0", coef0, x, positive=False)
    call = MetricCall(x, y, None, precision, backend)
    with no_autocast(x.device):
        if similarity == "dot":
            return call.matrix("dot", x, y)
        if similarity == "cosine":
            return call.matrix("dot", *call.both(lambda r: unit(wide(r))))
        if similarity == "rbf":
            return (-gamma * call.matrix("sqeuclidean", x, y)).exp()
        if similarity == "laplacian":
            return (-gamma * call.matrix("cityblock", x, y)).exp()
        inner = gamma * call.matrix("dot", x, y) + coef0
        return inner.tanh() if similarity == "sigmoid" else inner**degree


def check_weighted(metric: str) -> None:
    if metric not in WEIGHTED:
        raise ValueError(
            f"w: expected None, metric={metric!r} has no weights (SciPy gives them to "
            f"{', '.join(WEIGHTED)})"
        )


def check_exponent(metric: str, p: float) -> None:
    if metric != "minkowski" and p != 2.0:
        raise ValueError(f"p: expected no value with metric={metric!r}, got {p}")


def check_options(metric: str, p: float, base: float | None = None, **matrices: Any) -> None:
    """What a metric has no use for is an error; matrices: VI, covariance, variance."""
    check_exponent(metric, p)
    if metric != "jensenshannon" and base is not None:
        raise ValueError(f"base: expected None with metric={metric!r}, got {base}")
    given = [name for name, value in matrices.items() if value is not None]
    if given and metric != "mahalanobis":
        raise ValueError(f"{given[0]}: expected None with metric={metric!r}, got a tensor")
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected one of VI, covariance and variance, got {given}")


def _rows(x: Tensor, y: Tensor | None, precision: str, bools: bool) -> tuple[Tensor, Tensor]:
    """Both sides, checked; one tensor for both is one set of rows."""
    validation.check_choice("precision", precision, validation.PRECISIONS)
    for name, rows, shape in (("x", x, "[..., N, D]"), ("y", y, "[..., M, D]")):
        if name == "y" and y is None:
            continue
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name}: expected a tensor {shape}, got {type(rows).__name__}")
        if rows.dtype not in validation.FLOATS and not (bools and rows.dtype == torch.bool):
            extra = " or bool" if bools else ""
            raise TypeError(
                f"{name}: expected a floating point tensor {shape} (float32, bfloat16, float16, "
                f"float64{extra}), got {describe(rows)}"
            )
        if rows.dim() < 2:
            raise ValueError(
                f"{name}: expected at least two dimensions {shape}, got {describe(rows)}"
            )
    if y is None or y is x:
        return x, x
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: expected [..., M, {x.shape[-1]}] as x has, got {describe(y)}")
    try:
        torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"y: expected leading dimensions that broadcast with {tuple(x.shape[:-2])}, got "
            f"{describe(y)}"
        ) from None
    validation.check_device("x", x, "y", y)
    if x.dtype != y.dtype and autocasts(x.device):
        x = x.to(y.dtype)
    validation.check_same_dtype("x", x, "y", y)
    return x, y


def _shares(t: Tensor) -> Tensor:
    """Rows that add up to 1."""
    t = t.abs() + 0.01
    return t / t.sum(dim=1, keepdim=True)


def _on_the_sheet(t: Tensor) -> Tensor:
    return torch.cat([t.square().sum(1, keepdim=True).add(1).sqrt(), t], 1)


# no products to round
_COORDINATES: dict[str, Any] = dict(precisions=("fp32",), not_on=("triton",))


_both = lambda f, t: f(t.x, t.y)


examples(
    pairwise_distance,
    _both,
    {
        "": {},
        **{m: dict(metric=m) for m in ("cosine", "correlation", "angular", "snr")},
    },
)
examples(
    pairwise_distance,
    _both,
    {
        "mahalanobis": dict(metric="mahalanobis"),
        "diagonal": lambda t: dict(metric="mahalanobis", variance=t.w.square() + 1),
    },
    precisions=("fp32",),  # whitening may enlarge a rounding without bound
)
examples(
    pairwise_distance,
    _both,
    {
        "cityblock": dict(metric="cityblock"),
        "weights": lambda t: dict(metric="canberra", w=t.w[0].square()),
    },
    **_COORDINATES,
)
examples(
    pairwise_distance,
    lambda f, t: f(_shares(t.x), _shares(t.y), "jensenshannon", base=2.0),
    {"jensenshannon": {}},
    **_COORDINATES,
)
examples(
    pairwise_distance,
    lambda f, t: f(t.x > 0, t.y > 0, "hamming"),
    {"hamming": {}},
    bound=EXACT,
    **_COORDINATES,
)
examples(pairwise_distance, lambda f, t: f(t.x[None], t.y[None]), {"items": {}})
examples(pairwise_distance, lambda f, t: f(t.x / 4, t.y / 4, "poincare"), {"poincare": {}})
examples(
    pairwise_distance,
    lambda f, t: f(_on_the_sheet(t.x), _on_the_sheet(t.y), "lorentz"),
    {"lorentz": {}},
)
examples(
    pairwise_similarity,
    _both,
    {s: dict(similarity=s) for s in ("cosine", "rbf", "sigmoid", "polynomial")},
)
examples(pairwise_similarity, _both, {"laplacian": dict(similarity="laplacian")}, **_COORDINATES)

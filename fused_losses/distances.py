"""Distances and similarities of every pair of rows, as matrices. [..., N, M]

A metric is a transformation of the rows, a kind of `primitives.distances`, and a function of its
result; `METRICS` and `SIMILARITIES` say which.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, centered, no_autocast, root, row_dtype
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import describe, number
from fused_losses.primitives.distances import reference as reference_distances
from fused_losses.primitives.distances.inputs import FLAT
from fused_losses.primitives.distances.op import choose, distance_matrix


def pairwise_distance(
    x: Tensor,  # [..., N, D]
    y: Tensor | None = None,  # [..., M, D]
    metric: str = "euclidean",
    *,
    p: float = 2.0,
    w: Tensor | None = None,  # [D]
    VI: Tensor | None = None,  # [D, D]
    covariance: Tensor | None = None,  # [D, D]
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
        p: minkowski's exponent > 0; inf is chebyshev.
        w: weights >= 0 of the coordinates, for the metrics that have them in SciPy.
        VI, covariance, variance: mahalanobis's, one of them: the inverse covariance (SciPy's
            name), the covariance, or variances > 0 of each row of y (a diagonal each). None of
            them: the covariance of the rows of x and y together, as SciPy.
        base: of jensenshannon's logarithm; None: e.
        precision: of the products, in the metrics that are made of them.

    Returns float32, float64 for float64 inputs; equal rows are at distance 0 exactly.
    Differentiable in the tensors (hamming and jaccard: none), with gradient 0 at distance 0; again
    where a metric is made of products: euclidean, sqeuclidean, cosine, correlation, angular,
    hellinger, snr, poincare, lorentz, mahalanobis (but not with variance).
    A negative entry gives NaN in hellinger, jensenshannon and kl, a row of sum 0 in jensenshannon,
    a row outside the ball in poincare. A row of zeros has cosine 0 with every other row in
    cosine, correlation and angular (SciPy: NaN), and is at 0 from another row of zeros.
    Raises ValueError, TypeError for bad arguments, RuntimeError where the backend cannot run.
    Time O(N M D); memory beyond the result, its like in the gradient, and a few [N, M] where a
    metric is a function of another: O((N + M) D) plus a block.
    """
    validation.check_choice("metric", metric, METRICS)
    x, y = _rows(x, y, precision, bools=metric in FLAT)
    d = x.shape[-1]
    if w is not None:
        if metric not in WEIGHTED:
            raise ValueError(
                f"w: expected None, metric={metric!r} has no weights (SciPy gives them to "
                f"{', '.join(WEIGHTED)})"
            )
        validation.check_vector("w", w, d, "one a coordinate", x)
        _check_values("w", w, lambda v: v >= 0, "values >= 0")
        w = w.to(row_dtype(x.device))
    if metric != "minkowski" and p != 2.0:
        raise ValueError(f"p: expected no value with metric={metric!r}, got {p}")
    if metric != "jensenshannon" and base is not None:
        raise ValueError(f"base: expected None with metric={metric!r}, got {base}")
    shapes = dict(VI=VI, covariance=covariance, variance=variance)
    given = [name for name, value in shapes.items() if value is not None]
    if given and metric != "mahalanobis":
        raise ValueError(f"{given[0]}: expected None with metric={metric!r}, got a tensor")
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected one of VI, covariance and variance, got {given}")
    call = Call(x, y, w, precision, backend)
    with no_autocast(x.device):
        if metric == "minkowski":
            return _minkowski(call, p)
        if metric == "jensenshannon":
            return _jensenshannon(call, base)
        if metric == "mahalanobis":
            return _mahalanobis(call, VI, covariance, variance)
        return PLAIN[metric](call)


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
    validation.check_choice("similarity", similarity, SIMILARITIES)
    x, y = _rows(x, y, precision, bools=False)
    if isinstance(degree, bool) or not isinstance(degree, int | float):
        raise TypeError(f"degree: expected a number, got {type(degree).__name__}")
    gamma = 1 / max(x.shape[-1], 1) if gamma is None else gamma
    gamma = number("gamma", gamma, x, positive=similarity in ("rbf", "laplacian"))
    coef0 = number("coef0", coef0, x, positive=False)
    call = Call(x, y, None, precision, backend)
    with no_autocast(x.device):
        if similarity == "dot":
            return call.matrix("dot", x, y)
        if similarity == "cosine":
            return call.matrix("dot", *call.both(lambda r: unit(_wide(r))))
        if similarity == "rbf":
            return (-gamma * call.matrix("sqeuclidean", x, y)).exp()
        if similarity == "laplacian":
            return (-gamma * call.matrix("cityblock", x, y)).exp()
        inner = gamma * call.matrix("dot", x, y) + coef0
        return inner.tanh() if similarity == "sigmoid" else inner**degree


# ---- checks -------------------------------------------------------------------------------------


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
    if x.dtype != y.dtype and torch.is_autocast_enabled(x.device.type):
        x = x.to(y.dtype)
    validation.check_same_dtype("x", x, "y", y)
    return x, y


def _check_values(
    name: str, tensor: Tensor, good: Callable[[Tensor], Tensor], expected: str
) -> None:
    """Like `validation.check_labels`; NaN is let through: it makes what depends on it NaN."""
    if torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    tensor = tensor.detach()
    bad = ~(good(tensor) | tensor.isnan())
    if tensor.is_cuda and os.environ.get("FUSED_LOSSES_VALIDATE") != "1":
        torch._assert_async(~bad.any(), f"{name}: expected {expected}")
    elif bool(bad.any()):
        raise ValueError(f"{name}: expected {expected}, got {float(tensor[bad][0])}")


def _check_square(name: str, matrix: Tensor, x: Tensor) -> None:
    d = x.shape[-1]
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        got = describe(matrix) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"{name}: expected a floating point tensor [{d}, {d}], got {got}")
    if tuple(matrix.shape) != (d, d):
        raise ValueError(f"{name}: expected shape ({d}, {d}), got {describe(matrix)}")
    validation.check_device("x", x, name, matrix)


# ---- one call: rows, and the matrix of a kind over their leading dimensions ---------------------


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


class Call(NamedTuple):
    """What a metric is computed from."""

    x: Tensor  # [..., N, D]
    y: Tensor  # [..., M, D], x itself where there is one set of rows
    w: Tensor | None  # [D]
    precision: str
    backend: str | None

    def both(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """f of the rows of both sides."""
        x = f(self.x)
        return x, x if self.y is self.x else f(self.y)

    def weighted(self, power: float) -> tuple[Tensor, Tensor]:
        """Rows times w^power; as they are without weights."""
        if self.w is None:
            return self.x, self.y
        factor = _power(self.w, power).to(accumulate_dtype(self.x.dtype))
        return self.both(lambda r: _wide(r) * factor)

    def matrix(
        self, kind: str, x: Tensor, y: Tensor, w: Tensor | None = None, p: float = 2.0
    ) -> Tensor:
        """`distance_matrix` over broadcast leading dimensions, [..., N, M]."""
        options = dict(kind=kind, p=p, precision=self.precision, backend=self.backend)
        lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        (n, d), m = x.shape[-2:], y.shape[-2]
        of_rows = w is not None and w.dim() > 1  # a weight a row of y
        if x.dim() == 2 and y.dim() == 2:
            return distance_matrix(x, y, w, **options)
        # where only one side has several sets of rows, one matrix holds them all
        if y.shape[:-2].numel() == 1:
            w = w.reshape(m, d) if of_rows else w
            return distance_matrix(x.reshape(-1, d), y.reshape(m, d), w, **options).reshape(
                *lead, n, m
            )
        if x.shape[:-2].numel() == 1:
            w = w.reshape(-1, d) if of_rows else w
            whole = distance_matrix(x.reshape(n, d), y.reshape(-1, d), w, **options)
            return whole.reshape(n, -1, m).transpose(0, 1).reshape(*lead, n, m)
        if 0 in lead:
            # nothing, that is still a function of both
            return (_wide(x).sum() + _wide(y).sum()).expand(*lead, n, m)
        if d > 0 and (n == 1 or m == 1):
            # the differences of all pairs are no larger than the rows themselves
            return self._by_formula(kind, x, y, w, p)
        flat = [
            t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:])
            for t in ((x, y, w) if of_rows else (x, y))
        ]
        rest = () if of_rows else (w,)
        found = [distance_matrix(*items, *rest, **options) for items in zip(*flat, strict=True)]
        return torch.stack(found).reshape(*lead, n, m)

    def _by_formula(self, kind: str, x: Tensor, y: Tensor, w: Tensor | None, p: float) -> Tensor:
        # refused as the kernels would be
        choose(self.backend, x.device, x.dtype, self.precision, kind)
        w = None if w is None else w.to(accumulate_dtype(x.dtype))
        return reference_distances.distance(kind, x, y, w, p)


# ---- what metrics do with rows and results ------------------------------------------------------


def _power(v: Tensor, power: float) -> Tensor:
    """v^power, 0 (with gradient 0) where v is 0, NaN where it is negative."""
    positive = ~(v <= 0)
    powers = torch.where(positive, v, 1) ** power
    return torch.where(positive, powers, torch.where(v < 0, torch.nan, 0.0).to(v.dtype))


def _moved(x: Tensor, w: Tensor | None = None) -> Tensor:
    """Rows moved by their own (weighted) mean."""
    x = _wide(x)
    if w is None:
        return x - x.mean(dim=-1, keepdim=True)
    share = (w / w.sum()).to(x.dtype)
    return x - (x * share).sum(dim=-1, keepdim=True)


def _about_mean(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both moved by the mean of y's rows: a later factor then rounds less."""
    d = x.shape[-1]
    flat = _wide(x).reshape(-1, d)
    if y is x:
        moved = centered(flat, None)[0].reshape(x.shape)
        return moved, moved
    moved, other = centered(flat, _wide(y).reshape(-1, d))
    return moved.reshape(x.shape), other.reshape(y.shape)


# ---- metrics ------------------------------------------------------------------------------------


def _lp(kind: str, power: float) -> Callable[[Call], Tensor]:
    """A norm of the difference: weights scale the coordinates by w^power."""

    def metric(call: Call) -> Tensor:
        if call.w is not None:
            call = call._replace(**dict(zip("xy", _about_mean(call.x, call.y), strict=True)))
        return call.matrix(kind, *call.weighted(power))

    return metric


def _minkowski(call: Call, p: float) -> Tensor:
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise TypeError(f"p: expected a number, got {type(p).__name__}")
    if not p > 0:
        raise ValueError(f"p: expected a value > 0, got {p}")
    if p == math.inf:
        return _chebyshev(call)
    known = {1: "cityblock", 2: "euclidean"}
    if p in known:
        return PLAIN[known[p]](call)
    return call.matrix("minkowski", *call.weighted(1 / p), p=float(p))


def _chebyshev(call: Call) -> Tensor:
    if call.w is None:
        return call.matrix("chebyshev", call.x, call.y)
    # SciPy: a weight says only whether its coordinate takes part
    part = call.w > 0
    return call.matrix("chebyshev", *call.both(lambda r: torch.where(part, r, 0)))


def _direction(x: Tensor) -> Tensor:
    """Unit rows with one more coordinate: 1 for rows of zeros, which are then orthogonal to all."""
    u = unit(_wide(x))
    return torch.cat([u, (u == 0).all(dim=-1, keepdim=True).to(u.dtype)], dim=-1)


def _cosine(call: Call) -> Tensor:
    """|u - v|^2 / 2 = 1 - cos without cancellation."""
    call = call._replace(**dict(zip("xy", call.weighted(0.5), strict=True)))
    return call.matrix("sqeuclidean", *call.both(lambda r: _direction(r) * math.sqrt(0.5)))


def _correlation(call: Call) -> Tensor:
    x, y = call.both(lambda r: _moved(r, call.w))
    return _cosine(call._replace(x=x, y=y))


def _angular(call: Call) -> Tensor:
    chord = call.matrix("euclidean", *call.both(lambda r: _direction(r) / 2))
    # arcsin has no derivative at 1, where rows are opposite
    inside = ~(chord >= 1)
    angle = torch.where(inside, torch.where(inside, chord, 0).asin(), math.pi / 2)
    return 2 / math.pi * angle


def _canberra(call: Call) -> Tensor:
    return call.matrix("canberra", call.x, call.y, call.w)


def _braycurtis(call: Call) -> Tensor:
    return call.matrix("braycurtis", *call.weighted(1.0))


def _hamming(call: Call) -> Tensor:
    return call.matrix("hamming", call.x, call.y, call.w)


def _jaccard(call: Call) -> Tensor:
    def support(r: Tensor) -> Tensor:
        """SciPy's: which entries are not 0; a NaN stays one."""
        return r if r.dtype == torch.bool else torch.where(r.isnan(), r, (r != 0).to(r.dtype))

    return call.matrix("jaccard", *call.both(support), call.w)


def _hellinger(call: Call) -> Tensor:
    return call.matrix("euclidean", *call.both(lambda r: _power(_wide(r) / 2, 0.5)))


def _jensenshannon(call: Call, base: float | None) -> Tensor:
    if base is not None and not (base > 0 and base != 1 and base < math.inf):
        raise ValueError(f"base: expected a value > 0 other than 1, got {base}")

    def distribution(r: Tensor) -> Tensor:
        r = _wide(r)
        r = torch.where(r < 0, torch.nan, r)
        return r / r.sum(dim=-1, keepdim=True)

    found = call.matrix("jensenshannon", *call.both(distribution))
    return found if base is None else found / math.log(base) ** 0.5


def _kl(call: Call) -> Tensor:
    return call.matrix("kl", call.x, call.y)


def _snr(call: Call) -> Tensor:
    x, y = call.both(_moved)
    apart = call.matrix("sqeuclidean", x, y)
    power = x.square().sum(dim=-1, keepdim=True)
    flat = power == 0
    found = apart / torch.where(flat, 1, power)
    # a constant anchor: inf, but for rows that are constant too
    return torch.where(flat & (apart > 0), torch.inf, found)


def _poincare(call: Call) -> Tensor:
    def inverse(r: Tensor) -> Tensor:
        """1 / sqrt(1 - |r|^2), a row, NaN outside the ball."""
        room = 1 - r.to(row_dtype(r.device)).square().sum(dim=-1)
        inside = ~(room <= 0)
        factor = torch.where(inside, torch.where(inside, room, 1).rsqrt(), torch.nan)
        return factor.to(accumulate_dtype(r.dtype))

    a, b = call.both(inverse)
    apart = call.matrix("euclidean", call.x, call.y)
    return 2 * (apart * a.unsqueeze(-1) * b.unsqueeze(-2)).asinh()


def _lorentz(call: Call) -> Tensor:
    if call.x.shape[-1] == 0:
        raise ValueError(f"x: expected a time coordinate, got {describe(call.x)}")
    t, u = call.both(lambda r: _wide(r)[..., 0])
    apart = call.matrix("sqeuclidean", *call.both(lambda r: r[..., 1:]))
    # |x - y|^2 of the Minkowski form, 4 sinh^2(distance / 2)
    chord = root(apart - (t.unsqueeze(-1) - u.unsqueeze(-2)).square())
    return 2 * (chord / 2).asinh()


def _mahalanobis(
    call: Call, VI: Tensor | None, covariance: Tensor | None, variance: Tensor | None
) -> Tensor:
    if variance is not None:
        return _diagonal(call, variance)
    return call.matrix("euclidean", *whitened(call.x, call.y, VI, covariance))


def _diagonal(call: Call, variance: Tensor) -> Tensor:
    y = call.y
    if not isinstance(variance, Tensor) or not variance.is_floating_point():
        got = describe(variance) if isinstance(variance, Tensor) else type(variance).__name__
        raise TypeError(f"variance: expected a floating point tensor [..., M, D], got {got}")
    if variance.shape not in (y.shape, y.shape[-2:]):
        raise ValueError(
            f"variance: expected shape {tuple(y.shape)}, one a coordinate of each row of y, got "
            f"{describe(variance)}"
        )
    validation.check_device("x", call.x, "variance", variance)
    _check_values("variance", variance, lambda v: v > 0, "values > 0")
    w = 1 / variance.to(accumulate_dtype(y.dtype)).expand(y.shape)
    return call.matrix("scaled", call.x, y, w)


def whitened(
    x: Tensor,  # [..., N, D]
    y: Tensor,  # [..., M, D]
    VI: Tensor | None = None,  # [D, D]
    covariance: Tensor | None = None,  # [D, D]
) -> tuple[Tensor, Tensor]:
    """Rows whose Euclidean distances are Mahalanobis distances; y may be x.

    VI = L L^T: rows times L; covariance = L L^T: L^-1 rows (None: of the rows of x and y, of x
    alone where y is x). Computed in float64 about the mean of y, returned in float32, or float64
    for float64 rows. Raises ValueError where a matrix is not symmetric positive definite.
    """
    dtype, wide = accumulate_dtype(x.dtype), row_dtype(x.device)
    same = y is x
    x = x.to(wide)
    y = x if same else y.to(wide)
    d = x.shape[-1]
    if VI is not None:
        _check_square("VI", VI, x)
        factor = _cholesky("VI", VI.to(wide))
        whiten = lambda r: r @ factor
    else:
        if covariance is None:
            covariance = _covariance(x, y)
        else:
            _check_square("covariance", covariance, x)
        factor = _cholesky("covariance", covariance.to(wide))
        whiten = lambda r: torch.linalg.solve_triangular(
            factor, r.reshape(-1, d).mT, upper=False
        ).mT.reshape(r.shape)
    x, y = _about_mean(x, y)
    x = whiten(x).to(dtype)
    return x, x if same else whiten(y).to(dtype)


def _covariance(x: Tensor, y: Tensor) -> Tensor:
    d = x.shape[-1]
    sides = (x,) if y is x else (x, y)
    rows = torch.cat([r.reshape(-1, d) for r in sides])
    if rows.shape[0] <= d:
        raise ValueError(
            f"covariance: expected one, or VI or variance: {rows.shape[0]} rows of size {d} have a "
            f"singular covariance, at least {d + 1} are needed"
        )
    return torch.cov(rows.mT).reshape(d, d)


def _cholesky(name: str, matrix: Tensor) -> Tensor:
    # a quadratic form sees the symmetric part only
    factor, info = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
    if not torch.compiler.is_compiling() and int(info) != 0:
        raise ValueError(
            f"{name}: expected a symmetric positive definite matrix, but its leading minor of "
            f"order {int(info)} is not; a small multiple of the identity may be added to it"
        )
    return factor


PLAIN: dict[str, Callable[[Call], Tensor]] = {
    "euclidean": _lp("euclidean", 0.5),
    "sqeuclidean": _lp("sqeuclidean", 0.5),
    "cityblock": _lp("cityblock", 1.0),
    "chebyshev": _chebyshev,
    "cosine": _cosine,
    "correlation": _correlation,
    "canberra": _canberra,
    "braycurtis": _braycurtis,
    "hamming": _hamming,
    "jaccard": _jaccard,
    "hellinger": _hellinger,
    "kl": _kl,
    "angular": _angular,
    "snr": _snr,
    "poincare": _poincare,
    "lorentz": _lorentz,
}
METRICS = tuple(
    "euclidean sqeuclidean cityblock minkowski chebyshev cosine correlation canberra braycurtis "
    "hamming jaccard hellinger jensenshannon kl mahalanobis angular snr poincare lorentz".split()
)
WEIGHTED = tuple(
    "euclidean sqeuclidean cityblock minkowski chebyshev cosine correlation canberra braycurtis "
    "hamming jaccard".split()
)
SIMILARITIES = ("dot", "cosine", "rbf", "laplacian", "polynomial", "sigmoid")

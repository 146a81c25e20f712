"""The metrics: a transformation of the rows, a kind of distance, a function of its result."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import (
    about_own_mean,
    accumulate_dtype,
    common_factor,
    multiplied,
    nan_where_infinite,
    power_of_two,
    root,
    row_dtype,
)
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import assert_async, describe
from fused_losses.pairwise.class_covariance import class_distances, class_roots, of_classes
from fused_losses.pairwise.differences import from_differences
from fused_losses.pairwise.whitening import exactly_about, whitened, wide
from fused_losses.primitives.distances import reference as reference_distances
from fused_losses.primitives.distances.op import choose, distance_matrix, in_range


def check_values(
    name: str, tensor: Tensor, good: Callable[[Tensor], Tensor], expected: str
) -> None:
    """Like `validation.check_labels`; NaN is let through: it makes what depends on it NaN."""
    if torch.compiler.is_compiling() or tensor.numel() == 0 or tensor.is_meta:
        return
    tensor = tensor.detach()
    bad = ~(good(tensor) | tensor.isnan())
    if tensor.is_cuda and os.environ.get("FUSED_LOSSES_VALIDATE") != "1":
        assert_async(~bad.any(), f"{name}: expected {expected}")
    elif bool(bad.any()):
        raise ValueError(f"{name}: expected {expected}, got {float(tensor[bad][0])}")


class MetricCall(NamedTuple):
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
        return self.both(lambda r: wide(r) * factor)

    def matrix(
        self, kind: str, x: Tensor, y: Tensor, w: Tensor | None = None, p: float = 2.0
    ) -> Tensor:
        """`distance_matrix` over broadcast leading dimensions, [..., N, M]."""
        options: dict[str, Any] = dict(
            kind=kind, p=p, precision=self.precision, backend=self.backend
        )
        lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        (n, d), m = x.shape[-2:], y.shape[-2]
        of_rows = w is not None and w.dim() > 1  # a weight a row of y
        if x.dim() == 2 and y.dim() == 2:
            return distance_matrix(x, y, w, **options)
        # where only one side has several sets of rows, one matrix holds them all
        if y.shape[:-2].numel() == 1:
            w = w.reshape(m, d) if w is not None and of_rows else w
            return distance_matrix(x.flatten(0, -2), y.reshape(m, d), w, **options).reshape(
                *lead, n, m
            )
        if x.shape[:-2].numel() == 1:
            w = w.flatten(0, -2) if w is not None and of_rows else w
            whole = distance_matrix(x.reshape(n, d), y.flatten(0, -2), w, **options)
            return whole.reshape(n, y.shape[:-2].numel(), m).transpose(0, 1).reshape(*lead, n, m)
        if 0 in lead:
            # nothing, that is still a function of both
            return (wide(x).sum() + wide(y).sum()).expand(*lead, n, m)
        if d > 0 and (n == 1 or m == 1):
            # the differences of all pairs are no larger than the rows themselves
            return self._by_formula(kind, x, y, w, p)
        flat = [
            t.expand(*lead, *t.shape[-2:]).flatten(0, -3)
            for t in ((x, y, w) if w is not None and of_rows else (x, y))
        ]
        rest = () if of_rows else (w,)
        found = [distance_matrix(*items, *rest, **options) for items in zip(*flat, strict=True)]
        return torch.stack(found).reshape(*lead, n, m)

    def _by_formula(self, kind: str, x: Tensor, y: Tensor, w: Tensor | None, p: float) -> Tensor:
        # refused as the kernels would be
        choose(self.backend, x.device, x.dtype, self.precision, kind)
        w = None if w is None else w.to(accumulate_dtype(x.dtype))
        x, y, factor = in_range(kind, x, y)
        found = reference_distances.distance(kind, x, y, w, p)
        return found if factor is None else found / factor


def _power(v: Tensor, power: float) -> Tensor:
    """v^power, 0 (with gradient 0) where v is 0, NaN where it is negative."""
    positive = ~(v <= 0)
    powers = torch.where(positive, v, 1) ** power
    return torch.where(positive, powers, torch.where(v < 0, torch.nan, 0.0).to(v.dtype))


def moved(x: Tensor, w: Tensor | None = None) -> Tensor:
    """Rows moved by their own (weighted) mean."""
    if w is None:
        about = about_own_mean(x)
    else:
        x = wide(x)
        about = x - (x * (w / w.sum()).to(x.dtype)).sum(dim=-1, keepdim=True)
    # what rounding leaves of a constant row is no direction; its slope is that of any other
    constant = (x == x[..., :1]).all(dim=-1, keepdim=True)
    return about - torch.where(constant, about, 0).detach()


def _lp(kind: str, power: float, p: float = 2.0) -> Callable[[MetricCall], Tensor]:
    """A norm of the difference: weights scale the coordinates by w^power."""

    def metric(call: MetricCall) -> Tensor:
        if call.w is None:
            return call.matrix(kind, call.x, call.y, p=p)
        x, y = exactly_about(*call.both(wide))
        found = call.matrix(kind, *call._replace(x=x, y=y).weighted(power), p=p)
        return from_differences(found, x, y, _power(call.w, power).to(x.dtype), kind, p)

    return metric


def minkowski(call: MetricCall, p: float) -> Tensor:
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"p: expected a number, got {type(p).__name__}")
    p = float(p)
    if not p > 0:
        raise ValueError(f"p: expected a value > 0, got {p}")
    if p == math.inf:
        return _chebyshev(call)
    known = {1.0: "cityblock", 2.0: "euclidean"}
    if p in known:
        return PLAIN[known[p]](call)
    # a kernel divides by no distance below 1e-38
    factor = common_factor(call.x, call.y)
    x, y = multiplied(factor, call.x, call.y)
    return _lp("minkowski", 1 / p, p)(call._replace(x=x, y=y)) / factor


def _chebyshev(call: MetricCall) -> Tensor:
    if call.w is None:
        return call.matrix("chebyshev", call.x, call.y)
    # SciPy: a weight says only whether its coordinate takes part
    part = call.w > 0
    return call.matrix("chebyshev", *call.both(lambda r: torch.where(part, r, 0)))


def _direction(x: Tensor) -> Tensor:
    """Unit rows with one more coordinate: 1 for rows of zeros, which are then orthogonal to all."""
    u = unit(wide(x))
    return torch.cat([u, (u == 0).all(dim=-1, keepdim=True).to(u.dtype)], dim=-1)


def _cosine(call: MetricCall) -> Tensor:
    """|u - v|^2 / 2 = 1 - cos without cancellation."""
    call = call._replace(**dict(zip("xy", call.weighted(0.5), strict=True)))
    return call.matrix("sqeuclidean", *call.both(lambda r: _direction(r) * math.sqrt(0.5)))


def _correlation(call: MetricCall) -> Tensor:
    # of denormals a mean has few digits; what is a power of two longer has the same direction
    x, y = call.both(lambda r: moved(wide(r) * power_of_two(wide(r)), call.w))
    return _cosine(call._replace(x=x, y=y))


def _angular(call: MetricCall) -> Tensor:
    """By the half chord, the half angle's sine, or beyond a right angle by its cosine."""
    u, v = call.both(lambda r: _direction(r) / 2)
    sine = call.matrix("euclidean", u, v)
    # |u + v|, of rows that are nearly opposite from their sum
    one = u.new_ones(u.shape[-1])
    cosine = from_differences(root(1 - sine.square()), u, -v, one, "euclidean")
    near = sine < cosine
    small, large = torch.where(near, sine, 0).asin(), torch.where(near, 0, cosine).asin()
    return 2 / math.pi * torch.where(near, small, math.pi / 2 - large)


def _canberra(call: MetricCall) -> Tensor:
    # the same of all rows times a number: kernels divide by no sum below 1e-37
    x, y = call.both(wide)
    return call.matrix("canberra", *multiplied(common_factor(x, y, 60, 115), x, y), call.w)


def _braycurtis(call: MetricCall) -> Tensor:
    x, y = call.weighted(1.0)
    # a ratio: sums over coordinates neither overflow nor underflow
    x, y = call._replace(x=x, y=y).both(wide)
    return call.matrix("braycurtis", *multiplied(common_factor(x, y), x, y))


def _hamming(call: MetricCall) -> Tensor:
    return call.matrix("hamming", call.x, call.y, call.w)


def _jaccard(call: MetricCall) -> Tensor:
    def support(r: Tensor) -> Tensor:
        """SciPy's: which entries are not 0; a NaN stays one."""
        return r if r.dtype == torch.bool else torch.where(r.isnan(), r, (r != 0).to(r.dtype))

    return call.matrix("jaccard", *call.both(support), call.w)


def _hellinger(call: MetricCall) -> Tensor:
    return call.matrix("euclidean", *call.both(lambda r: _power(wide(r) / 2, 0.5)))


def jensenshannon(call: MetricCall, base: float | None) -> Tensor:
    if base is not None and not (base > 0 and base != 1 and base < math.inf):
        raise ValueError(f"base: expected a value > 0 other than 1, got {base}")

    def distribution(r: Tensor) -> Tensor:
        r = wide(r)
        r = torch.where(r < 0, torch.nan, r)
        r = r * power_of_two(r)
        return r / r.sum(dim=-1, keepdim=True)

    found = call.matrix("jensenshannon", *call.both(distribution))
    return found if base is None else found / math.log(base) ** 0.5


def _kl(call: MetricCall) -> Tensor:
    # terms of inf may be of either sign: such a row has none
    x, y = call.both(lambda r: wide(r) + nan_where_infinite(r).unsqueeze(-1))
    # times the number that all rows are: a kernel's logarithm is that of 1e-38 at least
    factor = common_factor(x, y)
    return call.matrix("kl", *multiplied(factor, x, y)) / factor


def _snr(call: MetricCall) -> Tensor:
    # a ratio of squares: of rows near 1
    x, y = call.both(wide)
    x, y = multiplied(common_factor(x, y, 0, 0), x, y)
    x, y = call._replace(x=x, y=y).both(moved)
    apart = call.matrix("sqeuclidean", x, y)
    power = x.square().sum(dim=-1, keepdim=True)
    flat = power == 0
    found = apart / torch.where(flat, 1, power)
    # a constant anchor: inf, but 0 for rows that are constant too, without a slope or a curve
    of_flat = torch.where(apart > 0, torch.inf, apart.detach())
    return torch.where(flat, of_flat, found)


def _poincare(call: MetricCall) -> Tensor:
    def inverse(r: Tensor) -> Tensor:
        """1 / sqrt(1 - |r|^2), a row, NaN outside the ball."""
        room = 1 - r.to(row_dtype(r.device)).square().sum(dim=-1)
        inside = ~(room <= 0)
        factor = torch.where(inside, torch.where(inside, room, 1).rsqrt(), torch.nan)
        return factor.to(accumulate_dtype(r.dtype))

    a, b = call.both(inverse)
    apart = call.matrix("euclidean", call.x, call.y)
    return 2 * (apart * a.unsqueeze(-1) * b.unsqueeze(-2)).asinh()


def _lorentz(call: MetricCall) -> Tensor:
    if call.x.shape[-1] == 0:
        raise ValueError(f"x: expected a time coordinate, got {describe(call.x)}")
    t, u = call.both(lambda r: wide(r)[..., 0])
    apart = call.matrix("sqeuclidean", *call.both(lambda r: r[..., 1:]))
    # |x - y|^2 of the Minkowski form, 4 sinh^2(distance / 2)
    chord = root(apart - (t.unsqueeze(-1) - u.unsqueeze(-2)).square())
    return 2 * (chord / 2).asinh()


def mahalanobis(
    call: MetricCall, VI: Tensor | None, covariance: Tensor | None, variance: Tensor | None
) -> Tensor:
    if variance is not None:
        return _diagonal(call, variance)
    if covariance is not None and of_classes(covariance):
        # differences and their factors are PyTorch's on every backend
        choose(call.backend, call.x.device, call.x.dtype, call.precision, "euclidean")
        if call.x.dim() != 2:
            raise ValueError(
                f"x: expected [N, D] with a covariance a row of y, got {describe(call.x)}"
            )
        return class_distances(call.x, call.y, class_roots(covariance, call.y)[0])
    x, y = exactly_about(*call.both(wide))
    u, v, factor = whitened(x, y, VI, covariance)
    return from_differences(call.matrix("euclidean", u, v), x, y, factor, "euclidean")


def _diagonal(call: MetricCall, variance: Tensor) -> Tensor:
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
    check_values("variance", variance, lambda v: v > 0, "values > 0")
    w = 1 / variance.to(accumulate_dtype(y.dtype)).expand(y.shape)
    return call.matrix("scaled", call.x, y, w)


PLAIN: dict[str, Callable[[MetricCall], Tensor]] = {
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

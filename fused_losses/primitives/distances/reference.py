"""`distance_matrix` from its formulas, with x_i - y_j for every pair at once: O(N M D) memory.

Any device, float64, derivatives of any order; every mask keeps its untaken branch finite, so that
autograd does not meet 0 * inf.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype, log_ratio
from fused_losses.base.products import product


def distance(kind: str, x: Tensor, y: Tensor, w: Tensor | None, p: float) -> Tensor:
    """`fused_losses.primitives.distances` in the dtype of its inputs or float32.

    D >= 1: x [..., N, D], y [..., M, D], w [D] or (scaled) [..., M, D] -> [..., N, M].
    """
    if kind in ("hamming", "jaccard"):
        return _unequal(kind, x.detach(), y.detach(), w)
    dtype = accumulate_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if kind == "dot":
        return product(x, y)
    x, y = x.unsqueeze(-2), y.unsqueeze(-3)
    if kind == "minkowski":
        return _minkowski(x, y, p)
    if kind == "canberra":
        return _canberra(x, y, w)
    if kind == "scaled":
        assert w is not None
        return _root((x - y).square().mul(w.unsqueeze(-3)).sum(dim=-1))
    return _PLAIN[kind](x, y)


def _where_not_zero(v: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f(v), and where v = 0 (f has no derivative there) 0 with gradient 0."""
    zero = v == 0
    return torch.where(zero, 0, f(torch.where(zero, 1, v)))


def _root(v: Tensor) -> Tensor:
    return _where_not_zero(v, torch.sqrt)


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom; where bottom is 0, of top >= 0: 0 or inf, with gradient 0."""
    zero = bottom == 0
    edge = torch.where(top == 0, 0.0, torch.inf).to(top.dtype)
    return torch.where(zero, edge, top / torch.where(zero, 1, bottom))


def _sqeuclidean(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum(dim=-1)


def _euclidean(x: Tensor, y: Tensor) -> Tensor:
    return _root(_sqeuclidean(x, y))


def _cityblock(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().sum(dim=-1)


def _minkowski(x: Tensor, y: Tensor, p: float) -> Tensor:
    apart = (x - y).abs()
    # as shares of the largest, whose powers stay in range; a constant factor, as the root undoes it
    top = apart.detach().amax(dim=-1, keepdim=True)
    powers = _where_not_zero(apart / torch.where(top == 0, 1, top), lambda v: v**p)
    found = top.squeeze(-1) * _where_not_zero(powers.sum(dim=-1), lambda v: v ** (1 / p))
    return torch.where(top.squeeze(-1).isinf(), torch.inf, found)


def _chebyshev(x: Tensor, y: Tensor) -> Tensor:
    apart = (x - y).abs()
    # argmax takes the first of equals, and a NaN before all
    return apart.gather(-1, apart.argmax(dim=-1, keepdim=True)).squeeze(-1)


def _canberra(x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
    terms = _ratio((x - y).abs(), x.abs() + y.abs())
    return (terms if w is None else terms * w).sum(dim=-1)


def _braycurtis(x: Tensor, y: Tensor) -> Tensor:
    return _ratio((x - y).abs().sum(dim=-1), (x + y).abs().sum(dim=-1))


def _jensenshannon(x: Tensor, y: Tensor) -> Tensor:
    """x log(x/m) + y log(y/m); near entries: m [2t atanh t + log(1 - t^2)], t = (x - y)/(x + y)."""
    # an entry that is 0 is a constant
    no_x, no_y = x == 0, y == 0
    x, y = torch.where(no_x, 0, x), torch.where(no_y, 0, y)
    sums = torch.where((x < 0) | (y < 0), torch.nan, x + y)
    t = _ratio(x - y, sums)
    # written so that a NaN is near
    near = ~(t.abs() >= 0.5)
    inner, middle = torch.where(near, t, 0), torch.where(near, 1, sums / 2)
    inner = 2 * inner * inner.atanh() + (-inner.square()).log1p()
    outer = [
        r * log_ratio(torch.where(none | near, 1, r), torch.where(none, 1, middle))
        for r, none in ((x, no_x), (y, no_y))
    ]
    total = torch.where(near, sums / 2 * inner, sum(outer)).sum(dim=-1) / 2
    # rounding can leave a sum of 0 below it
    return _root(torch.where(total < 0, 0, total))


def _kl(x: Tensor, y: Tensor) -> Tensor:
    zero, unmatched = x == 0, (y == 0) & (x > 0)
    log = log_ratio(torch.where(zero, 1, x), torch.where(zero | unmatched, 1, y))
    terms = torch.where(unmatched, torch.inf, torch.where(zero, 0, x * log))
    bad = (x < 0) | (y < 0) | x.isnan() | y.isnan()
    return torch.where(bad, torch.nan, terms).sum(dim=-1)


def _unequal(kind: str, x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    x, y = x.unsqueeze(-2), y.unsqueeze(-3)
    w = torch.ones(x.shape[-1], dtype=dtype, device=x.device) if w is None else w.detach()
    differ = (x != y).to(dtype)
    if x.dtype != torch.bool:
        differ = torch.where(x.isnan() | y.isnan(), torch.nan, differ)
    top = (differ * w).sum(dim=-1)
    if kind == "hamming":
        return top / w.sum()
    return _ratio(top, (((x != 0) | (y != 0)).to(dtype) * w).sum(dim=-1))


_PLAIN = {
    "sqeuclidean": _sqeuclidean,
    "euclidean": _euclidean,
    "cityblock": _cityblock,
    "chebyshev": _chebyshev,
    "braycurtis": _braycurtis,
    "jensenshannon": _jensenshannon,
    "kl": _kl,
}

"""The kinds of distance as the bounded path computes them: terms and slopes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype, log_ratio

PairSlopes = tuple[Tensor, Tensor, Tensor | None]


class Kind(NamedTuple):
    """x [rows, 1, D], y [columns, D], w [D] or [columns, D], out [rows, columns, 1].

    value(x, y, w, p) is the block's distances [rows, columns]; slopes(x, y, w, p, out) their
    derivatives by x_ik, y_jk and w_k, [rows, columns, D] each.
    """

    value: Callable[..., Tensor]
    slopes: Callable[..., PairSlopes] | None = None


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, 0/0 = 0."""
    return torch.where((top == 0) & (bottom == 0), 0, top / bottom)


def _over(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, 0 where bottom is."""
    zero = bottom == 0
    return torch.where(zero, 0, top / torch.where(zero, 1, bottom))


def _cityblock(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    return (x - y).abs_().sum(dim=2)


def _cityblock_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> PairSlopes:
    sign = _sign(x - y)
    return sign, -sign, None


def _sign(v: Tensor) -> Tensor:
    """torch.sign, with NaN for NaN."""
    return torch.where(v.isnan(), v, v.sign())


def _minkowski(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    apart = (x - y).abs_()
    # as shares of the largest, whose powers stay in range
    top = apart.amax(dim=2, keepdim=True)
    found = apart.div_(torch.where(top == 0, 1, top)).pow_(p).sum(dim=2).pow_(1 / p)
    top = top.squeeze(2)
    return torch.where(top.isinf(), top, found.mul_(top))


def _minkowski_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> PairSlopes:
    apart = x - y
    # (|x - y| / out)^(p - 1): no power of a small number alone
    share = _over(apart.abs(), out)
    slope = torch.where(share == 0, 0, share ** (p - 1)) * _sign(apart)
    return slope, -slope, None


def _chebyshev(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    return (x - y).abs_().amax(dim=2)


def _chebyshev_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> PairSlopes:
    apart = x - y
    # argmax takes the first of equals, and a NaN before all
    first = apart.abs().argmax(dim=2, keepdim=True)
    places = torch.arange(apart.shape[2], device=apart.device)
    slope = torch.where(places == first, _sign(apart), 0)
    return slope, -slope, None


def _canberra(x: Tensor, y: Tensor, w: Tensor | None, p: float) -> Tensor:
    terms = _over((x - y).abs_(), x.abs() + y.abs())
    return (terms if w is None else terms * w).sum(dim=2)


def _canberra_slopes(x: Tensor, y: Tensor, w: Tensor | None, p: float, out: Tensor) -> PairSlopes:
    sizes, apart = x.abs() + y.abs(), x - y
    terms, sign = _over(apart.abs(), sizes), _sign(apart)
    to_x = _over(sign - terms * x.sign(), sizes)
    to_y = _over(-sign - terms * y.sign(), sizes)
    return (to_x, to_y, terms) if w is None else (to_x * w, to_y * w, terms)


def _braycurtis(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    return _ratio((x - y).abs_().sum(dim=2), (x + y).abs_().sum(dim=2))


def _braycurtis_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> PairSlopes:
    sums = x + y
    whole = sums.abs().sum(dim=2, keepdim=True)
    sign, toward = _sign(x - y), out * sums.sign()
    return _over(sign - toward, whole), _over(-sign - toward, whole), None


def _jensenshannon(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    """m [(1 + t) log(1 + t) + (1 - t) log(1 - t)] with t = (x - y)/(x + y)."""
    sums = torch.where((x < 0) | (y < 0), torch.nan, x + y)
    t = _over(x - y, sums)
    # 2t atanh t + log(1 - t^2) is the same without its cancellation near 0
    small = t.abs() < 0.5
    inner = torch.where(small, t, 0)
    inner = 2 * inner * inner.atanh() + (-inner.square()).log1p_()
    outer = torch.special.xlog1py(1 + t, t) + torch.special.xlog1py(1 - t, -t)
    return torch.where(small, inner, outer).mul_(sums).sum(dim=2).div_(4).sqrt_()


def _jensenshannon_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> PairSlopes:
    sums = x + y
    t = _over(x - y, sums)
    # 1 - t and 1 + t have no digits of a share that is small beside the other
    small, middle = t.abs() < 0.5, (sums / 2).log()
    to_x = torch.where(small, t.log1p(), x.log() - middle).masked_fill_(x == 0, 0)
    to_y = torch.where(small, (-t).log1p(), y.log() - middle).masked_fill_(y == 0, 0)
    return _over(to_x, 4 * out), _over(to_y, 4 * out), None


def _kl(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    negative = (x < 0) | (y < 0)
    terms = torch.where(x == 0, 0, x * log_ratio(x, y))
    terms = torch.where((y == 0) & (x > 0), torch.inf, terms)
    # a NaN of y counts where x = 0 too
    return torch.where(negative | y.isnan(), torch.nan, terms).sum(dim=2)


def _kl_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> PairSlopes:
    constant = (x == 0) | (y == 0)
    to_x = torch.where(constant, 0, log_ratio(x, y) + 1)
    to_y = torch.where(constant, 0, -x / y)
    return to_x, to_y, None


def _weighted_count(found: Tensor, w: Tensor | None, dtype: torch.dtype) -> Tensor:
    return found.sum(dim=2, dtype=dtype) if w is None else (found * w).sum(dim=2)


def _unequal(x: Tensor, y: Tensor, w: Tensor | None) -> tuple[Tensor, torch.dtype]:
    dtype = accumulate_dtype(x.dtype)
    found = _weighted_count(x != y, w, dtype)
    if x.dtype != torch.bool:
        lost = x.isnan().any(dim=2) | y.isnan().any(dim=1)
        found = torch.where(lost, torch.nan, found)
    return found, dtype


def _hamming(x: Tensor, y: Tensor, w: Tensor | None, p: float) -> Tensor:
    found, _ = _unequal(x, y, w)
    return found / (x.shape[2] if w is None else w.sum())


def _jaccard(x: Tensor, y: Tensor, w: Tensor | None, p: float) -> Tensor:
    found, dtype = _unequal(x, y, w)
    return _ratio(found, _weighted_count((x != 0) | (y != 0), w, dtype))


def _scaled(x: Tensor, y: Tensor, w: Tensor, p: float) -> Tensor:
    return (x - y).square_().mul_(w).sum(dim=2).sqrt_()


def _scaled_slopes(x: Tensor, y: Tensor, w: Tensor, p: float, out: Tensor) -> PairSlopes:
    apart = x - y
    slope = _over(apart * w, out)
    return slope, -slope, _over(apart.square_(), 2 * out)


FORMULAS = {
    "cityblock": Kind(_cityblock, _cityblock_slopes),
    "minkowski": Kind(_minkowski, _minkowski_slopes),
    "chebyshev": Kind(_chebyshev, _chebyshev_slopes),
    "canberra": Kind(_canberra, _canberra_slopes),
    "braycurtis": Kind(_braycurtis, _braycurtis_slopes),
    "jensenshannon": Kind(_jensenshannon, _jensenshannon_slopes),
    "kl": Kind(_kl, _kl_slopes),
    "hamming": Kind(_hamming),
    "jaccard": Kind(_jaccard),
    "scaled": Kind(_scaled, _scaled_slopes),
}

"""Listed pairs, all gathered at once. Memory O(P D); derivatives of any order."""

from __future__ import annotations

from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype, nan_where_infinite
from fused_losses.primitives.listed.inputs import ListedInputs


def of_rows(x: Tensor, y: Tensor, apart: bool) -> Tensor:
    """<x_k, y_k> or |x_k - y_k|^2, in the accumulation dtype. [P, D], [P, D] -> [P]

    NaN where an entry of either is not finite.
    """
    wide = accumulate_dtype(x.dtype)
    x, y = x.to(wide), y.to(wide)
    found = (x - y).square().sum(dim=1) if apart else (x * y).sum(dim=1)
    return found + nan_where_infinite(x) + nan_where_infinite(y)


def scores(p: ListedInputs) -> Tensor:
    """The score of every listed pair, [P]."""
    return of_rows(p.x.index_select(0, p.rows), p.others.index_select(0, p.columns), p.apart)

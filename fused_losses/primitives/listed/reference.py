"""Listed pairs, all gathered at once. Memory O(P D); derivatives of any order."""

from __future__ import annotations

from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.listed.inputs import ListedInputs


def of_rows(x: Tensor, y: Tensor, apart: bool) -> Tensor:
    """<x_k, y_k> or |x_k - y_k|^2, in the accumulation dtype. [P, D], [P, D] -> [P]"""
    wide = accumulate_dtype(x.dtype)
    x, y = x.to(wide), y.to(wide)
    return (x - y).square().sum(dim=1) if apart else (x * y).sum(dim=1)


def scores(p: ListedInputs) -> Tensor:
    """The score of every listed pair, [P]."""
    return of_rows(p.x.index_select(0, p.rows), p.y.index_select(0, p.columns), p.apart)

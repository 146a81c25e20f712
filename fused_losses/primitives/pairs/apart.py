"""Scores made of distances, u = -scale |x - y|^2: near pairs, which products would cancel in.

A pair is near when not |x - y|^2 >= share (|x|^2 + |y|^2) (a NaN is near). Then |x - y|^2 comes
from the differences of the rows, in the accumulation dtype, and so does its part of the gradients:

    dx_i = 2 scale (sum_far G_ij y_j - x_i sum_far G_ij + sum_near G_ij (y_j - x_i)),   G = dL/du
    dscale = -sum G |x - y|^2

dy alike. A far pair has |x|^2 + |y|^2 <= |x - y|^2 / share: what its products lose is at most that
much larger than a difference's own rounding (docs/pairs.md).
"""

from __future__ import annotations

from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype, row_dtype
from fused_losses.primitives.pairs.inputs import PairInputs

SHARE = 1 / 16  # of products in float32 or float64
COARSE_SHARE = 1 / 4  # of products that round their operands


def share(precision: str) -> float:
    """The part of |x|^2 + |y|^2 below which |x - y|^2 is not taken from products."""
    return SHARE if precision == "fp32" else COARSE_SHARE


def norms(x: Tensor) -> Tensor:
    """|x|^2 a row, [N], in the row dtype."""
    return x.to(accumulate_dtype(x.dtype)).square().sum(dim=1, dtype=row_dtype(x.device))


def lowered(p: PairInputs) -> PairInputs:
    """The call by products and biases, which cancel near pairs. Without apart p itself."""
    if not p.apart:
        return p
    narrow = accumulate_dtype(p.x.dtype)
    scale = p.scale.to(p.x.device)
    x_bias = (-scale * norms(p.x)).to(narrow)
    y_bias = None if p.triangle else x_bias if p.y is p.x else (-scale * norms(p.y)).to(narrow)
    return p._replace(scale=2 * p.scale, x_bias=x_bias, y_bias=y_bias, apart=False)

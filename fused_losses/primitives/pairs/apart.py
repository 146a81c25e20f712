"""Scores made of distances, u = -scale |x - y|^2: near pairs, which products would cancel in.

A pair is near when not |x - y|^2 >= share (|x|^2 + |y|^2) (a NaN is near). Then |x - y|^2 comes
from the differences of the rows, in the accumulation dtype, and so does its part of the gradients:

    dx_i = 2 scale (sum_far G_ij y_j - x_i sum_far G_ij + sum_near G_ij (y_j - x_i)),   G = dL/du
    dscale = -sum G |x - y|^2

dy alike. A far pair has |x|^2 + |y|^2 <= |x - y|^2 / share: what its products lose is at most that
much larger than a difference's own rounding (docs/pairs.md).
"""

from __future__ import annotations

SHARE = 1 / 16  # of products in float32 or float64
COARSE_SHARE = 1 / 4  # of products that round their operands


def share(precision: str) -> float:
    """The part of |x|^2 + |y|^2 below which |x - y|^2 is not taken from products."""
    return SHARE if precision == "fp32" else COARSE_SHARE

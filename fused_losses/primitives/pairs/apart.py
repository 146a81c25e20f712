"""Scores made of distances, u = -scale |x - y|^2, for kernels that multiply rows.

A form *lowers* such a call: with scale2 = 2 scale, a = -scale |x|^2 and b = -scale |y|^2 it is
u = scale2 <x, y> + a + b, which cancels where x and y are near. So a kernel that sees `apart`
calls a pair near when not |u| >= share |a + b| (a NaN is near), and then takes
u = -scale sum (x - y)^2 from the differences of the rows, in the accumulation dtype.

Backward, with G = dL/du: far pairs go the way of products and biases. Near pairs stay out of both:
the kernel adds scale2 G (y - x) to dx and scale2 G (x - y) to dy, and -G |x - y|^2 / 2 to the sum
of G <x, y>. The call's own gradients come of the lowered one's:

    dx = dx' - scale2 da x                         dy = dy' - scale2 db y
    dscale = 2 dscale' - <da, |x|^2> - <db, |y|^2>       (`raised`)

A far pair has |x|^2 + |y|^2 <= |x - y|^2 / share: what its products lose is at most that much
larger than a difference's own rounding (docs/pairs.md).
"""

from __future__ import annotations

from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype, row_dtype
from fused_losses.primitives.pairs.inputs import PairInputs, PairNeeds

SHARE = 1 / 16  # of products in float32 or float64
COARSE_SHARE = 1 / 4  # of products that round their operands


def share(precision: str) -> float:
    """The part of |x|^2 + |y|^2 below which |x - y|^2 is not taken from products."""
    return SHARE if precision == "fp32" else COARSE_SHARE


def norms(x: Tensor) -> Tensor:
    """|x|^2 a row, [N], in the row dtype."""
    return x.to(accumulate_dtype(x.dtype)).square().sum(dim=1, dtype=row_dtype(x.device))


def lowered(p: PairInputs) -> PairInputs:
    """The call as kernels multiply it; `apart` stays, to tell them. Without apart p itself."""
    if not p.apart:
        return p
    narrow = accumulate_dtype(p.x.dtype)
    scale = p.scale.to(p.x.device)
    x_bias = (-scale * norms(p.x)).to(narrow)
    y_bias = None if p.triangle else x_bias if p.y is p.x else (-scale * norms(p.y)).to(narrow)
    return p._replace(scale=2 * p.scale, x_bias=x_bias, y_bias=y_bias)


def lowered_needs(p: PairInputs, needs: PairNeeds) -> PairNeeds:
    """What `raised` takes of the lowered call."""
    if not p.apart:
        return needs
    return needs._replace(
        x_bias=needs.x or needs.scale, y_bias=(needs.y or needs.scale) and not p.triangle
    )


def raised(dscale: Tensor, da: Tensor, db: Tensor | None, p: PairInputs) -> Tensor:
    """The gradient of scale from that of 2 scale and those of the biases; p: either call."""
    found = 2 * dscale - (da.to(row_dtype(da.device)) * norms(p.x)).sum()
    if db is not None:
        found = found - (db.to(row_dtype(db.device)) * norms(p.y)).sum()
    return found.to(dscale.dtype)

"""Distances of transformed rows, of near pairs from the rows' differences.

A factor that multiplies rows before they are subtracted leaves a rounding of the products' own
size, whatever is left of them. Here it multiplies the differences of the pairs that are near.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import plans
from fused_losses.base.blocks import runs
from fused_losses.base.numerics import power_of_two, recomputed
from fused_losses.base.products import product
from fused_losses.primitives.distances import reference as reference_distances
from fused_losses.primitives.opaque import OpaqueOp

# of the sum of both rows' lengths: above it their roundings are a few of the distance's own
NEAR = 1 / 4
BLOCK_BYTES = 4 << 20  # of differences


def from_differences(
    found: Tensor,  # [..., N, M]
    x: Tensor,  # [..., N, D]
    y: Tensor,  # [..., M, D]; x itself where there is one set of rows
    factor: Tensor,  # [D], or [D, D] that rows are multiplied by from the right
    kind: str,
    p: float = 2.0,
) -> Tensor:
    """found, the distances of x and y times the factor, with near pairs those of (x - y) factor.

    kind: euclidean, sqeuclidean, cityblock or minkowski with p. Differentiable as found is. How
    many pairs are near is read on the host; time O(N M + K D) for K of them, K D^2 for a matrix.
    Memory O(N M) and a block.
    """
    if plans.explaining():
        # every pair may be near: its place and value; rows that lengths are taken of
        rows = x.numel() + y.numel()
        plans.needs(32 * found.numel() + 4 * rows * found.element_size() + 3 * BLOCK_BYTES)
        return found
    if 0 in found.shape:
        return found
    return FROM_DIFFERENCES(found, x, y, factor, kind, p, y is x)


def _times(rows: Tensor, factor: Tensor) -> Tensor:
    if factor.dim() == 1:
        return rows * factor.to(rows.dtype)
    return product(rows.to(factor.dtype), factor.mT).to(rows.dtype)


def _norms(rows: Tensor, kind: str, p: float) -> Tensor:
    """Distances from 0. [..., D] -> [...]"""
    origin = rows.new_zeros(1, rows.shape[-1])
    return reference_distances.distance(kind, rows.unsqueeze(-2), origin, None, p)[..., 0, 0]


def _lengths(rows: Tensor, kind: str, p: float) -> Tensor:
    """Distances from 0, however small or large; not squared. [..., N, D] -> [..., N]"""
    by = power_of_two(rows)
    rooted = "euclidean" if kind == "sqeuclidean" else kind
    return _norms(rows * by, rooted, p) / by[..., 0]


def _near(
    found: Tensor, x: Tensor, y: Tensor, factor: Tensor, kind: str, p: float, own: bool
) -> Tensor:
    with torch.no_grad():
        of_x = _lengths(_times(x, factor), kind, p)
        of_y = of_x if own else _lengths(_times(y, factor), kind, p)
        distance = found.sqrt() if kind == "sqeuclidean" else found
        near = distance < NEAR * (of_x.unsqueeze(-1) + of_y.unsqueeze(-2))
        if own:  # a row is at 0 from itself
            near.diagonal(dim1=-2, dim2=-1).fill_(False)
        return near


def _listed(x: Tensor, y: Tensor, factor: Tensor, kind: str, p: float, *place: Tensor) -> Tensor:
    """The distances of listed pairs. [K]"""
    lead, i, j = place[:-2], place[-2], place[-1]
    apart = x[(*lead, i)] - y[(*lead, j)]
    # squares of what is very short or long leave the range
    by = power_of_two(apart)
    found = _norms(_times(apart * by, factor), kind, p) / by[..., 0]
    return found / by[..., 0] if kind == "sqeuclidean" else found


def _run(
    found: Tensor, x: Tensor, y: Tensor, factor: Tensor, kind: str, p: float, own: bool
) -> Tensor:
    place = _near(found, x, y, factor, kind, p, own).nonzero(as_tuple=True)
    if not len(place[0]):
        return found
    lead = found.shape[:-2]
    x, y = (t.expand(*lead, *t.shape[-2:]) for t in (x, y))
    step = max(1, BLOCK_BYTES // (x.shape[-1] * x.element_size()))
    values = [
        recomputed(_listed, x, y, factor, kind, p, *(at[run] for at in place))
        for run in runs(len(place[0]), step)
    ]
    return found.index_put(place, torch.cat(values))


FROM_DIFFERENCES = OpaqueOp(
    "distances_from_differences",
    "(Tensor found, Tensor x, Tensor y, Tensor factor, str kind, float p, bool own)",
    _run,
    lambda found, *_: torch.empty_like(found),
)

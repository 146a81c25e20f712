"""One batch or two sides to mine, checked, and its distances by blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.base.sides import ref_sides
from fused_losses.base.unit_norm import wide_unit
from fused_losses.base.validation import check_number
from fused_losses.pairwise.distance import check_exponent
from fused_losses.primitives.distances.op import distance_matrix

LARGEST_IS_NEAREST = ("dot", "cosine")

SMALLEST_IS_NEAREST = (
    "euclidean",
    "sqeuclidean",
    "cityblock",
    "chebyshev",
    "minkowski",
    "canberra",
    "braycurtis",
)

BLOCK_BYTES = 2 << 20  # of distances in a block
MINED_BLOCKS = 12  # alive at once


class MiningBatch(NamedTuple):
    """One call, checked. z = sign * distance: smaller is nearer, whatever the metric."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    x_labels: Tensor  # [N] int32
    y_labels: Tensor  # [M] int32
    x_ids: Tensor | None  # [N] int32
    y_ids: Tensor | None  # [M] int32
    own: bool  # y is x
    kind: str  # of the distance matrix
    sign: int
    p: float
    precision: str
    backend: str | None

    @property
    def mirrored(self) -> bool:
        """Whether i sees j where j sees i."""
        return self.x_labels is self.y_labels and self.x_ids is self.y_ids


def checked_batch(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    metric: str,
    p: float,
    normalize: bool,
    precision: str,
    backend: str | None,
) -> MiningBatch:
    validation.check_choice("metric", metric, (*SMALLEST_IS_NEAREST, *LARGEST_IS_NEAREST))
    check_number("p", p)
    check_exponent(metric, p)
    if not 0 < p < math.inf:
        raise ValueError(f"p: expected a finite value > 0, got {p}")
    both = ref_sides(embeddings, labels, ref_embeddings, ref_labels, precision, (ids, ref_ids))
    own = both.alone
    with torch.no_grad():
        x, y = both.x.detach(), both.y.detach()
        if normalize or metric == "cosine":
            # unit rows rounded to a narrow type would be mined by other cosines
            x = wide_unit(x)
            y = x if own else wide_unit(y)
        elif own:
            y = x
    kind = "dot" if metric == "cosine" else metric
    sign = -1 if metric in LARGEST_IS_NEAREST else 1
    return MiningBatch(
        *(x, y, *both.labels, *both.numbers[2:4], own, kind, sign),
        *(float(p), precision, backend),
    )


def widened(batch: MiningBatch) -> MiningBatch:
    """The same in the accumulation dtype."""
    x = batch.x.to(accumulate_dtype(batch.x.dtype))
    return batch._replace(x=x, y=x if batch.own else batch.y.to(x.dtype))


class MiningBlock(NamedTuple):
    """Some rows against every column."""

    start: int
    distance: Tensor  # [B, M], the metric's own
    z: Tensor  # [B, M] sign * distance, finite where a pair takes part
    positive: Tensor  # [B, M] bool
    negative: Tensor  # [B, M] bool


def matrix(batch: MiningBatch, rows: Tensor) -> Tensor:
    return distance_matrix(
        *(rows, batch.y),
        kind=batch.kind,
        p=batch.p,
        precision=batch.precision,
        backend=batch.backend,
    )


def rows_at_once(batch: MiningBatch) -> int:
    size = accumulate_dtype(batch.x.dtype).itemsize
    return max(1, BLOCK_BYTES // (size * max(1, batch.y.shape[0])))


def blocks(batch: MiningBatch) -> Iterator[MiningBlock]:
    n, m = batch.x.shape[0], batch.y.shape[0]
    step = rows_at_once(batch)
    if plans.explaining():
        plans.needs(MINED_BLOCKS * matrix(batch, batch.x[:step]).nbytes + 64 * (n + m))
        return
    columns = torch.arange(m, device=batch.x.device)
    for start in range(0, n if m else 0, step):
        rows = slice(start, min(start + step, n))
        distance = matrix(batch, batch.x[rows])
        same = batch.x_labels[rows, None] == batch.y_labels
        taken = ~distance.isnan()
        if batch.own:
            taken &= columns != torch.arange(start, rows.stop, device=columns.device)[:, None]
        if batch.x_ids is not None:
            taken &= batch.x_ids[rows, None] != batch.y_ids
        # finite, for infinity stands for pairs that do not take part
        top = torch.finfo(distance.dtype).max
        z = (batch.sign * distance).clamp(-top, top)
        yield MiningBlock(start, distance, z, same & taken, ~same & taken)


def within(block: MiningBlock, mask: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    if bounds is None:
        return mask
    return mask & (block.distance >= bounds[0]) & (block.distance <= bounds[1])


def extreme(z: Tensor, mask: Tensor, *, farthest: bool) -> tuple[Tensor, Tensor]:
    """The first column with the largest or smallest z of the mask [B], and whether there is one."""
    if farthest:
        return torch.where(mask, z, -torch.inf).argmax(dim=1), mask.any(dim=1)
    return torch.where(mask, z, torch.inf).argmin(dim=1), mask.any(dim=1)


def ranked(z: Tensor, mask: Tensor, which: str, k: int, *, farthest: bool) -> Tensor:
    """The k columns of the mask with the largest or smallest z, as a mask; the lowest of equals."""
    if which == "all":
        return mask
    if k == 1:
        index, some = extreme(z, mask, farthest=farthest)
        return torch.zeros_like(mask).scatter(1, index[:, None], some[:, None])
    key = torch.where(mask, -z if farthest else z, torch.inf)
    order = key.sort(dim=1, stable=True).indices[:, :k]
    return torch.zeros_like(mask).scatter(1, order, mask.gather(1, order))

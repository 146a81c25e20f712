"""Mined triplets and pairs as lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import plans
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.mining.batch import MiningBatch, MiningBlock, blocks


class _TripletFields(NamedTuple):
    anchor: Tensor  # [T] int64, rows of embeddings
    positive: Tensor  # [T] int64, rows of ref_embeddings
    negative: Tensor  # [T] int64
    positive_distance: Tensor  # [T]
    negative_distance: Tensor  # [T]


class Triplets(_TripletFields):
    """Indices int64 [T] and distances [T] of (anchor, positive, negative).

    In the order of the anchors, then the positives, then the negatives. Distances (similarities
    with a similarity) in float32, or float64 for float64 embeddings.
    left_out: how many anchors have no triplet here.
    """

    left_out: int = 0


class _PairFields(NamedTuple):
    anchor: Tensor  # [P] int64, rows of embeddings
    positive: Tensor  # [P] int64, rows of ref_embeddings
    negative_anchor: Tensor  # [Q] int64
    negative: Tensor  # [Q] int64
    positive_distance: Tensor  # [P]
    negative_distance: Tensor  # [Q]


class Pairs(_PairFields):
    """Positive pairs (anchor, positive) [P] and negative pairs (negative_anchor, negative) [Q].

    int64, either list in the order of its anchors, then of the other index; distances as in
    `Triplets`. left_out: how many anchors are in neither list.
    """

    left_out: int = 0


Keep = Callable[[Tensor], Tensor]  # g = d(a, n) - d(a, p) -> bool

Lines = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # the fields of Triplets


def lines(block: MiningBlock, i: Tensor, p: Tensor, n: Tensor) -> Lines:
    return (i + block.start, p, n, block.distance[i, p], block.distance[i, n])


def slices(block: MiningBlock, pairs: int) -> Iterator[slice]:
    """Runs of pairs that against every column take no more than the block does."""
    step = max(1, block.z.shape[0])
    for at in range(0, pairs, step):
        yield slice(at, min(at + step, pairs))


def every(
    block: MiningBlock, same: Tensor, different: Tensor, keep: Keep | None
) -> Iterator[Lines]:
    """Each positive with each negative."""
    i, p = same.nonzero(as_tuple=True)
    for run in slices(block, len(i)):
        rows, near = i[run], block.z[i[run], p[run]]
        kept = different[rows]
        if keep is not None:
            kept &= keep(block.z[rows] - near[:, None])
        pair, n = kept.nonzero(as_tuple=True)
        yield lines(block, rows[pair], p[run][pair], n)


def places(sorted_rows: Tensor, i: Tensor, values: Tensor, *, right: bool = False) -> Tensor:
    """searchsorted of values [K] in the rows i [K] (increasing) of sorted_rows [B, M]. [K]"""
    # side by side in their rows: no copy of a row for each value
    count = i.bincount(minlength=sorted_rows.shape[0])
    column = torch.arange(len(i), device=i.device) - (count.cumsum(0) - count)[i]
    sought = values.new_zeros((len(count), int(count.max()) if len(i) else 0))
    sought[i, column] = values
    return torch.searchsorted(sorted_rows, sought, right=right)[i, column]


def gathered_triplets(batch: MiningBatch, lines: Iterable[Lines]) -> Triplets:
    table = _GrowingColumns(batch, indices=3, distances=2)
    for line in lines:
        table.add(line)
    out = Triplets(*table.columns())
    if not plans.explaining():
        out.left_out = batch.x.shape[0] - len(out.anchor.unique_consecutive())
    return out


class _GrowingColumns:
    """Columns that grow in place: small tensors kept from every block would break up the heap."""

    def __init__(self, batch: MiningBatch, *, indices: int, distances: int) -> None:
        rows, device = batch.x.shape[0], batch.x.device
        dtypes = [torch.int64] * indices + [accumulate_dtype(batch.x.dtype)] * distances
        self.held = [torch.empty(rows, dtype=dtype, device=device) for dtype in dtypes]
        self.rows = 0

    def add(self, columns: tuple[Tensor, ...]) -> None:
        end = self.rows + len(columns[0])
        room = len(self.held[0])
        for k, fresh in enumerate(columns):
            if end > room:
                wide = self.held[k].new_empty(max(end, 2 * room))
                wide[: self.rows] = self.held[k][: self.rows]
                self.held[k] = wide
            self.held[k][self.rows : end] = fresh
        self.rows = end

    def columns(self) -> list[Tensor]:
        # a copy, where the room left is more than what is filled
        return [
            h[: self.rows] if len(h) <= 2 * self.rows else h[: self.rows].clone() for h in self.held
        ]


def gathered_pairs(
    batch: MiningBatch, choose: Callable[[MiningBlock], tuple[Tensor, Tensor]]
) -> Pairs:
    """choose: the pairs of a block that are taken, positive and negative, as masks."""
    tables = [_GrowingColumns(batch, indices=2, distances=1) for _ in range(2)]
    for block in blocks(batch):
        for table, taken in zip(tables, choose(block), strict=True):
            i, j = taken.nonzero(as_tuple=True)
            table.add((i + block.start, j, block.distance[i, j]))
    (a, p, near), (b, n, far) = (table.columns() for table in tables)
    out = Pairs(a, p, b, n, near, far)
    if plans.explaining():
        return out
    seen = torch.zeros(batch.x.shape[0], dtype=torch.bool, device=batch.x.device)
    seen[a] = True
    seen[b] = True
    out.left_out = len(seen) - int(seen.sum())
    return out


def as_pairs(triplets: Triplets) -> Pairs:
    a, p, n, near, far = triplets
    out = Pairs(a, p, a, n, near, far)
    out.left_out = triplets.left_out
    return out

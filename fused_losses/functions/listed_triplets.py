"""Triplets that are listed: by a miner, by chance, or one positive pair after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import backends
from fused_losses.base import plans
from fused_losses.base.indices import ListedPairs, PairList
from fused_losses.base.numerics import (
    accumulate_dtype,
    recomputed,
    root,
    row_dtype,
    softplus,
)
from fused_losses.primitives.distances.op import distance_matrix
from fused_losses.primitives.listed.op import listed_scores
from fused_losses.primitives.opaque import OpaqueOp
from fused_losses.primitives.row_rules.inputs import ROW_SCORES, TRIPLETS, RowInputs

LINES = 1 << 16  # triplets at once
BLOCK_BYTES = 2 << 20  # of distances in a block


def pair_distances(inputs: RowInputs, pairs: PairList, backend: str | None) -> Tensor:
    """The scores of listed pairs [P], NaN where a row has an entry that is not finite."""
    kind, sign = ROW_SCORES[inputs.score]
    options: dict[str, Any] = dict(apart=kind != "dot", precision=inputs.precision, backend=backend)
    found = listed_scores(inputs.x, inputs.y, pairs, **options)
    return sign * (root(found) if kind == "euclidean" else found)


def listed_triplets(
    inputs: RowInputs,
    listed: ListedPairs,
    margin: float,
    triplets: str,
    smooth: bool,
    swap: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Of each row the sum of its triplets' losses and how many are not 0, [N] each.

    Where the list is aligned a line is a triplet; else each positive of a row meets each of its
    negatives.
    """
    near, far = (pair_distances(inputs, side, backend) for side in listed[:2])
    kept = [_kept(side) for side in listed[:2]]
    pairs = [t for side in listed[:2] for t in side[:2]]
    options = (listed.aligned, margin, TRIPLETS.index(triplets), smooth, swap, inputs.score)
    found = _LISTED(
        *(near, far, inputs.y, *pairs, *kept, inputs.x.shape[0], *options, inputs.precision),
        backends.requested(backend),
    )
    total, count = found.unbind(dim=0)
    return total, count


def _kept(pairs: PairList) -> Tensor:
    return torch.ones_like(pairs.rows, dtype=torch.bool) if pairs.kept is None else pairs.kept


def _lines(a: Tensor, b: Tensor, aligned: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs of the triplets as lines of the positives and of the negatives."""
    if aligned:
        yield from ((t, t) for t in torch.arange(a.shape[0], device=a.device).split(LINES))
        return
    if plans.explaining():
        # all runs are alike: two tell of all
        some = torch.zeros(LINES, dtype=torch.int64, device=a.device)
        yield from ((some, some),) * 2
        return
    b, order = b.sort(stable=True)
    first = torch.searchsorted(b, a)
    size = torch.searchsorted(b, a, right=True) - first
    ends = size.cumsum(dim=0)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, LINES):
        t = torch.arange(start, min(start + LINES, total), device=a.device)
        k = torch.searchsorted(ends, t, right=True)
        yield k, order[first[k] + t - (ends[k] - size[k])]


def _listed(
    near: Tensor,
    far: Tensor,
    y: Tensor,
    a: Tensor,
    p: Tensor,
    b: Tensor,
    n: Tensor,
    near_kept: Tensor,
    far_kept: Tensor,
    rows: int,
    aligned: bool,
    margin: float,
    kind: int,
    smooth: bool,
    swap: bool,
    score: str,
    precision: str,
    backend: str,
) -> Tensor:
    """Sums and counts of each row, [2, N]."""
    # a zero that knows all, for a list without triplets
    nothing = (near.sum() + far.sum() + (y.sum() if swap else 0)) * 0
    out = nothing.to(row_dtype(near.device)).expand(2, rows)
    inputs = RowInputs(y, y, a, a, score=score, precision=precision)

    def run(near: Tensor, far: Tensor, y: Tensor, k: Tensor, j: Tensor) -> Tensor:
        beyond = far.index_select(0, j)
        if swap:
            pairs = PairList(p[k], n[j])
            beyond = torch.minimum(
                beyond, pair_distances(inputs._replace(x=y, y=y), pairs, backend)
            )
        gap = near.index_select(0, k) - beyond
        taking = near_kept[k] & far_kept[j]
        return each_triplet(gap, taking, margin, kind, smooth)

    for k, j in _lines(a, b, aligned):
        out = out.index_add(1, a[k], recomputed(run, near, far, y, k, j))
    return out


_LISTED = OpaqueOp(
    "listed_triplets",
    "(Tensor near, Tensor far, Tensor y, Tensor a, Tensor p, Tensor b, Tensor n, "
    "Tensor near_kept, Tensor far_kept, SymInt rows, bool aligned, float margin, int kind, "
    "bool smooth, bool swap, str score, str precision, str backend)",
    _listed,
    lambda near, *rest: near.new_empty((2, rest[8]), dtype=row_dtype(near.device)),
)


def each_triplet(gap: Tensor, taking: Tensor, margin: float, kind: int, smooth: bool) -> Tensor:
    """Losses of triplets by d_ap - d_an, and which are not 0 by formula. [2, ...]"""
    # written so that a NaN takes part
    chosen = {
        "all": taking,
        "hard": taking & ~(gap < 0),
        "semihard": taking & ~((gap >= 0) | (gap < -margin)),
        "easy": taking & ~(gap >= -margin),
    }[TRIPLETS[kind]]
    violation = torch.where(chosen, gap + margin, 0)
    loss = softplus(violation) if smooth else F.relu(violation)
    loss = torch.where(chosen, loss, 0).to(row_dtype(gap.device))
    counted = chosen if smooth else chosen & (loss > 0)
    return torch.stack([loss, counted.to(loss.dtype)])


# ---- swap: of all triplets, one run of positive pairs against every column after another --------


def swapped_triplets(
    inputs: RowInputs, margin: float, triplets: str, smooth: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """As `listed_triplets` over all triplets, with min(d_an, d_pn) in the place of d_an."""
    options = (margin, TRIPLETS.index(triplets), smooth, inputs.score, inputs.skip_self)
    given = (inputs.x, inputs.y, inputs.x_labels, inputs.y_labels)
    found = _SWAPPED(*given, *options, inputs.precision, backends.requested(backend))
    total, count = found.unbind(dim=0)
    return total, count


def _positive_pairs(p: RowInputs) -> Iterator[tuple[Tensor, Tensor]]:
    """The positive pairs, by runs of rows."""
    step = max(1, BLOCK_BYTES // max(1, p.y.shape[0]))
    if plans.explaining():
        # every run is as large as the first of the largest
        some = torch.zeros(2 * step, dtype=torch.int64, device=p.y.device)
        yield some, some
        return
    columns = torch.arange(p.y.shape[0], device=p.y.device)
    for start in range(0, p.x.shape[0], step):
        same = p.x_labels[start : start + step, None] == p.y_labels
        if p.skip_self:
            own = torch.arange(start, start + same.shape[0], device=columns.device)
            same &= own[:, None] != columns
        i, j = same.nonzero(as_tuple=True)
        yield i + start, j


def _swapped(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    margin: float,
    kind: int,
    smooth: bool,
    score: str,
    skip_self: bool,
    precision: str,
    backend: str,
) -> Tensor:
    """Sums and counts of each row, [2, N]."""
    out = ((x.sum() + y.sum()) * 0).to(row_dtype(x.device)).expand(2, x.shape[0])
    inputs = RowInputs(x, y, x_labels, y_labels, score=score, skip_self=skip_self)
    distances, sign = ROW_SCORES[score]
    wide = accumulate_dtype(x.dtype)

    def run(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
        y = y.to(wide)
        anchors, positives = x.index_select(0, i).to(wide), y.index_select(0, j)
        options: dict[str, Any] = dict(kind=distances, precision=precision, backend=backend)
        an, pn = (sign * distance_matrix(rows, y, **options) for rows in (anchors, positives))
        gap = an.gather(1, j[:, None]) - torch.minimum(an, pn)
        gap = gap.masked_fill(gap.isinf(), torch.nan)
        negative = x_labels[i][:, None] != y_labels
        return each_triplet(gap, negative, margin, kind, smooth).sum(dim=2)

    step = max(1, BLOCK_BYTES // (wide.itemsize * max(1, y.shape[0])))
    for rows, columns in _positive_pairs(inputs):
        for i, j in zip(rows.split(step), columns.split(step), strict=True):
            if len(i):
                out = out.index_add(1, i, recomputed(run, x, y, i, j))
    return out


_SWAPPED = OpaqueOp(
    "swapped_triplets",
    "(Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, float margin, int kind, bool smooth, "
    "str score, bool skip_self, str precision, str backend)",
    _swapped,
    lambda x, *_: x.new_empty((2, x.shape[0]), dtype=row_dtype(x.device)),
)


# ---- chance: some triplets of each row ----------------------------------------------------------


def drawn_triplets(
    labels: tuple[Tensor, Tensor],  # [N], [M] int32
    own: bool,
    per_row: int,
    generator: torch.Generator | None,
) -> ListedPairs:
    """per_row triplets of each row, its positive and negative drawn evenly, again and again.

    A row without either has lines that are not kept: no size depends on values.
    """
    x_labels, y_labels = labels
    n, m = x_labels.shape[0], y_labels.shape[0]
    device = x_labels.device
    ordered, order = y_labels.sort(stable=True)
    first = torch.searchsorted(ordered, x_labels)
    same = torch.searchsorted(ordered, x_labels, right=True) - first
    drawn_on = "cpu" if generator is None else generator.device
    draws = torch.rand(2, n, per_row, dtype=torch.float64, generator=generator, device=drawn_on)
    draws = draws.to(device, row_dtype(device))
    count = (same - int(own))[:, None]
    others = (m - same)[:, None]
    p, q = ((u * c).long().minimum(c - 1) for u, c in zip(draws, (count, others), strict=True))
    p, first, same = p + first[:, None], first[:, None], same[:, None]
    if own:
        # the row itself is passed over
        place = torch.empty_like(order).scatter(0, order, torch.arange(m, device=device))
        p = p + (p >= place[:, None]).long()
    q = q + torch.where(q >= first, same, 0)
    kept = ((count > 0) & (others > 0)).expand(n, per_row).flatten()
    a = torch.arange(n, device=device).repeat_interleave(per_row)

    def column(at: Tensor) -> Tensor:
        at = at.flatten().clamp(0, max(m - 1, 0))
        return order[at] if m else torch.zeros_like(a)

    return ListedPairs(PairList(a, column(p), kept), PairList(a, column(q), kept), True)


def listed_example(n: int, device: torch.device, m: int | None = None) -> tuple[Tensor, ...]:
    """Triplets for the examples: row i, column i + 1 and column i + 2, around."""
    i, m = torch.arange(n, device=device), max(n if m is None else m, 1)
    return i, (i + 1) % m, (i + 2) % m

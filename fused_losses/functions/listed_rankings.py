"""What the losses on the order of a row's distances take of a miner's result."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.indices import ListedPairs, PairList, checked_indices
from fused_losses.base.numerics import against, row_dtype
from fused_losses.functions.listed_triplets import pair_distances
from fused_losses.primitives.row_rules.inputs import RowBlock, RowInputs
from fused_losses.primitives.row_rules.rules import ACOS_EDGE, ROW_FOLDS


def listed_tuplets(
    inputs: RowInputs, listed: ListedPairs, margin: float, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Of each row the sum over its listed positives, and how many these are; as rule "tuplet"."""
    near, far = (pair_distances(inputs, side, backend) for side in listed[:2])
    n, wide = inputs.x.shape[0], row_dtype(near.device)
    nothing = near.new_zeros(n, dtype=wide)
    z, rows = (scale * far).to(wide), listed.negative.rows
    best = torch.full_like(nothing, -torch.inf).scatter_reduce(0, rows, z.detach(), "amax")
    shift = torch.where(best.isinf(), 0, best)
    mass = nothing.index_add(0, rows, (z - shift[rows]).exp())
    some = best != -torch.inf
    lse = torch.where(some, torch.where(some, mass, 1).log() + shift, -torch.inf)
    cosine = near.to(wide).clamp(-1 + ACOS_EDGE, 1 - ACOS_EDGE)
    turned = math.cos(margin) * cosine + math.sin(margin) * (1 - cosine.square()).sqrt()
    rows = listed.positive.rows
    each = against(scale * turned, lse.index_select(0, rows))
    return nothing.index_add(0, rows, each), nothing.index_add(0, rows, torch.ones_like(each))


def listed_histograms(
    inputs: RowInputs, listed: ListedPairs, alone: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both histograms [2 bins] of rule "histogram", and how many pairs are in either.

    A pair counts once, where the batch meets itself from either end, and only those of a row that
    has pairs of both classes.
    """
    both = [_has(side.rows, inputs.x.shape[0]) for side in listed[:2]]
    taking, sums, counts = both[0] & both[1], [], []
    for kind, pairs in enumerate(listed[:2]):
        kept = _once(pairs, taking, inputs.y.shape[0], alone)
        score = pair_distances(inputs, pairs, backend)[None]
        kept, other = kept[None], torch.zeros_like(kept)[None]
        masks = (kept, other) if kind == 0 else (other, kept)
        block = RowBlock(score, *masks, None, list(inputs.params))
        sums.append(ROW_FOLDS["histogram"].formula(block)[0])
        counts.append(kept.sum())
    return sums[0] + sums[1], counts[0], counts[1]


def _has(rows: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.bool, device=rows.device).index_fill(0, rows, True)


def _once(pairs: PairList, taking: Tensor, m: int, unordered: bool) -> Tensor:
    """Which lines are the first of a pair, among the rows that take part. [P] bool"""
    i, j = pairs[:2]
    low, high = (torch.minimum(i, j), torch.maximum(i, j)) if unordered else (i, j)
    key, order = torch.where(taking[i], low * m + high, -1).sort(stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    return torch.empty_like(first).scatter(0, order, first & (key >= 0))


def miner_weights(indices: Any, n: int, m: int, like: Tensor, alone: bool) -> Tensor:
    """How often each row is listed over how often the one that is most, [N]; of no list 1.

    Where the batch meets itself as anchor, positive or negative; else as an anchor.
    """
    given = checked_indices(indices, n, m, like)
    if not alone:
        given = given[:1] if len(given) == 3 else given[::2]
    rows = torch.cat(given)
    weight = torch.ones(n, dtype=row_dtype(like.device), device=like.device)
    if not len(rows):
        return weight
    times = torch.zeros_like(weight).index_add(0, rows, torch.ones_like(rows, dtype=weight.dtype))
    return times / times.amax()

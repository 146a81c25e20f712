"""The batch's shared negatives by tiles, with exact quartiles by counting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import row_dtype
from fused_losses.primitives.shared_negatives.inputs import SharedInputs, whiskers

TILE_SIDE = 512  # rows and columns of a tile of pairs

GPU_TILE_SIDE = 2048

LIVE_BYTES = 96  # a pair of a tile at the peak (test_batch_negatives.py)

DIGIT = 16  # bits of a float that a sweep of the selection settles

BINS = 1 << DIGIT


def tile_side(device: torch.device) -> int:
    return GPU_TILE_SIDE if device.type == "cuda" else TILE_SIDE


def workspace(p: SharedInputs, backward: bool) -> int:
    """Bytes beyond inputs and outputs, at most."""
    side = min(tile_side(p.x.device), p.x.shape[0])
    counts = 0 if backward else 8 * BINS * 12
    return LIVE_BYTES * side * side + counts + (p.x.nbytes if backward else 0)


class PairTile(NamedTuple):
    rows: slice
    cols: slice
    cosine: Tensor  # [R, T]
    negative: Tensor  # [R, T] bool: a pair a < b of different labels


def _tiles(p: SharedInputs) -> Iterator[PairTile]:
    """The upper triangle, cut alike in every sweep: a pair's bits depend on its tile alone."""
    n = p.x.shape[0]
    side = tile_side(p.x.device)
    for i in range(0, n, side):
        for j in range(i, n, side):
            rows, cols = slice(i, min(i + side, n)), slice(j, min(j + side, n))
            negative = p.labels[rows, None] != p.labels[cols]
            negative &= p.valid[rows, None] & p.valid[cols]
            if i == j:
                negative = negative.triu(1)
            yield PairTile(rows, cols, p.x[rows] @ p.x[cols].T, negative)


def _keys(cosine: Tensor) -> Tensor:
    """Integers in the order of the floats: int32 of float32, int64 of float64."""
    kind = torch.int32 if cosine.dtype == torch.float32 else torch.int64
    return _mirrored(cosine.view(kind))


def _mirrored(bits: Tensor) -> Tensor:
    """Negative floats order backwards as integers; its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _histogram(p: SharedInputs, prefix: Tensor | None, shift: int) -> Tensor:
    """How many pairs have each value of the digit at `shift`, above it `prefix`. [P, BINS]"""
    parts = 1 if prefix is None else len(prefix)
    counts = torch.zeros(parts, BINS + 1, dtype=torch.int64, device=p.x.device)
    one = counts.new_ones(())
    for tile in _tiles(p):
        key = _keys(tile.cosine)
        digit = ((key >> shift) & (BINS - 1)).to(torch.int64)
        for i in range(parts):
            here = tile.negative
            if prefix is not None:
                here = here & ((key >> (shift + DIGIT)) == prefix[i])
            at = torch.where(here, digit, BINS).view(-1)
            counts[i].scatter_add_(0, at, one.expand_as(at))
    counts = counts[:, :BINS]
    # the topmost digit has the sign: negative values first
    return counts.roll(BINS // 2, 1) if prefix is None else counts


def _quartiles(p: SharedInputs) -> Tensor:
    """The pairs' c at [n / 4] and [3 n / 4] of their order, exact; any value without pairs. [2]"""
    bits = 8 * p.x.element_size()
    prefix, rank = None, None
    for shift in range(bits - DIGIT, -1, -DIGIT):
        below = _histogram(p, prefix, shift).cumsum(1)  # [P, BINS]
        if prefix is None:
            n = below[0, -1]
            rank = torch.stack([n // 4, 3 * n // 4])
            below = below.expand(2, -1).contiguous()
        assert rank is not None
        digit = torch.searchsorted(below, rank[:, None], right=True).clamp_max(BINS - 1)
        before = below.gather(1, (digit - 1).clamp_min(0))[:, 0]
        digit = digit[:, 0]
        rank = rank - torch.where(digit > 0, before, 0)
        prefix = digit - BINS // 2 if prefix is None else (prefix << DIGIT) | digit
    assert prefix is not None
    kind = torch.int32 if bits == 32 else torch.int64
    return _mirrored(prefix.to(kind)).view(p.x.dtype)


def _kept(tile: PairTile, low: Tensor, high: Tensor) -> Tensor:
    # written so that a NaN is kept
    return tile.negative & ~((tile.cosine < low) | (tile.cosine > high))


def forward(p: SharedInputs, scale: Tensor, whisker: float) -> tuple[Tensor, Tensor, Tensor]:
    low, high = whiskers(_quartiles(p), whisker)
    wide = row_dtype(p.x.device)
    lse = torch.full((), -torch.inf, dtype=wide, device=p.x.device)
    factor = scale.to(p.x.dtype)
    for tile in _tiles(p):
        z = (tile.cosine * factor).masked_fill(~_kept(tile, low, high), -torch.inf)
        lse = torch.logaddexp(lse, z.view(-1).logsumexp(0).to(wide))
    return lse, low.clone(), high.clone()


def backward(
    grad: Tensor, p: SharedInputs, scale: Tensor, lse: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dscale = torch.zeros_like(p.x), torch.zeros_like(scale)
    factor, safe = scale.to(p.x.dtype), torch.where(lse == -torch.inf, 0, lse).to(p.x.dtype)
    for tile in _tiles(p):
        share = (tile.cosine * factor - safe).exp_()
        share = torch.where(_kept(tile, low, high), share, 0)
        dx[tile.rows] += share @ p.x[tile.cols]
        dx[tile.cols] += share.T @ p.x[tile.rows]
        dscale += (share * tile.cosine).sum(dtype=scale.dtype)
    return dx * (grad * scale).to(dx.dtype), dscale * grad.to(scale.dtype)

"""Forward mode over pairs: what statistics move by, in one sweep of blocks of dual numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fused_losses.primitives.pairs.blocks import (
    ScoreBlock,
    both_sides,
    cuts,
    exact_pairs,
    shared_weights,
    weights_of,
)
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, VALUE, PairInputs


def statistics(
    p: PairInputs, rows: Tensor, columns: Tensor, reduction: str, cols: bool
) -> tuple[Tensor, Tensor]:
    """Tangents of rows and columns, the statistics of the dual p. [4, 2, N], [4, 2, M or 0]"""
    p = both_sides(p)
    # with triangle a pair counts in the rows of both its ends
    stats = (rows, rows if p.triangle else columns)
    found = [torch.zeros_like(s) for s in stats]
    for i, j in cuts(p):
        add_moves(ScoreBlock(p, i, j), found, stats, reduction, cols or p.triangle)
    if p.triangle:
        return found[0] + found[1], columns.new_zeros(columns.shape)
    return found[0], found[1]


def add_moves(
    block: ScoreBlock,
    found: Sequence[Tensor],
    stats: Sequence[Tensor],
    reduction: str,
    both: bool,
) -> None:
    """What a block of dual scores moves the statistics of rows and (both) columns by."""
    for dim, at, window in block.sides(both):
        out, of = found[1 - dim], stats[1 - dim]
        for kind in block.kinds():
            z, moved = _dual(block.term(kind)[0])
            moved = torch.where(block.members(kind, window), moved, 0)
            slope = _slope(z, of[VALUE, kind, at], dim, reduction)
            out[0, kind, at] += torch.where(moved == 0, 0, slope * moved).sum(dim).to(out)
            out[1, kind, at] += moved.sum(dim).to(out)


def _slope(z: Tensor, value: Tensor, dim: int, reduction: str) -> Tensor:
    """dvalue/dz of every pair of a block."""
    if reduction != "lse":
        return torch.sigmoid(z) if reduction == "softplus" else (z > 0).to(z.dtype)
    lse = torch.where(value == -torch.inf, 0, value).to(z.dtype)
    return weights_of(z, lse.unsqueeze(dim))


def _dual(z: Tensor) -> tuple[Tensor, Tensor]:
    """A dual number's two parts."""
    z, moved = forward_ad.unpack_dual(z)
    return z, torch.zeros_like(z) if moved is None else moved


def attention(
    values: Tensor, p: PairInputs, positives: bool, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Tangents of out and lse, the attention of the duals p and values."""
    kind = POSITIVE if positives else NEGATIVE
    values, of_values = _dual(values.to(out.dtype))
    safe = torch.where(lse == -torch.inf, 0, lse).to(out.dtype)
    exact = exact_pairs(p, kind, lse)
    to_out, to_lse = torch.zeros_like(out), torch.zeros_like(lse)
    for i, j in cuts(p):
        block = ScoreBlock(p, i, j)
        _, _, window = next(block.sides(False))
        z, moved = _dual(block.term(kind)[0])
        members = block.members(kind, window)
        some = None if exact is None else exact[i]
        z = torch.where(members, z, -torch.inf)
        weights = torch.where(members, shared_weights(z, safe[i, None], some), 0)
        moved = torch.where(members, weights * moved, 0)
        to_out[i] += moved @ values[j] + weights @ of_values[j]
        to_lse[i] += moved.sum(1).to(lse)
    return to_out - out * to_lse[:, None].to(out), to_lse

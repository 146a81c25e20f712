"""Forward mode over classes: what rows' statistics move by, in one sweep of dual tiles."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.row_statistics.bounded import targets, tiles
from fused_losses.primitives.row_statistics.inputs import Inputs


def statistics(p: Inputs, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of lse, target and weighted_sum, those of the dual p. [N] each"""
    x = p.x.to(accumulate_dtype(p.x.dtype))
    n = x.shape[0]
    to_lse = torch.zeros_like(lse)
    weighted = torch.zeros(n if p.weighted else 0, dtype=x.dtype, device=x.device)
    safe = torch.where(lse == -torch.inf, 0, lse)[:, None].to(x.dtype)
    for tile in tiles(p, x) if n else ():
        scores, moved = forward_ad.unpack_dual(tile.scores)
        moved = torch.zeros_like(scores) if moved is None else moved
        moved = moved.masked_fill(tile.is_target, 0)
        if p.weighted:
            v = 1 if p.column_weight is None else p.column_weight[tile.ids].to(x.dtype)
            weighted += (v * moved).sum(dim=1)
        share = (scores - safe).exp()
        to_lse += torch.where(moved == 0, 0, share * moved).sum(dim=1).to(lse)
    target = forward_ad.unpack_dual(targets(p.x, p.weight, p.labels, p.normalize)).tangent
    return to_lse, torch.zeros_like(lse) if target is None else target.to(lse), weighted

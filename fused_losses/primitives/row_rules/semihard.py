"""The rule of semi-hard negatives: the hinge of each positive against one negative, and how many.

params: margin, whether the farthest negative stands in where none is farther than the positive
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.primitives.row_rules.inputs import RowBlock


def _partners(b: RowBlock) -> tuple[Tensor, Tensor]:
    """Of each column the nearest negative farther than it [B, M], and which pairs have one."""
    score = b.score.detach().contiguous()
    values, order = score.masked_fill(~b.negative, torch.inf).sort(dim=1, stable=True)
    place = torch.searchsorted(values, score, right=True)
    count = b.negative.sum(dim=1, keepdim=True)
    found = b.positive & (count > 0)
    if not b.params[1]:
        # so written, a NaN takes part
        found = found & ~((place >= count) & ~score.isnan())
    at = torch.minimum(place, count - 1).clamp_min_(0)
    return order.gather(1, at), found


def _violations(b: RowBlock) -> tuple[Tensor, Tensor, Tensor]:
    """d_ap - d_an + margin of each positive, 0 elsewhere; its negative; which there are. [B, M]"""
    partner, found = _partners(b)
    gap = b.score - b.score.gather(1, partner) + b.params[0]
    return torch.where(found, gap, 0), partner, found


def _broken(b: RowBlock, found: Tensor) -> Tensor:
    """Which rows with triplets have a NaN among their pairs, [B, 1]."""
    bad = b.score.isnan() & (b.positive | b.negative)
    return found.any(dim=1, keepdim=True) & bad.any(dim=1, keepdim=True)


def semihard_formula(b: RowBlock) -> Tensor:
    violation, _, found = _violations(b)
    loss = F.relu(violation).sum(dim=1, dtype=b.wide)
    loss = torch.where(_broken(b, found)[:, 0], torch.nan, loss)
    return torch.stack([loss, found.sum(dim=1).to(b.wide)], dim=1)


def semihard_gradient(b: RowBlock, grad: Tensor) -> tuple[Tensor, None]:
    violation, partner, found = _violations(b)
    active = (violation > 0).to(violation.dtype)
    slope = active.scatter_add(1, partner, -active)
    broken = _broken(b, found) & (b.positive | b.negative)
    return slope.masked_fill_(broken, torch.nan).mul_(grad[:, :1]), None

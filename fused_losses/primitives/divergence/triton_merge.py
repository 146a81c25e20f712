"""Statistics of runs of classes [P, runs, N] merged into those of rows, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.numerics import exp_excess

AGREE = 0.5  # a KL below which the difference of both lse is told by it


def merged(part: Tensor, kind: str, lead: str) -> tuple[Tensor, Tensor, Tensor]:
    """lse, teacher_lse [N] and the folds [F, N] that the first sweep finds (`divergence_runs`)."""
    part = part.double()
    p_lse, p_share = _joined(part[0], part[1])
    q_lse, _ = _joined(part[2], part[3])
    if lead:
        value, mean = _divergence(part, p_share, p_lse)
        # nothing but the mean's own rounding is left of it; far apart each lse is the better
        near = value < AGREE
        q_lse = torch.where(near & q_lse.isfinite(), p_lse + (value - mean), q_lse)
        found = value[None]
    elif kind == "power":
        lse, share = _joined(part[4], part[5])
        found = torch.stack([lse, (share * part[6]).sum(0)])
    else:
        found = part[4].sum(0)[None]
    if lead == "student":
        return p_lse, q_lse, found
    return q_lse, p_lse, found


def summed(part: Tensor) -> Tensor:
    return part[:3].sum(1, dtype=torch.float64)


def _joined(top: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """log sum mass exp(top) over the runs [N], -inf of nothing, and each run's share of it."""
    high = top.amax(0)
    high = torch.where(high == -torch.inf, 0.0, high)
    mass = mass * (top - high).exp()
    total = mass.sum(0)
    return high + total.log(), mass / torch.where(total == 0, 1.0, total)


def _divergence(part: Tensor, share: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """KL and the mean of the difference; `triton_forward.lifted` says what is summed."""
    top, mass, q_top, _, middle, kept, _ = part
    mean = (share * middle).sum(0)
    t = mean - middle
    reach = torch.maximum(top, q_top + middle)
    high = torch.maximum(top.amax(0), q_top.amax(0) + mean)
    high = torch.where(high == -torch.inf, 0.0, high)
    near = t.abs() < 0.5
    base = (top - high).exp()
    apart = (top + t - high).exp() - base * (1 + t)
    moved = torch.where(near, base * exp_excess(torch.where(near, t, 0.0)), apart)
    excess = ((reach + t - high).exp() * kept + mass * moved).sum(0)
    # log(1 + excess / mass), where either may be far below the other
    ratio = high + excess.log() - torch.where(lse == -torch.inf, 0.0, lse)
    return torch.logaddexp(ratio, torch.zeros_like(ratio)), mean

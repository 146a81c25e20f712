"""Sums of a divergence over tiles of classes: what two sets of them join to, without cancellation.

Leading and other are the sides of a Kullback-Leibler divergence; a mean is a pair (`Mean`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import exp_excess, merged, over_last
from fused_losses.primitives.divergence.rules import Mean

# what a divergence has beyond it is told by both lse
FAR = 1e15


class GapSums(NamedTuple):
    """Of the leading softmax q and gaps d = leading score - other score, [N] each."""

    lse: Tensor  # of the leading scores
    mean: Mean  # sum q d
    excess: Tensor  # sum q (exp(r) - 1 - r) >= 0, r = mean - d
    far: Tensor  # bool: the excess is FAR or more, and tells nothing


def gap_of(lead: Tensor, other: Tensor, others: Tensor) -> GapSums:
    """Of a tile."""
    lse = over_last(lead, others)
    share = shares_of(lead, lse, others)
    mean, r = mean_under(share, torch.where(others, lead - other, 0))
    r = torch.where(others, mean.offset[:, None] - r, 0)
    near = r.abs() < 1
    # where r is long, its exponential as the other side's
    wide = (other + (mean.value - finite(lse)[:, 0])[:, None]).exp() - share * (1 + r)
    terms = torch.where(near, share * exp_excess(torch.where(near, r, 0)), wide)
    return GapSums(lse, mean, *_in_range(torch.where(others, terms, 0).sum(dim=1)))


def _in_range(excess: Tensor) -> tuple[Tensor, Tensor]:
    """An excess that tells something, and whether it does not."""
    far = excess >= FAR
    return torch.where(far, 0, excess), far


def mean_under(share: Tensor, values: Tensor) -> tuple[Mean, Tensor]:
    """The mean over a tile, and the values less its anchor. [N], [N, T]"""
    anchor = values.gather(1, share.argmax(dim=1, keepdim=True))
    apart = values - anchor
    return Mean(anchor[:, 0], (share * apart).sum(dim=1)), apart


def joined(a: GapSums, b: GapSums) -> GapSums:
    """Of two disjoint sets of classes, as variances are: each about the mean of both."""
    lse = merged(a.lse, b.lse)
    mass = [(part.lse - torch.where(lse == -torch.inf, 0, lse)).exp() for part in (a, b)]
    step = (b.mean.anchor - a.mean.anchor) + (b.mean.offset - a.mean.offset)
    excess = torch.zeros_like(step)
    for weight, part, move in zip(mass, (a, b), (mass[1] * step, -mass[0] * step), strict=True):
        move, near = torch.where(weight == 0, 0, move), move.abs() < 1
        close = torch.where(near, move, 0)
        close = weight * (close.exp() * part.excess + exp_excess(close))
        log_weight = part.lse - torch.where(lse == -torch.inf, 0, lse)
        wide = (log_weight + move).exp() * (1 + part.excess) - weight * (1 + move)
        excess = excess + torch.where(near, close, wide)
    excess, far = _in_range(excess)
    return GapSums(lse, a.mean.joined(mass[0], b.mean, mass[1]), excess, far | a.far | b.far)


def shares_of(scores: Tensor, lse: Tensor, others: Tensor) -> Tensor:
    """The softmax over a tile, [N, T]: of large scores lse is rounded, the shares' sum is not 1."""
    share = torch.where(others, (scores - finite(lse)).exp(), 0)
    return share / torch.where(lse == -torch.inf, 1, share.sum(dim=1))[:, None]


def finite(lse: Tensor) -> Tensor:
    """[N, 1]; a row without other classes has lse = -inf, and nothing to sum."""
    return torch.where(lse == -torch.inf, 0, lse)[:, None]


def leibler(gap: GapSums, lse: Tensor) -> Tensor:
    """KL of the leading softmax from the other, whose lse is given.

    KL = log(1 + excess), exact down to 0; where exponents would be too large it is what lse tells,
    to a few roundings of lse.
    """
    plain = gap.mean.value - torch.where(gap.lse == -torch.inf, 0, gap.lse - lse)
    return torch.where(gap.far, plain, torch.log1p(gap.excess))


def between_of(
    gap: GapSums, value: Tensor, lse: Tensor, teacher_lse: Tensor, lead: str
) -> tuple[Tensor, ...]:
    """lse - teacher_lse and the mean of u - v, pairs (`Mean`)."""
    of, turn = gap.mean, -1 if lead == "teacher" else 1
    # a divergence that is not small has no digits that both lse lack
    own = ~gap.far & (value < 1) & (of.offset.abs() < 1)
    plain = torch.where(lse == -torch.inf, 0, lse - teacher_lse)
    anchor, offset = turn * of.anchor, turn * of.offset
    rest = torch.where(own, offset - turn * value, 0)
    return torch.where(own, anchor, plain), rest, anchor, offset


def mean_of(lead: Tensor, values: Tensor, others: Tensor) -> GapSums:
    """The mean of values alone, for `joined`."""
    lse = over_last(lead, others)
    mean, _ = mean_under(shares_of(lead, lse, others), torch.where(others, values, 0))
    nothing = torch.zeros_like(lse)
    return GapSums(lse, mean, nothing, torch.zeros_like(nothing, dtype=torch.bool))

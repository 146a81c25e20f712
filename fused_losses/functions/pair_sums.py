"""A row's sums over its positives and its negatives, and the InfoNCE of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.compiled import helpers, offered
from fused_losses.base.numerics import SHORT, WIDE, merged, reduced, share_loss
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE


class Shares(NamedTuple):
    """Of each row (or column), -log of the positives' share, or of their mean's where given."""

    value: Tensor  # [2, N] lse of the positives' z, and of the negatives'
    others: Tensor  # [N] negatives
    total: Tensor | None = None  # [2, N] sums of z
    count: Tensor | None = None  # [N] positives

    def loss(self) -> tuple[Tensor, Tensor]:
        """The loss [N], and which rows have a positive."""
        loss, counted = share_loss(self.value, self.others)
        if self.total is not None and self.count is not None:
            mean = self.total[POSITIVE] / self.count.clamp_min(1)
            loss = loss + torch.where(counted, self.value[POSITIVE] - mean, 0)
        return loss, counted


def reduced_shares(
    rows: Shares,
    columns: Shares | None,  # without totals
    reduction: str,
    dtype: torch.dtype,
    *,
    everyone: bool = False,
) -> Tensor:
    """The mean (or sum) of the rows' losses, or the mean of that and the columns'.

    everyone: rows without a positive are in the mean, too.
    """
    compiled = offered() if reduction != "none" and dtype in WIDE else None
    if compiled is not None:
        how = reduction == "mean", everyone, dtype == torch.float64
        found = compiled.shares_reduced(rows, columns, *how, SHORT)
        if found is not None:
            return found

    def part(side: Shares) -> Tensor:
        loss, counted = side.loss()
        return reduced(loss, counted | everyone, reduction, dtype)

    return part(rows) if columns is None else (part(rows) + part(columns)) / 2


def mean_of_each(total: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean of the positives' terms and that of the negatives', added; [2, N] each."""
    compiled = helpers(total, count)
    wide = total.dtype == count.dtype and total.dtype in WIDE and dtype in WIDE
    if compiled is not None and wide and total.numel() <= SHORT:
        return compiled.mean_of_each(total, count, dtype == torch.float64)
    return (total.sum(dim=1) / count.sum(dim=1).clamp_min(1)).sum().to(dtype)


class PairSums(NamedTuple):
    """What InfoNCE knows of each row (or column), whatever segments its columns came in."""

    value: Tensor  # [2, N] lse of the positives' z, and of the negatives', with hardness (1 + b) z
    tilt: Tensor | None  # [N] with hardness: of beta z
    count: Tensor  # [N] negatives

    @classmethod
    def of(cls, statistics: Tensor) -> PairSums:
        """Of a rule's statistics [N, 4 or more]: lse and count of positives, then of negatives."""
        return cls(statistics[:, 0:4:2].T, None, statistics[:, 3].detach())

    @property
    def positive(self) -> Tensor:
        return self.value[POSITIVE]

    @property
    def negative(self) -> Tensor:
        return self.value[NEGATIVE]

    def with_positive(self, positive: Tensor) -> PairSums:
        """The same with other positives' sums [N]."""
        return self._replace(value=torch.stack([positive, self.negative]))

    def joined(self, other: PairSums) -> PairSums:
        return PairSums(
            merged(self.value, other.value),
            None if self.tilt is None or other.tilt is None else merged(self.tilt, other.tilt),
            self.count + other.count,
        )

    @property
    def shares(self) -> Shares:
        """Of sums without a tilt."""
        return Shares(self.value, self.count)

    def loss(self, decoupled: bool = False) -> tuple[Tensor, Tensor]:
        """The loss [N], and which rows have a positive; decoupled: of negatives alone below."""
        if self.tilt is None and not decoupled:
            return self.shares.loss()
        (positive, negative), any_negative = self.value, self.count > 0
        if self.tilt is not None:
            negative = torch.where(any_negative, self.count, 1).log() + negative - self.tilt
        if not decoupled:
            return share_loss(torch.stack([positive, negative]), self.count)
        # `!=` and not `>`: a NaN must show
        counted = positive != -torch.inf
        both = counted & (any_negative | positive.isnan())
        return torch.where(both, negative - positive, 0), counted

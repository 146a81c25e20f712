"""A row's sums over its positives and its negatives, and the InfoNCE of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import merged, share_loss
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE


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

    def loss(self, decoupled: bool = False) -> tuple[Tensor, Tensor]:
        """The loss [N], and which rows have a positive; decoupled: of negatives alone below."""
        if self.tilt is None and not decoupled:
            return share_loss(self.value, self.count)
        (positive, negative), any_negative = self.value, self.count > 0
        if self.tilt is not None:
            negative = torch.where(any_negative, self.count, 1).log() + negative - self.tilt
        if not decoupled:
            return share_loss(torch.stack([positive, negative]), self.count)
        # `!=` and not `>`: a NaN must show
        counted = positive != -torch.inf
        both = counted & (any_negative | positive.isnan())
        return torch.where(both, negative - positive, 0), counted

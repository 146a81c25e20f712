"""Losses of the differences between the other classes' scores and the label's.

One family (Zhu, Ying, Yang, "Label distributionally robust losses for multi-class classification",
2023): the largest difference, its soft form, their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.base.numerics import against
from fused_losses.base.parameters import check_above, check_parameter
from fused_losses.functions.class_values import (
    ClassLoss,
    MergedRows,
    check_floats,
    one_label,
)
from fused_losses.functions.probability_values import OfProbability


@dataclass(frozen=True)
class LDR(OfProbability):
    """lam log(1/C sum_j exp((z_j - z_y + threshold [j != y]) / lam)): LDR-KL on plain scores.

    Over the C classes that take part. lam > 0: towards 0 Crammer and Singer's, towards infinity the
    mean of the differences. threshold 0 and lam 1: cross entropy less log C. `MappedLDR` has the
    scores that the authors' code makes of z first.
    """

    threshold: float = 2.0
    lam: float = 1.0

    counts = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_floats(check_parameter, threshold=self.threshold)
        check_floats(check_above, lam=self.lam)
        if self.z_loss or self.softcap is not None:
            name = "z_loss" if self.z_loss else "softcap"
            raise ValueError(f"{name}: expected none of LDR, got {getattr(self, name)}")

    def params(self) -> list[float]:
        return [self.scale / self.lam]

    def _scaled(self, cosines: Tensor) -> Tensor:
        return self.scale / self.lam * cosines

    def of_labels(self, z: Tensor, rows: MergedRows) -> Tensor:
        return ldr(z, rows, self.threshold / self.lam, self.lam)


def ldr(z: Tensor, rows: MergedRows, threshold: float | Tensor, lam: float | Tensor) -> Tensor:
    """lam (log(e^z + e^{lse + threshold}) - z - log of how many classes), [N, L]; z [N, L]."""
    assert rows.negatives is not None  # counted
    lse = rows.statistics[0][:, None]
    return lam * (against(z, lse + threshold) - (rows.negatives[:, None] + 1).log())


@dataclass(frozen=True)
class _Hinged(ClassLoss):
    threshold: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_floats(check_parameter, threshold=self.threshold)
        check_floats(check_above, scale=self.scale)

    def params(self) -> list[float]:
        return [float(self.scale)]


@dataclass(frozen=True)
class CrammerSinger(_Hinged):
    """max(0, threshold + max_{j != y} z_j - z_y), z = scale <x, w> (Crammer, Singer, 2001).

    Mean over a row's labels; of equal best negatives the first has the gradient. A sweep without
    gradient finds it: backward is O(N D). Not in `ClassCenters`.
    """

    rule = "softmax"
    asks_hardest = True

    def row_loss(self, rows: MergedRows) -> Tensor:
        assert rows.hardest is not None  # asked for
        alone = (rows.hardest == -torch.inf)[:, None]
        hardest = torch.where(alone, 0, rows.hardest[:, None])
        above = self.threshold + self.scale * (hardest - rows.targets)
        # not clamp_min, which is deaf to NaN in some builds and has a slope at 0
        each = torch.where(alone | (above <= 0), 0, above)
        return torch.where(rows.present, each, 0).sum(1) / rows.present.sum(1).clamp_min(1)


@dataclass(frozen=True)
class WestonWatkins(_Hinged):
    """1/C sum_{j != y} max(0, threshold + z_j - z_y), z = scale <x, w> (Weston, Watkins, 1999).

    Over the C classes that take part, as the authors of LDR have it. One label a row.
    """

    rule = "hinge"
    counts = True
    by_targets = True

    def values(self, targets: Tensor, present: Tensor) -> Tensor:  # noqa: ARG002 (a hook)
        one_label(self, targets)
        return (self.threshold - self.scale * targets[:, 0])[None]

    def row_loss(self, rows: MergedRows) -> Tensor:
        assert rows.negatives is not None and rows.values is not None
        hinges, active = rows.statistics
        # worth 0: the gradient of the sum in the label's score is how many hinges are open
        moved = self.threshold - self.scale * rows.targets[:, 0] - rows.values[0]
        return (hinges + moved * active.detach()) / (rows.negatives + 1)

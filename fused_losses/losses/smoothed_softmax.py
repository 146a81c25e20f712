"""Label smoothing of a softmax whose scores are capped, or whose classes have several centres."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fused_losses.losses.class_values import MergedRows, Softmax, one_label


@dataclass(frozen=True)
class SmoothedSoftmax(Softmax):
    """(1 - smoothing) loss + smoothing / C sum_j (lse - z_j) over the C classes that take part."""

    smoothing: float = field(default=0.0, kw_only=True)

    counts = True

    @property
    def rule(self) -> str:
        return "summed_softmax" if self.softcap is None else "summed_capped"

    def of_labels(self, z: Tensor, rows: MergedRows) -> Tensor:
        one_label(self, rows.targets)
        assert rows.negatives is not None  # counted
        mean = (rows.statistics[1][:, None] + z) / (rows.negatives[:, None] + 1)
        return super().of_labels(z, rows) + self.smoothing * (z - mean)

"""Label smoothing of a softmax whose scores are capped, or whose classes have several centres."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fused_losses.functions.class_values import MergedRows, Softmax, one_label


def toward_uniform(
    loss: Tensor, z: Tensor, others: Tensor, classes: Tensor | int, smoothing: float
) -> Tensor:
    """(1 - smoothing) loss + smoothing (lse - mean z_j): loss = lse - z of the label's score z.

    others: the sum of the other scores of so many classes.
    """
    return loss + smoothing * (z - (others + z) / classes)


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
        loss, others = super().of_labels(z, rows), rows.statistics[1][:, None]
        return toward_uniform(loss, z, others, rows.negatives[:, None] + 1, self.smoothing)

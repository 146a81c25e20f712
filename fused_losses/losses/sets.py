"""Losses that take a batch's classes for sets, and a function of sets of each."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fused_losses.base.parameters import check_above, check_parameter
from fused_losses.functions.submodular import submodular
from fused_losses.losses.module import MetricLoss
from fused_losses.losses.registry import entry

_SMILE = entry(
    "Majee et al., SMILe: Leveraging Submodular Mutual Information for Few-Shot Object Detection",
    2024,
    block="pairs",
    primitive="pairs",
)


class SubmodularLoss(MetricLoss):
    """What the losses over sets share: `submodular` of a kind, s the cosine."""

    keeps = True
    kind: ClassVar[str]

    def __init__(
        self, temperature: float | Tensor = 0.2, weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(**options)
        if not isinstance(temperature, Tensor):
            check_above("temperature", temperature)
        check_parameter("weight", weight, 0)
        self.temperature, self.weight = temperature, weight

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own: dict[str, Any] = dict(temperature=self.temperature, weight=self.weight)
        return submodular(embeddings, labels, kind=self.kind, **own, **given)


@_SMILE
class GraphCutLoss(SubmodularLoss):
    """The cut between a row's class and the others, less what holds the class together.

        loss_i = sum_N e^((s - 1) / T) - weight sum_P e^((s - 1) / T)

    The authors' code subtracts the row's maximum, its own cosine 1. Args: temperature: T, 0.2, as
    there; a tensor may need a gradient. weight: their lambda. Time O(N^2 D / 2), memory O(N D).
    """

    kind = "graph_cut"


@_SMILE
class FacilityLocationLoss(SubmodularLoss):
    """How near the rows of other classes come: a smooth largest cosine.

        loss_i = log sum_N e^((s - 1) / T)

    Rows without a negative are not counted (the authors' code has -inf there). The maximum that is
    subtracted is the row's own cosine, 1, and stays subtracted, as there. weight has no say.
    Args: temperature: T, 0.2, as there. Time O(N^2 D / 2), memory O(N D).
    """

    kind = "facility_location"


@_SMILE
class FLMILoss(SubmodularLoss):
    """Facility location mutual information of a class and the others: what is near to both.

        loss_i = min(m_P, weight m_N),    m = T log sum e^(s / T)

    The paper's maxima are smooth, T -> 0 is the maximum. Rows with a positive and a negative count.
    Args: temperature: T, 0.2. weight: the paper's eta. Time O(N^2 D / 2), memory O(N D).
    """

    kind = "flmi"


@_SMILE
class GCMILoss(SubmodularLoss):
    """Graph cut mutual information of a class and the others: the sum of their cosines.

        loss_i = 2 weight sum_N s

    Args: weight: the paper's lambda, 0.5 in the authors' code. temperature has no say.
    Time O(N^2 D / 2), memory O(N D).
    """

    kind = "gcmi"

    def __init__(
        self, temperature: float | Tensor = 0.2, weight: float = 0.5, **options: Any
    ) -> None:
        super().__init__(temperature, weight, **options)

"""Losses of the differences between the other classes' scores and the label's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_losses.base.validation import check_choice
from fused_losses.functions.class_values import ClassLoss
from fused_losses.functions.difference_values import LDR, CrammerSinger, WestonWatkins
from fused_losses.functions.mapped_ldr import ALDR, MAPS, MappedLDR
from fused_losses.losses.owned import ClassifierLoss, LinearClassifier, of_classes

LABEL_DISTRIBUTIONALLY = (
    "Zhu, Ying, Yang, Label Distributionally Robust Losses for Multi-class Classification"
)


@of_classes(
    "Crammer, Singer, On the Algorithmic Implementation of Multiclass Vector Machines",
    2001,
    "ldr_CS",
    primitive="class_rules",
)
class CrammerSingerLoss(LinearClassifier):
    """max(0, threshold + max_{j != y} z_j - z_y); of equal best ones the first has the gradient.

    Args: threshold: the margin. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, threshold: float = 1.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.threshold = threshold
        self.value()

    def value(self) -> ClassLoss:
        return CrammerSinger(self.threshold, self.scale)


@of_classes(
    "Weston, Watkins, Support Vector Machines for Multi-Class Pattern Recognition",
    1999,
    "ldr_WW",
    primitive="class_rules",
)
class WestonWatkinsLoss(CrammerSingerLoss):
    """1/C sum_{j != y} max(0, threshold + z_j - z_y).

    Args: threshold: the margin. Time O(N C D), memory O((N + C) D).
    """

    def value(self) -> ClassLoss:
        return WestonWatkins(self.threshold, self.scale)


@of_classes(LABEL_DISTRIBUTIONALLY, 2023, "ldr_LDR", primitive="class_rules")
class LDRLoss(LinearClassifier):
    """LDR-KL: lam log(1/C sum_j exp((u_j - u_y + threshold [j != y]) / lam)).

    Args: threshold, lam > 0. map: "softplus", the authors' u = softplus(z) / mean softplus(z);
    "l1", u = z / mean |z|; None: u = z. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        threshold: float = 2.0,
        lam: float = 1.0,
        map: str | None = "softplus",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        if map is not None:
            check_choice("map", map, MAPS)
        self.threshold, self.lam, self.map = threshold, lam, map
        self.value()

    def value(self) -> ClassLoss:
        if self.map is None:
            return LDR(self.threshold, self.lam, scale=self.scale)
        return MappedLDR(self.threshold, self.lam, self.map, self.scale)


@of_classes(LABEL_DISTRIBUTIONALLY, 2023, "ldr_ALDR", primitive="class_rules")
class ALDRLoss(ClassifierLoss):
    """ALDR-KL: LDR-KL with a lambda of each sample's own, in `table.lams`.

    loss(embeddings, labels, samples=): [N] int64 ids in [0, num_samples).
    Args: num_samples, threshold, lam, alpha, map, scale: of `class_losses.ALDR`.
    Time O(N C D), memory O((N + C) D) and the table.
    """

    keeps = True

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        num_samples: int,
        threshold: float = 1.0,
        lam: float = 1.0,
        alpha: float = 2.0,
        map: str = "l1",
        *,
        scale: float = 1.0,
        normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, normalize=normalize, **options)
        own: dict[str, Any] = dict(threshold=threshold, lam=lam, alpha=alpha, map=map, scale=scale)
        self.table = ALDR(num_samples, device=self.weight.device, **own)

    def loss(self, embeddings: Tensor, labels: Tensor, *, samples: Tensor, **given: Any) -> Tensor:
        return self.table(embeddings, self.weight, labels, samples, **given)

"""Losses of a softmax over owned classes that are robust to wrong labels."""

from __future__ import annotations

from typing import Any

from fused_losses.base.validation import check_choice
from fused_losses.functions.class_values import ClassLoss
from fused_losses.functions.normalized_values import MSE, NCE, ActivePassive
from fused_losses.functions.probability_values import (
    AGCE,
    AUL,
    GCE,
    MAE,
    SCE,
    CompSum,
    Focal,
    OfProbability,
    Poly1,
)
from fused_losses.losses.owned import LinearClassifier, of_classes

ASYMMETRIC = "Zhou et al., Asymmetric Loss Functions for Learning with Noisy Labels"
NORMALIZED = "Ma et al., Normalized Loss Functions for Deep Learning with Noisy Labels"


@of_classes("Mao, Mohri, Zhong, Cross-Entropy Loss Functions: Theoretical Analysis", 2023)
class CompSumLoss(LinearClassifier):
    """`class_losses.CompSum`: (p^(tau - 1) - 1) / (1 - tau) of the label's probability p.

    Args: tau >= 0: 0 sum-exponential, 1 cross entropy, in (1, 2) generalised cross entropy, 2 mean
    absolute error. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, tau: float = 1.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.tau = tau
        self.value()

    def value(self) -> ClassLoss:
        return CompSum(self.tau, scale=self.scale)


@of_classes("Zhang, Sabuncu, Generalized Cross Entropy Loss with Noisy Labels", 2018)
class GCELoss(LinearClassifier):
    """`class_losses.GCE`: (1 - p^q) / q of the label's probability p.

    Args: q: in (0, 1]. k: in [0, 1): a smaller p has the loss of k and no gradient.
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, q: float = 0.7, k: float = 0.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.q, self.k = q, k
        self.value()

    def value(self) -> ClassLoss:
        return GCE(self.q, self.k, scale=self.scale)


@of_classes(
    "Zhang, Sabuncu, Generalized Cross Entropy Loss with Noisy Labels", 2018, "ldr_TruncGCE"
)
class TruncatedGCELoss(GCELoss):
    """`GCELoss` cut off at k: min((1 - p^q) / q, (1 - k^q) / q).

    Args: q, k: the authors' 0.7 and 0.5. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, q: float = 0.7, k: float = 0.5, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, q, k, **options)


@of_classes(ASYMMETRIC, 2021, "ldr_AGCE")
class AGCELoss(LinearClassifier):
    """`class_losses.AGCE`: ((a + 1)^q - (a + p)^q) / q of the label's probability p.

    Args: a > 0, q > 0. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, a: float = 1.0, q: float = 2.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.a, self.q = a, q
        self.value()

    def value(self) -> ClassLoss:
        return AGCE(self.a, self.q, scale=self.scale)


@of_classes(ASYMMETRIC, 2021)
class AULLoss(LinearClassifier):
    """`class_losses.AUL`: ((a - p)^q - (a - 1)^q) / q of the label's probability p.

    Args: a > 1, q > 0. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, a: float = 2.0, q: float = 2.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.a, self.q = a, q
        self.value()

    def value(self) -> ClassLoss:
        return AUL(self.a, self.q, scale=self.scale)


@of_classes(
    "Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels", 2019, "ldr_SCE"
)
class SCELoss(LinearClassifier):
    """`class_losses.SCE`: -alpha log p + beta A (1 - p) of the label's probability p.

    Args: alpha, beta >= 0. A > 0: what log 0 counts for, negated (log 1e-4 is A = 9.21).
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        alpha: float = 0.1,
        beta: float = 1.0,
        A: float = 4.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.alpha, self.beta, self.A = alpha, beta, A
        self.value()

    def value(self) -> ClassLoss:
        return SCE(self.alpha, self.beta, self.A, scale=self.scale)


@of_classes("Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels", 2019)
class ReverseCELoss(LinearClassifier):
    """Reverse cross entropy, A (1 - p) of the label's probability p: log 0 counts as -A.

    Args: A > 0. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, A: float = 4.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.A = A
        self.value()

    def value(self) -> ClassLoss:
        return SCE(0.0, 1.0, self.A, scale=self.scale)


@of_classes("Ghosh, Kumar, Sastry, Robust Loss Functions under Label Noise", 2017)
class MAELoss(LinearClassifier):
    """Mean absolute error of the probabilities: sum_j |p_j - [j = y]| = 2 (1 - p_y).

    Args: as in `LinearClassifier`. Time O(N C D), memory O((N + C) D).
    """

    def value(self) -> ClassLoss:
        return MAE(scale=self.scale)


@of_classes(
    "Brier, Verification of Forecasts Expressed in Terms of Probability",
    1950,
    "ldr_MSE",
    primitive="class_rules",
)
class MSELoss(LinearClassifier):
    """Squared error of the probabilities: sum_j (p_j - [j = y])^2.

    Args: as in `LinearClassifier`. Time O(N C D), memory O((N + C) D).
    """

    def value(self) -> ClassLoss:
        return MSE(scale=self.scale)


@of_classes(NORMALIZED, 2020, primitive="class_rules")
class NCELoss(LinearClassifier):
    """Normalised cross entropy: log p_y / sum_j log p_j, in [0, 1].

    Args: as in `LinearClassifier`. Time O(N C D), memory O((N + C) D).
    """

    def value(self) -> ClassLoss:
        return NCE(scale=self.scale)


PASSIVE = {"mae": MAE(), "rce": SCE(0.0, 1.0, 4.0), "agce": AGCE(), "aul": AUL()}


@of_classes(NORMALIZED, 2020, primitive="class_rules")
class ActivePassiveLoss(LinearClassifier):
    """alpha NCE + beta of a passive loss of the label's probability.

    Args: passive: "mae", "rce", "agce", "aul", or such a loss of `class_losses`, as
    `class_losses.AGCE(a=2.0)`. alpha, beta >= 0. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        passive: str | OfProbability = "rce",
        alpha: float = 1.0,
        beta: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        if isinstance(passive, str):
            check_choice("passive", passive, tuple(PASSIVE))
        self.passive, self.alpha, self.beta = passive, alpha, beta
        self.value()

    def value(self) -> ClassLoss:
        passive = PASSIVE[self.passive] if isinstance(self.passive, str) else self.passive
        return ActivePassive(passive, self.alpha, self.beta, scale=self.scale)


@of_classes("Lin et al., Focal Loss for Dense Object Detection", 2017)
class FocalLoss(LinearClassifier):
    """`class_losses.Focal`: -(1 - p)^gamma log p of the label's probability p.

    Args: gamma >= 0. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, gamma: float = 2.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.gamma = gamma
        self.value()

    def value(self) -> ClassLoss:
        return Focal(self.gamma, scale=self.scale)


@of_classes("Leng et al., PolyLoss: A Polynomial Expansion Perspective", 2022)
class Poly1Loss(LinearClassifier):
    """`class_losses.Poly1`: -log p + epsilon (1 - p) of the label's probability p.

    Args: epsilon >= -1. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, epsilon: float = 1.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.epsilon = epsilon
        self.value()

    def value(self) -> ClassLoss:
        return Poly1(self.epsilon, scale=self.scale)

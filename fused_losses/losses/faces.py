"""Heads of face recognition: margins that are drawn, or read off the rows, and their like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_losses import margins
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced, unit_rows
from fused_losses.base.parameters import check_parameter
from fused_losses.base.validation import check_choice, check_matrix, check_vector, describe
from fused_losses.functions.class_values import SFace, SphereFace2
from fused_losses.losses.owned import (
    HeldMargin,
    MarginClassifier,
    ValuedClassifier,
    of_classes,
)


@of_classes(
    "Boutros et al., ElasticFace: Elastic Margin Loss for Deep Face Recognition",
    2022,
    "elastic_ElasticArcFace",
    "elastic_ElasticArcFace_plus",
    "elastic_ElasticCosFace",
)
class ElasticFaceLoss(MarginClassifier):
    """A margin drawn a row from N(margin, std^2), at each call.

    Args: base: "arc" or "cos" (`margins.ElasticArcFace`, `ElasticCosFace`). margin: None: 0.5 or
    0.35. std: the paper's 0.0125 (of the + form 0.0175 and 0.025). plus: None, "rank" (the closer a
    row is to its centre the smaller its margin) or "reference" (the authors' code). generator: of
    the draws. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        base: str = "arc",
        margin: float | None = None,
        std: float = 0.0125,
        plus: str | None = None,
        scale: float = 64.0,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        check_choice("base", base, ("arc", "cos"))
        self.base, self.std, self.plus, self.scale = base, std, plus, scale
        self.margin = (0.5 if base == "arc" else 0.35) if margin is None else margin
        self.generator = generator
        self.head()

    def head(self) -> margins.Margin:
        kind = margins.ElasticArcFace if self.base == "arc" else margins.ElasticCosFace
        return kind(self.margin, self.std, self.plus, self.generator)


@of_classes(
    "Kim, Jain, Liu, AdaFace: Quality Adaptive Margin for Face Recognition",
    2022,
    "adaface_AdaFace",
)
class AdaFaceLoss(HeldMargin):
    """`margins.AdaFace`: a margin by the embedding's length, its averages in `margin`.

    Args: margin, h: the paper's m and h. scale: > 0. momentum: of the averages (the paper's 0.01).
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.4,
        h: float = 0.333,
        scale: float = 64.0,
        momentum: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.margin = margins.AdaFace(margin, h, momentum).to(self.weight.device)
        self.scale = scale


@of_classes(
    "Huang et al., CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition",
    2020,
    "curricular_CurricularFace",
)
class CurricularFaceLoss(HeldMargin):
    """`margins.CurricularFace`: hard classes count by an average of targets' cosines, in `margin`.

    Args: margin: radians. scale: > 0. momentum: of the average.
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        scale: float = 64.0,
        momentum: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.margin = margins.CurricularFace(margin, momentum).to(self.weight.device)
        self.scale = scale


@of_classes(
    "Meng et al., MagFace: A Universal Representation for Face Recognition and Quality Assessment",
    2021,
    "magface_easy",
)
class MagFaceLoss(MarginClassifier):
    """`margins.MagFace`: a margin that grows with the embedding's length, and a penalty of it.

    Args: l_a, u_a, l_margin, u_margin, penalty_weight: as there. easy_margin: the margin only
    where cos theta_y > 0, the authors' default; False: beyond pi t - m sin m.
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        l_a: float = 10.0,
        u_a: float = 110.0,
        l_margin: float = 0.45,
        u_margin: float = 0.8,
        penalty_weight: float = 35.0,
        scale: float = 64.0,
        easy_margin: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.l_a, self.u_a, self.l_margin, self.u_margin = l_a, u_a, l_margin, u_margin
        self.penalty_weight, self.scale, self.easy_margin = penalty_weight, scale, easy_margin
        self.head()

    def head(self) -> margins.Margin:
        beyond = "easy" if self.easy_margin else "linear"
        lengths = self.l_a, self.u_a, self.l_margin, self.u_margin
        return margins.MagFace(*lengths, self.penalty_weight, beyond)


@of_classes("Wang et al., Mis-classified Vector Guided Softmax Loss for Face Recognition", 2020)
class MVSoftmaxLoss(HeldMargin):
    """`margins.MVSoftmax`, in `margin`: classes that a margin leaves misclassified count for more.

    Args: base: "arc" or "am". margin: radians, or of the cosine. hardness: the paper's t.
    weighting: "adaptive" or "fixed". scale: the paper's 32.
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        base: str = "arc",
        margin: float = 0.5,
        hardness: float = 0.2,
        weighting: str = "adaptive",
        scale: float = 32.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.margin, self.scale = margins.MVSoftmax(base, margin, hardness, weighting), scale


@of_classes(
    "Zhong et al., SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face Recognition",
    2021,
    "sface",
    primitive="class_rules",
)
class SFaceLoss(ValuedClassifier):
    """`class_losses.SFace`: cosines pulled and pushed with weights that fade, not differentiated.

        loss = -s sigmoid(k (theta_y - a)) c_y + s sum_{j != y} sigmoid(k (b - theta_j)) c_j

    Args: scale: s. k, a, b: the authors' (their run on CASIA has a = 0.87, b = 1.2).
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 64.0,
        k: float = 80.0,
        a: float = 0.8,
        b: float = 1.23,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.scale, self.k, self.a, self.b = scale, k, a, b
        self.value()

    def value(self) -> SFace:
        return SFace(self.scale, self.k, self.a, self.b)


@of_classes(
    "Wen et al., SphereFace2: Binary Classification is All You Need for Deep Face Recognition",
    2022,
    "opensphere_SphereFace2",
    primitive="class_rules",
)
class SphereFace2Loss(ValuedClassifier):
    """`class_losses.SphereFace2`: a binary classifier a class; `bias` learns.

        z_y = r (g(c_y) - m) + b,    z_j = r (g(c_j) + m) + b
        loss = lw / r (alpha softplus(-z_y) + (1 - alpha) sum_{j != y} softplus(z_j))

    Args: scale: r. margin: m. t: of g(c) = 2 ((c + 1) / 2)^t - 1. alpha, lw: the paper's. gradient:
    "exact", or "straight_through": g's slope taken for 1 (opensphere). The bias starts where the
    loss is smallest while every cosine is 0. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 40.0,
        margin: float = 0.4,
        t: float = 3.0,
        alpha: float = 0.7,
        lw: float = 50.0,
        *,
        gradient: str = "exact",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.scale, self.margin, self.t, self.alpha, self.lw = scale, margin, t, alpha, lw
        self.gradient = gradient
        start = SphereFace2.balanced(num_classes, *self._numbers()).bias
        self.bias = nn.Parameter(self.weight.new_tensor(start))

    def _numbers(self) -> tuple[float, float, float, float, float, str]:
        return self.scale, self.margin, self.t, self.alpha, self.lw, self.gradient

    def value(self) -> SphereFace2:
        return SphereFace2(self.bias, *self._numbers())


@of_classes(
    "Prakash et al., SymFace: Additional Facial Symmetry Loss for Deep Face Recognition", 2024
)
class SymFaceLoss(AdaFaceLoss):
    """AdaFace, and halves of frontal faces drawn to one another.

        loss_i = AdaFace_i + symmetry_weight [frontal_i] (1 - cos(left_i, right_i))

    The paper's symmetry term was not to be had in its own words when this was written: the cosine,
    its weight and the threshold are ours. loss(embeddings, labels, left=, right=, frontness=): the
    embeddings of the halves [N, D'], and how frontal each face is [N], frontal where it is at
    least the threshold (None: all are). Without halves it is AdaFace.
    Args: symmetry_weight: >= 0. threshold: of frontness. Others: as in `AdaFaceLoss`.
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        symmetry_weight: float = 1.0,
        threshold: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        check_parameter("symmetry_weight", symmetry_weight, 0)
        check_parameter("threshold", threshold)
        self.symmetry_weight, self.threshold = symmetry_weight, threshold

    def loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        left: Tensor | None = None,
        right: Tensor | None = None,
        frontness: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        loss = super().loss(embeddings, labels, **given)
        if left is None and right is None:
            return loss
        n = len(embeddings)
        for name, half in (("left", left), ("right", right)):
            check_matrix(name, half, "[N, D], both halves")
        assert left is not None and right is not None
        if left.shape != right.shape or len(left) != n:
            raise ValueError(
                f"left, right: expected {n} rows of one width, got {describe(left)} and "
                f"{describe(right)}"
            )
        front = torch.ones_like(labels, dtype=torch.bool)
        if frontness is not None:
            check_vector("frontness", frontness, n, "one value a row [N]", embeddings)
            front = frontness.detach() >= self.threshold
        with no_autocast(embeddings.device):
            wide = accumulate_dtype(left.dtype)
            cosine = (unit_rows(left.to(wide)) * unit_rows(right.to(wide))).sum(dim=1)
            each, counted = torch.where(front, 1 - cosine, 0), labels != self.ignore_index
            term = reduced(each, counted, given["reduction"], loss.dtype, given["row_weight"])
        return loss + self.symmetry_weight * term

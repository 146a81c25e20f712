"""Softmaxes with margins over the centres of classes, which the modules own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fused_losses import margins
from fused_losses.base.numerics import accumulate_dtype, row_dtype
from fused_losses.base.parameters import check_above
from fused_losses.base.validation import check_choice
from fused_losses.functions.adaptive_scale import AdaptiveScale, adaptive_margin_softmax
from fused_losses.functions.unpg import UNPG, unpg_margin_softmax
from fused_losses.losses.owned import (
    ClassifierLoss,
    HeldMargin,
    MarginClassifier,
    of_classes,
    softmax_loss,
)

ARC = "Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition"


@of_classes(ARC, 2019, "pml_ArcFaceLoss", "elastic_ArcFace", "curricular_ArcFace")
class ArcFaceLoss(MarginClassifier):
    """`margin_softmax` with `margins.ArcFace`: z_y = scale cos(theta_y + margin).

    Args: margin: degrees, as pytorch-metric-learning has them (28.6 are 0.5 radians). scale: > 0.
    beyond_pi: as in `margins.ArcFace`. gradient: "straight_through", insightface's, takes the
    margin's slope for 1. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64.0,
        *,
        beyond_pi: str = "linear",
        gradient: str = "exact",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.margin, self.scale = margin, scale
        self.beyond_pi, self.gradient = beyond_pi, gradient
        self.head()

    def head(self) -> margins.Margin:
        return margins.ArcFace(math.radians(self.margin), self.beyond_pi)


@of_classes(
    "Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces",
    2020,
    "pml_SubCenterArcFaceLoss",
    primitive="class_rules",
)
class SubCenterArcFaceLoss(ArcFaceLoss):
    """ArcFace where a class has the cosine of the best of its centres; weight [C, K, D].

    Args: sub_centers: K. Others: as in `ArcFaceLoss`. Time O(N C K D), memory O((N + C K) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64.0,
        sub_centers: int = 3,
        **options: Any,
    ) -> None:
        options = dict(centers=sub_centers, **options)
        super().__init__(num_classes, embedding_size, margin, scale, **options)
        self.sub_centers = sub_centers


@of_classes(
    "Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition",
    2018,
    "pml_CosFaceLoss",
    "elastic_CosFace",
    "insightface_cos",
)
class CosFaceLoss(MarginClassifier):
    """`margin_softmax` with `margins.CosFace`: z_y = scale (cos theta_y - margin).

    Args: margin: in [0, 2]. scale: > 0. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float = 64.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.margin, self.scale = margin, scale
        self.head()

    def head(self) -> margins.Margin:
        return margins.CosFace(self.margin)


def product_margin(margin: margins.Margin, embeddings: Tensor, centers: Tensor) -> margins.Margin:
    """A margin of cosines as one of products <x_i, w_i>: |x| |w| margin(cos). Both [N, D]."""
    wide = row_dtype(embeddings.device)
    x, w = embeddings.to(wide), centers.to(wide)
    size = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(w, dim=1)
    whole = torch.where(size > 0, size, 1)

    def moved(product: Tensor) -> Tensor:
        return size.to(product) * margin(product / whole.to(product))

    return moved


class _MultipliedAngle(ClassifierLoss):
    """What the two losses share whose label's angle is multiplied."""

    keeps = True

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 4.0,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.margin, self.scale = margin, scale
        self.head()

    def head(self) -> margins.SphereFace:
        return margins.SphereFace(self.margin)


@of_classes(
    "Liu et al., Large-Margin Softmax Loss for Convolutional Neural Networks",
    2016,
    "pml_LargeMarginSoftmaxLoss",
)
class LargeMarginSoftmaxLoss(_MultipliedAngle):
    """Products as scores, the label's with its angle multiplied.

        z_j = scale |x| |w_j| cos theta_j,   z_y = scale |x| |w_y| psi(theta_y)
        psi = (-1)^k cos(margin theta) - 2k,  k = floor(margin theta / pi)

    Args: margin: >= 1. scale: > 0. There is no `normalize`: the lengths are the scores'.
    Time O(N C D), memory O((N + C) D).
    """

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        check_above("scale", self.scale)
        known = torch.where(labels == self.ignore_index, 0, labels)
        moved = product_margin(self.head(), embeddings, self.weight[known])
        given = {**given, **dict(margin=moved, scale=self.scale, normalize=False)}
        return softmax_loss(embeddings, self.weight, labels, **given)


@of_classes(
    "Liu et al., SphereFace: Deep Hypersphere Embedding for Face Recognition",
    2017,
    "pml_SphereFaceLoss",
)
class SphereFaceLoss(_MultipliedAngle):
    """`margin_softmax` with `margins.SphereFace`; a row's scale is its length.

        z_j = scale |x| cos theta_j,   z_y = scale |x| psi(theta_y),   psi as in L-softmax

    Args: margin: >= 1. scale: > 0. Time O(N C D), memory O((N + C) D).
    """

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        check_above("scale", self.scale)
        wide = embeddings.to(accumulate_dtype(embeddings.dtype))
        given = {
            **given,
            **dict(margin=self.head(), scale=self.scale * torch.linalg.vector_norm(wide, dim=1)),
        }
        return softmax_loss(embeddings, self.weight, labels, **given)


@of_classes(
    "Zhai, Wu, Classification is a Strong Baseline for Deep Metric Learning",
    2019,
    "pml_NormalizedSoftmaxLoss",
)
class NormalizedSoftmaxLoss(MarginClassifier):
    """Cross entropy of cosines over a temperature: z_j = cos theta_j / temperature.

    Args: temperature: > 0. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, temperature: float = 0.05, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        check_above("temperature", temperature)
        self.temperature = temperature

    @property
    def scale(self) -> float:
        return 1 / self.temperature

    def head(self) -> None:
        return None


@of_classes("Wang et al., NormFace: L2 Hypersphere Embedding for Face Verification", 2017)
class NormFaceLoss(MarginClassifier):
    """Cross entropy of scaled cosines whose scale learns: z_j = scale cos theta_j.

    Args: scale: > 0, where it starts (20 is ours); the parameter `scale`, of one value, must stay
    above 0. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, scale: float = 20.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        check_above("scale", scale)
        self.scale = nn.Parameter(self.weight.new_tensor(scale))

    def head(self) -> None:
        return None


@of_classes(
    ARC,
    2019,
    "insightface_arc",
    "insightface_arc_filter",
)
class CombinedMarginLoss(HeldMargin):
    """insightface's head: `margins.CombinedMargin`, in `margin`, or it in an `InterclassFilter`.

        z_y = scale (cos(m1 theta_y + m2) - m3)

    Args: m1, m2 (radians), m3: all three at once, as the paper has it (insightface's code leaves
    m1 and m2 out where m3 > 0). interclass_filtering_threshold: > 0: another class with a higher
    cosine counts with the score 0. gradient: "straight_through" as there, or "exact". beyond_pi:
    None: "none" as there, or "monotone" where m1 is not 1, which insightface has not.
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        m1: float = 1.0,
        m2: float = 0.5,
        m3: float = 0.0,
        scale: float = 64.0,
        interclass_filtering_threshold: float = 0.0,
        *,
        gradient: str = "straight_through",
        beyond_pi: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.scale, self.gradient = scale, gradient
        beyond = beyond_pi or ("none" if m1 == 1 else "monotone")
        margin = margins.CombinedMargin(m1, m2, m3, beyond)
        threshold = interclass_filtering_threshold
        self.margin = margins.InterclassFilter(margin, threshold) if threshold > 0 else margin


@of_classes(
    "Zhu et al., Coarse-to-Fine: Learning Compact Discriminative Representation for Single-Stage "
    "Image Retrieval",
    2023,
    "madacos_hard",
)
class MadaCosLoss(ClassifierLoss):
    """`adaptive_margin_softmax`: CFCD's scale and margin, read off the batch, not differentiated.

    Args: alpha, smallest, background: of `AdaptiveScale`; the authors' configurations have alpha
    0.02. In eval mode the margin is 0. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        alpha: float = 0.02,
        smallest: float = 32.0,
        background: str = "sample",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.alpha, self.smallest, self.background = alpha, smallest, background
        self.head()

    def head(self) -> AdaptiveScale:
        return AdaptiveScale(self.alpha, self.smallest, self.background)

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        given = {**given, **dict(margin=self.head(), training=self.training)}
        return adaptive_margin_softmax(embeddings, self.weight, labels, **given)


@of_classes(
    "Jung et al., Unified Negative Pair Generation toward Well-discriminative Feature Space for "
    "Face Recognition",
    2022,
    "unpg_CosFace_wisk1.0",
    "unpg_ArcFace_wisk1.5",
    primitive="shared_negatives",
)
class UNPGLoss(ClassifierLoss):
    """`unpg_margin_softmax`: the batch's pairs of different labels are negatives of every row.

    Args: base: "cos" or "arc". margin: the authors' 0.5. whisker: omega of the box that noisy pairs
    lie outside of. scale: > 0. Time O(N (C + N) D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        base: str = "cos",
        margin: float = 0.5,
        whisker: float = 1.5,
        scale: float = 64.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        check_choice("base", base, ("arc", "cos"))
        self.base, self.margin, self.whisker, self.scale = base, margin, whisker, scale
        self.head()

    def head(self) -> margins.Margin:
        arc = self.base == "arc"
        return margins.ArcFace(self.margin, "none") if arc else margins.CosFace(self.margin)

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(margin=self.head(), scale=self.scale, negatives=UNPG(self.whisker))
        return unpg_margin_softmax(embeddings, self.weight, labels, **own, **given)

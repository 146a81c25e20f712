"""A student drawn to a teacher by what a batch's rows are to one another, or row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base.class_labels import one_label
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced, unit_rows
from fused_losses.base.parameters import check_above, check_parameter
from fused_losses.base.products import product
from fused_losses.base.validation import (
    NO_TARGET,
    check_device,
    check_matrix,
    check_pair,
    describe,
)
from fused_losses.functions.relations import (
    cosine_distances,
    gram_distance,
    norm_and_direction,
    relational_angles,
    relational_distances,
    similarity_rows,
)
from fused_losses.losses.module import Loss
from fused_losses.losses.owned import softmax_loss
from fused_losses.losses.registry import entry


def _of_features(paper: str, year: int, *golden: str, primitive: str = "rows") -> Any:
    return entry(paper, year, block="distillation", primitive=primitive, golden=golden)


class RelationLoss(Loss):
    """loss(student [N, D], teacher [N, D']): of a batch as a whole, whatever the two widths.

    Args: normalize: divide rows by their norms first. reduction: "mean" alone: the rows have no
    losses of their own. precision and backend have no say: it is PyTorch in the accumulation dtype.
    """

    def __init__(self, *, normalize: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if self.reduction != "mean":
            raise ValueError(
                f"reduction: expected 'mean' of {type(self).__name__}, got {self.reduction!r}"
            )
        self.normalize = normalize

    def of(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of rows in their accumulation dtypes. []"""
        raise NotImplementedError

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        sides = _checked(student, teacher)
        with no_autocast(student.device):
            sides = tuple(unit_rows(x) for x in sides) if self.normalize else sides
            return self.of(*sides).to(accumulate_dtype(student.dtype))


def _checked(student: Tensor, teacher: Tensor, wide: bool = True) -> tuple[Tensor, Tensor]:
    check_matrix("student", student, "[N, D]")
    check_matrix("teacher", teacher, "[N, D]")
    check_device("student", student, "teacher", teacher)
    if len(student) != len(teacher):
        raise ValueError(
            f"teacher: expected {len(student)} rows as student has, got {describe(teacher)}"
        )
    if not wide and student.shape != teacher.shape:
        raise ValueError(f"teacher: expected {tuple(student.shape)}, got {describe(teacher)}")
    dtype = torch.promote_types(*(accumulate_dtype(x.dtype) for x in (student, teacher)))
    return student.to(dtype), teacher.to(dtype)


@_of_features("Park et al., Relational Knowledge Distillation", 2019)
class RKDLoss(RelationLoss):
    """Distances of pairs and angles of triplets, as the student and the teacher see them.

        distance: mean over (i, j) of huber(|s_i - s_j| / mean, |t_i - t_j| / mean)
        angle:    mean over (i, j, k) of huber(cos angle(s_i, s_j, s_k), cos angle(t_i, t_j, t_k))

    The means of distances are over the pairs that are apart. Both by blocks that the backward
    computes again (within compiled code it keeps them).
    Args: distance_weight, angle_weight: >= 0, the paper's 1 and 2 for embeddings; 0 leaves a term
    out. Time O(N^2 D) of distances and O(N^3 D) of angles, memory O(N D) and O(N (N + D)).
    """

    def __init__(
        self, distance_weight: float = 1.0, angle_weight: float = 2.0, **options: Any
    ) -> None:
        super().__init__(**options)
        check_parameter("distance_weight", distance_weight, 0)
        check_parameter("angle_weight", angle_weight, 0)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def of(self, student: Tensor, teacher: Tensor) -> Tensor:
        loss = 0 * (student.sum() + teacher.sum())
        if self.distance_weight:
            loss = loss + self.distance_weight * relational_distances(student, teacher)
        if self.angle_weight:
            loss = loss + self.angle_weight * relational_angles(student, teacher)
        return loss


@_of_features("Peng et al., Correlation Congruence for Knowledge Distillation", 2019)
class CCLoss(RelationLoss):
    """|S S^T - T T^T|_F^2 / N^2: the batch's Gram matrices, of the paper's bilinear kernel.

    By D x D products; where both have one width, nothing cancels near agreement. The paper's
    Gaussian kernel is not here. Args: normalize: True, ours.
    Time O(N D^2), memory O(N D + D^2).
    """

    def __init__(self, *, normalize: bool = True, **options: Any) -> None:
        super().__init__(normalize=normalize, **options)

    def of(self, student: Tensor, teacher: Tensor) -> Tensor:
        return gram_distance(student, teacher)


@_of_features("Tung, Mori, Similarity-Preserving Knowledge Distillation", 2019)
class SimilarityPreservingLoss(RelationLoss):
    """|G_s - G_t|_F^2 / N^2, G the batch's Gram matrix whose rows are divided by their lengths.

    DisWOT's relation of samples is this without training: a score of a student by its Gram matrix.
    By D x D products. Args: as in `RelationLoss`. Time O(N D^2), memory O(N D + D^2).
    """

    def of(self, student: Tensor, teacher: Tensor) -> Tensor:
        return similarity_rows(student, teacher).sum() / max(1, len(student))


@_of_features(
    "Wang et al., Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
    2023,
    "ndloss",
)
class NDLoss(Loss):
    """1 - <s, e_y> / max(|s|, |t|): long features along the unit mean e_y of the teacher's class.

    loss(student [N, D], teacher [N, D], centers [C, D], labels [N]): centers are the teacher's
    class means. Backends have no say.
    Args: reduction: as in `Loss`. ignore_index: of labels. Time and memory O(N D).
    """

    def __init__(self, *, ignore_index: int = -100, **options: Any) -> None:
        super().__init__(**options)
        self.ignore_index = ignore_index

    def forward(self, student: Tensor, teacher: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
        s, t = _checked(student, teacher, wide=False)
        check_pair("student", student, "centers", centers)
        labels = one_label(labels, student, len(centers), self.ignore_index)
        valid = labels != NO_TARGET
        with no_autocast(student.device):
            e = centers[labels.clamp_min(0)].to(s.dtype)
            # a row that is ignored must not reach the gradients, not even with NaN
            s, t = (torch.where(valid[:, None], x, 0) for x in (s, t))
            each = norm_and_direction(s, t, e)
            return reduced(each, valid, self.reduction, accumulate_dtype(student.dtype))


@_of_features(
    "Lee et al., Multi-aspect Knowledge Distillation with Large Language Model",
    2025,
    primitive="row_statistics",
)
class MultiAspectKDLoss(Loss):
    """Cross entropy of the classes, and of questions that a language model answered.

        ce_weight CE(<x, w_j>, y) + alpha mean over a of BCE(<x, q_a>, p_a)

    loss(student [N, D], weight [C, D], aspect_weight [A, D], labels [N], answers [N, A]): the
    answers are probabilities, and their scores [N, A] are stored as they are.
    Args: alpha, ce_weight: >= 0 (1 is ours; the authors set them by data set).
    Time O(N (C + A) D), memory O((N + C) D + N A).
    """

    keeps = True

    def __init__(
        self,
        alpha: float = 1.0,
        ce_weight: float = 1.0,
        *,
        ignore_index: int = -100,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_parameter("alpha", alpha, 0)
        check_parameter("ce_weight", ce_weight, 0)
        self.alpha, self.ce_weight, self.ignore_index = alpha, ce_weight, ignore_index

    def forward(
        self,
        student: Tensor,
        weight: Tensor,
        aspect_weight: Tensor,
        labels: Tensor,
        answers: Tensor,
    ) -> Tensor:
        check_pair("student", student, "aspect_weight", aspect_weight)
        check_matrix("answers", answers, "[N, A]")
        wanted = len(student), len(aspect_weight)
        if tuple(answers.shape) != wanted:
            raise ValueError(f"answers: expected {wanted}, got {describe(answers)}")
        given = dict(self.common(), reduction="none", ignore_index=self.ignore_index)
        given = {**given, **dict(margin=None, scale=1.0, normalize=False)}
        each = self.ce_weight * softmax_loss(student, weight, labels, **given)
        valid = labels != self.ignore_index
        with no_autocast(student.device):
            wide = accumulate_dtype(student.dtype)
            x = torch.where(valid[:, None], student.to(wide), 0)
            z = product(x, aspect_weight.to(wide))
            of_aspects = F.binary_cross_entropy_with_logits(z, answers.to(wide), reduction="none")
            each = each + self.alpha * of_aspects.mean(dim=1)
            return reduced(each, valid, self.reduction, wide)


@_of_features("Lee et al., Dataset Condensation with Contrastive Signals", 2022, "dcc_distance_wb")
class DCCLoss(Loss):
    """sum over output channels of 1 - cos of two gradients, and over layers.

        sum_o 1 - <g_o, h_o> / (|g_o| |h_o| + eps)

    loss(real, synthetic): a layer's gradient [out, ...], [out, in, h, w] flattened to rows, or a
    sequence of layers; vectors, biases, count 0 as in the authors' code. Backends have no say.
    Args: eps: the authors'. reduction: "sum", or "mean" over the channels.
    Time and memory O(gradients).
    """

    def __init__(self, eps: float = 1e-6, *, reduction: str = "sum", **options: Any) -> None:
        super().__init__(reduction=reduction, **options)
        check_above("eps", eps)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
        self.eps = eps

    def forward(
        self, real: Tensor | Sequence[Tensor], synthetic: Tensor | Sequence[Tensor]
    ) -> Tensor:
        layers = [[x] if isinstance(x, Tensor) else list(x) for x in (real, synthetic)]
        if len(layers[0]) != len(layers[1]) or not layers[0]:
            raise ValueError(
                f"synthetic: expected {max(1, len(layers[0]))} layers as real has, got "
                f"{len(layers[1])}"
            )
        found = [self._of_layer(g, h) for g, h in zip(*layers, strict=True)]
        each = torch.cat(found)
        return each.mean() if self.reduction == "mean" and len(each) else each.sum()

    def _of_layer(self, g: Tensor, h: Tensor) -> Tensor:
        if g.shape != h.shape or g.dim() == 0:
            raise ValueError(f"synthetic: expected {tuple(g.shape)}, got {describe(h)}")
        dtype = accumulate_dtype(h.dtype)
        g, h = g.to(dtype), h.to(dtype)
        if g.dim() == 1:
            return 0 * (g + h)[:0]
        with no_autocast(h.device):
            return cosine_distances(g.flatten(1), h.flatten(1), self.eps)

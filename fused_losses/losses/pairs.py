"""Losses over the pairs of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.base import validation
from fused_losses.functions.lifted import generalized_lifted_structure, lifted_structure
from fused_losses.functions.margin_pairs import (
    contrastive,
    margin_loss,
    snr_contrastive,
    threshold_consistent_margin,
)
from fused_losses.functions.pair_weighting import circle, multi_similarity, orthogonal_projection
from fused_losses.functions.variance import intra_pair_variance
from fused_losses.losses.module import BatchLoss, MetricLoss
from fused_losses.losses.registry import entry


@entry(
    "Wang et al., Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning",
    2019,
    block="pairs",
    primitive="pairs",
    golden=("pml_MultiSimilarityLoss", "msloss_orig_b40"),
)
class MultiSimilarityLoss(MetricLoss):
    """`multi_similarity`, s the cosine.

        loss_i = log(1 + sum_P e^(-alpha (s - base))) / alpha
               + log(1 + sum_N e^(beta (s - base))) / beta

    Args: alpha, beta, base: the paper's (the authors' code has beta=40). mining_margin: None, or
    the authors' miner inside the loss (0.1 there; pytorch-metric-learning has it apart).
    Time O(N^2 D / 2), memory O(N D).
    """

    keeps = True

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        *,
        mining_margin: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.alpha, self.beta, self.base = alpha, beta, base
        self.mining_margin = mining_margin

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(alpha=self.alpha, beta=self.beta, base=self.base)
        return multi_similarity(
            embeddings, labels, mining_margin=self.mining_margin, **own, **given
        )


@entry(
    "Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization",
    2020,
    block="pairs",
    primitive="pairs",
)
class CircleLoss(MetricLoss):
    """`circle`, s the cosine, with weights that are not differentiated.

        loss_i = softplus(log sum_P e^(-gamma [1 + m - s]+ (s - 1 + m))
                        + log sum_N e^(gamma [s + m]+ (s - m)))

    Args: m, gamma: pytorch-metric-learning's 0.4 and 80; the paper's for faces are 0.25 and 256.
    Time O(N^2 D / 2), memory O(N D).
    """

    keeps = True

    def __init__(self, m: float = 0.4, gamma: float = 80.0, **options: Any) -> None:
        super().__init__(**options)
        self.m, self.gamma = m, gamma

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        return circle(embeddings, labels, m=self.m, gamma=self.gamma, **given)


@entry(
    "Hadsell et al., Dimensionality Reduction by Learning an Invariant Mapping",
    2006,
    block="pairs",
    primitive="pairs",
    golden=("pml_ContrastiveLoss",),
)
class ContrastiveLoss(MetricLoss):
    """`contrastive`, d the Euclidean distance of unit rows.

        mean of [d - pos_margin]+ over P + mean of [neg_margin - d]+ over N, of terms that are not 0

    Args: pos_margin, neg_margin: pytorch-metric-learning's 0 and 1, as is the mean over terms that
    are not 0; the paper squares the terms and has no pos_margin.
    Time O(N^2 D / 2), memory O(N D); of P listed pairs O(P D).
    """

    keeps = True

    def __init__(self, pos_margin: float = 0.0, neg_margin: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.pos_margin, self.neg_margin = pos_margin, neg_margin

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(positive_margin=self.pos_margin, negative_margin=self.neg_margin)
        return contrastive(embeddings, labels, **own, **given)


@entry(
    "Yuan et al., Signal-To-Noise Ratio: A Robust Distance Metric for Deep Metric Learning",
    2019,
    block="pairs",
    primitive="row_rules",
    golden=("pml_SignalToNoiseRatioContrastiveLoss",),
)
class SignalToNoiseRatioContrastiveLoss(MetricLoss):
    """`snr_contrastive`: `ContrastiveLoss` with d = var(y - x) / var(x), x the anchor.

    Args: pos_margin, neg_margin: pytorch-metric-learning's 0 and 1. zero_mean_weight: of the
    paper's regulariser mean_i |sum_k x_ik|, its lambda; 0 in pytorch-metric-learning.
    Time O(N^2 D), memory O(N D) and a few blocks; of P listed pairs O(P D).
    """

    def __init__(
        self,
        pos_margin: float = 0.0,
        neg_margin: float = 1.0,
        *,
        zero_mean_weight: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.pos_margin, self.neg_margin = pos_margin, neg_margin
        self.zero_mean_weight = zero_mean_weight

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(positive_margin=self.pos_margin, negative_margin=self.neg_margin)
        weight = self.zero_mean_weight
        return snr_contrastive(embeddings, labels, zero_mean_weight=weight, **own, **given)


@entry(
    "Wu et al., Sampling Matters in Deep Embedding Learning",
    2017,
    block="pairs",
    primitive="pairs",
)
class MarginLoss(MetricLoss):
    """`margin_loss`: pairs on the wrong side of a boundary beta, d Euclidean of unit rows.

        sum of [d - beta + margin]+ over P, of [beta + margin - d]+ over N, by their number if > 0

    Args: margin, nu, beta: the paper's 0.2, 0 and 1.2. learn_beta: beta is a parameter, one for all
    or with num_classes one a class. nu weighs the sum of the rows' beta, over the same divisor.
    triplets_per_anchor: "all", as pytorch-metric-learning counts: a positive once for each negative
    of its anchor and the reverse; None: every pair once (per="pair"). For other numbers of triplets
    give a miner's. Time O(N^2 D / 2), memory O(N D); of P listed pairs O(P D).
    """

    keeps = True

    def __init__(
        self,
        margin: float = 0.2,
        nu: float = 0.0,
        beta: float = 1.2,
        triplets_per_anchor: str | None = "all",
        learn_beta: bool = False,
        num_classes: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if triplets_per_anchor not in ("all", None):
            raise ValueError(
                "triplets_per_anchor: expected 'all' or None, and a miner's triplets as indices "
                f"for others, got {triplets_per_anchor!r}"
            )
        self.margin, self.nu = margin, nu
        self.triplets_per_anchor = triplets_per_anchor
        self.beta: float | Tensor = beta
        if num_classes is not None:
            validation.check_count("num_classes", num_classes)
        if learn_beta:
            shape = () if num_classes is None else (num_classes,)
            self.beta = nn.Parameter(torch.full(shape, float(beta)))

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own: dict[str, Any] = dict(beta=self.beta, margin=self.margin, nu=self.nu)
        per = "pair" if self.triplets_per_anchor is None else "triplet"
        return margin_loss(embeddings, labels, per=per, **own, **given)


@entry(
    "Oh Song et al., Deep Metric Learning via Lifted Structured Feature Embedding",
    2016,
    block="pairs",
    primitive="pairs",
)
class LiftedStructureLoss(MetricLoss):
    """`lifted_structure`, d the Euclidean distance of unit rows.

        mean over P of [log(sum_N e^(neg_margin - d_in) + sum_N e^(neg_margin - d_pn))
                        + d_ip - pos_margin]+^2 / 2

    Args: neg_margin, pos_margin: pytorch-metric-learning's 1 and 0. Where a pair has no negative
    the loss is 0 (there (d - pos_margin)^2 / 2), and of two batches the second sum is left out
    (there the numbers of rows of either batch are compared).
    Time O(N^2 D / 2) and O(N D) for each row of the largest class, memory O(N D); of P listed pairs
    O(P D).
    """

    keeps = True

    def __init__(self, neg_margin: float = 1.0, pos_margin: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.neg_margin, self.pos_margin = neg_margin, pos_margin

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        # both margins stand in one sum
        margin = self.neg_margin - self.pos_margin
        return lifted_structure(embeddings, labels, margin=margin, **given)


@entry(
    "Hermans et al., In Defense of the Triplet Loss for Person Re-Identification",
    2017,
    block="pairs",
    primitive="pairs",
    golden=("pml_GeneralizedLiftedStructureLoss",),
)
class GeneralizedLiftedStructureLoss(MetricLoss):
    """`generalized_lifted_structure`, d the Euclidean distance of unit rows.

        loss_i = [log sum_P e^(d - pos_margin) + log sum_N e^(neg_margin - d)]+

    Args: neg_margin, pos_margin: pytorch-metric-learning's 1 and 0. The mean is over rows with a
    positive and a negative (there over all rows, and a sum over nothing has the logarithm 0).
    Time O(N^2 D / 2), memory O(N D); of P listed pairs O(P D).
    """

    keeps = True

    def __init__(self, neg_margin: float = 1.0, pos_margin: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.neg_margin, self.pos_margin = neg_margin, pos_margin

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(negative_margin=self.neg_margin, positive_margin=self.pos_margin)
        return generalized_lifted_structure(embeddings, labels, **own, **given)


@entry(
    "Yu and Tao, Deep Metric Learning with Tuplet Margin Loss",
    2019,
    block="pairs",
    primitive="row_rules",
    golden=("pml_IntraPairVarianceLoss",),
)
class IntraPairVarianceLoss(BatchLoss):
    """`intra_pair_variance`, s the cosine: pairs on the wrong side of their class's mean.

        mean_P [(1 - pos_eps) mean_P s - s]+^2 + mean_N [s - (1 + neg_eps) mean_N s]+^2

    Args: pos_eps, neg_eps: 0.01, as in pytorch-metric-learning. The paper adds it to its tuplet
    margin loss. Time O(N^2 D), memory O(N D) and a few blocks; of P listed pairs O(P D).
    """

    keeps = True

    def __init__(self, pos_eps: float = 0.01, neg_eps: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        self.pos_eps, self.neg_eps = pos_eps, neg_eps

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(positive_eps=self.pos_eps, negative_eps=self.neg_eps)
        return intra_pair_variance(embeddings, labels, **own, **given)


@entry(
    "Ranasinghe et al., Orthogonal Projection Loss",
    2021,
    block="pairs",
    primitive="pairs",
    golden=("opl_signed", "opl_abs"),
)
class OrthogonalProjectionLoss(BatchLoss):
    """`orthogonal_projection`: positives' mean cosine to 1, negatives' to 0.

        1 - mean_P s + gamma mean_N s        (absolute: mean_N |s|)

    Args: gamma: the authors' 0.5; with absolute=True 2, where the sweep runs twice.
    Time O(N^2 D / 2), memory O(N D); of P listed pairs O(P D).
    """

    keeps = True

    def __init__(self, gamma: float = 0.5, *, absolute: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.gamma, self.absolute = gamma, absolute

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own: dict[str, Any] = dict(gamma=self.gamma, absolute=self.absolute)
        return orthogonal_projection(embeddings, labels, **own, **given)


@entry(
    "Zhang et al., Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
    2024,
    block="pairs",
    primitive="pairs",
)
class ThresholdConsistentMarginLoss(BatchLoss):
    """`threshold_consistent_margin`, a regulariser beside another loss; s the cosine.

        lambda_plus * mean of [margin_plus - s]+ over P
      + lambda_minus * mean of [s - margin_minus]+ over N,        of the terms that are not 0

    Args: as in pytorch-metric-learning, 1, 1, 0.9 and 0.5 (there also a term of exactly 0 counts,
    and ref_emb is not looked at). Time O(N^2 D / 2), memory O(N D); of P listed pairs O(P D).
    """

    keeps = True

    def __init__(
        self,
        lambda_plus: float = 1.0,
        lambda_minus: float = 1.0,
        margin_plus: float = 0.9,
        margin_minus: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.lambda_plus, self.lambda_minus = lambda_plus, lambda_minus
        self.margin_plus, self.margin_minus = margin_plus, margin_minus

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        return threshold_consistent_margin(
            embeddings,
            labels,
            positive_margin=self.margin_plus,
            negative_margin=self.margin_minus,
            positive_weight=self.lambda_plus,
            negative_weight=self.lambda_minus,
            **given,
        )

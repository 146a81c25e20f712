"""Losses over the triplets of a batch: anchor, positive, negative."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_losses.base.indices import Indices
from fused_losses.base.validation import check_choice
from fused_losses.functions.centroids import centroid_triplet, prototype_triplet
from fused_losses.functions.chosen_triplets import batch_easy_hard_triplet, batch_hard_triplet
from fused_losses.functions.semihard import semihard_triplet
from fused_losses.functions.triplets import all_triplets, harmonic_triplet
from fused_losses.losses.module import Loss, MetricLoss
from fused_losses.losses.registry import entry
from fused_losses.mining.triplets import mine_triplets


@entry(
    "Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering",
    2015,
    block="triplets",
    primitive="row_rules",
    golden=("pml_TripletMarginLoss_all", "pml_TripletMarginLoss_swap_smooth"),
)
class TripletMarginLoss(MetricLoss):
    """`all_triplets`, d the Euclidean distance.

        sum over all (a, p, n) of [d_ap - d_an + margin]+, or log(1 + e^.) with smooth_loss

    Args: margin, swap (d_pn where it is less than d_an), smooth_loss, triplets_per_anchor ("all" or
    so many drawn ones, by `generator`): pytorch-metric-learning's; its swap with ref_emb takes
    other rows for p. triplets: "all", or of them those that are "hard", "semihard" or (smooth)
    "easy" (TripletMarginMiner's types). distance: FaceNet has "sqeuclidean", margin 0.2,
    "semihard". reduction "mean": over the triplets whose loss is not 0, as there. Time
    O(N^2 D + N^2 log N), with swap O(N P D) over P positive pairs, memory O(N D).
    """

    def __init__(
        self,
        margin: float = 0.05,
        swap: bool = False,
        smooth_loss: bool = False,
        triplets_per_anchor: int | str = "all",
        *,
        triplets: str = "all",
        distance: str = "euclidean",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.margin, self.swap, self.smooth_loss = margin, swap, smooth_loss
        if isinstance(triplets_per_anchor, str):
            check_choice("triplets_per_anchor", triplets_per_anchor, ("all",))
        self.triplets_per_anchor, self.generator = triplets_per_anchor, generator
        self.triplets, self.distance = triplets, distance

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own: dict[str, Any] = dict(margin=self.margin, swap=self.swap, smooth=self.smooth_loss)
        own |= dict(triplets=self.triplets, distance=self.distance)
        if self.triplets_per_anchor != "all" and "indices" not in given:
            own |= dict(per_anchor=self.triplets_per_anchor, generator=self.generator)
        return all_triplets(embeddings, labels, **own, **given)


@entry(
    "Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering",
    2015,
    block="triplets",
    primitive="row_rules",
)
class BatchSemiHardTripletLoss(MetricLoss):
    """`semihard_triplet`: each positive pair against the nearest negative farther than it.

        loss_ap = [d_ap - d_an + margin]+,  d_an = min over the n with d_an > d_ap

    Args: margin: 5, Euclidean, of rows of any length: sentence-transformers' module of this name;
    TensorFlow Addons' TripletSemiHardLoss has 1. fallback: "farthest", the farthest negative where
    none is farther, as both; None leaves the pair out. reduction "mean": over the positive pairs
    that have a negative, as both. Time O(N^2 D + N^2 log N), memory O(N D).
    """

    refuses: ClassVar[dict[str, str]] = {"indices": "which finds each pair's negative itself"}

    def __init__(
        self,
        margin: float = 5.0,
        *,
        fallback: str | None = "farthest",
        distance: str = "euclidean",
        normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(normalize=normalize, **options)
        self.margin, self.fallback, self.distance = margin, fallback, distance

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(margin=self.margin, fallback=self.fallback, distance=self.distance)
        return semihard_triplet(embeddings, labels, **own, **given)


@entry(
    "Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering",
    2015,
    block="triplets",
    primitive="row_rules",
)
class FaceNetTripletLoss(MetricLoss):
    """`all_triplets` of unit rows and squared distances, over FaceNet's choice of negatives.

        sum over (a, p, n) of [|a - p|^2 - |a - n|^2 + margin]+

    Args: margin: 0.2, the paper's. negatives: "semihard", the paper's, all n with
    d_ap < d_an <= d_ap + margin; "random", the facenet code after VGG-Face: for each (a, p) one n
    with d_an <= d_ap + margin, drawn evenly by `generator`. Given indices are taken as they are.
    reduction "mean": over the triplets whose loss is not 0 (the paper: the sum). Time
    O(N^2 D + N^2 log N), memory O(N D), with "random" and the list of positive pairs.
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        negatives: str = "semihard",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_choice("negatives", negatives, ("semihard", "random"))
        self.margin, self.negatives, self.generator = margin, negatives, generator

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own: dict[str, Any] = dict(margin=self.margin, distance="sqeuclidean")
        if "indices" not in given and self.negatives == "random":
            ref = {k: given[k] for k in ("ref_embeddings", "ref_labels") if k in given}
            chosen: dict[str, Any] = dict(positive="all", negative="random", margin=self.margin)
            chosen |= dict(metric="sqeuclidean", normalize=self.normalize, backend=self.backend)
            chosen |= dict(generator=self.generator, precision=self.precision)
            given = given | dict(indices=mine_triplets(embeddings, labels, **ref, **chosen))
        elif "indices" not in given:
            own |= dict(triplets="semihard")
        return all_triplets(embeddings, labels, **own, **given)


@entry(
    "Hermans et al., In Defense of the Triplet Loss for Person Re-Identification",
    2017,
    block="triplets",
    primitive="topk",
    golden=("ctl_batchhard_margin0.5",),
)
class BatchHardTripletLoss(MetricLoss):
    """`batch_hard_triplet`: each row's farthest positive and nearest negative.

        loss_i = log(1 + e^(max_P d - min_N d)), or with a margin [max_P d - min_N d + margin]+

    Args: margin: None, the paper's soft margin (its hinges have 0.1 to 1, sentence-transformers'
    5). distance: Euclidean, of rows of any length, as in the paper (normalize=False);
    pytorch-metric-learning's BatchHardMiner and loss normalise. reduction "mean": over the rows
    that have both. Time O(N^2 D), memory O(N D).
    """

    def __init__(
        self,
        margin: float | None = None,
        *,
        distance: str = "euclidean",
        normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(normalize=normalize, **options)
        self.margin, self.distance = margin, distance

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(margin=self.margin, distance=self.distance)
        return batch_hard_triplet(embeddings, labels, **own, **given)


@entry(
    "Xuan et al., Improved Embeddings with Easy Positive Triplet Mining",
    2020,
    block="triplets",
    primitive="row_rules",
)
class BatchEasyHardTripletLoss(MetricLoss):
    """`batch_easy_hard_triplet`: one positive and one negative a row, each by its own rule.

        loss_i = [d_ip - d_in + margin]+, p the nearest positive, n the nearest negative beyond it

    Args: positive, negative: "easiest", "hardest" or "semihard" (pytorch-metric-learning's
    BatchEasyHardMiner: "easy", "hard", ... with these two for defaults). margin: None is
    log(1 + e^.). Rows are normalised, d is Euclidean. Time O(N^2 D), memory O(N D).
    """

    def __init__(
        self,
        positive: str = "easiest",
        negative: str = "semihard",
        margin: float | None = 0.05,
        *,
        distance: str = "euclidean",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.positive, self.negative = positive, negative
        self.margin, self.distance = margin, distance

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(positive=self.positive, negative=self.negative, margin=self.margin)
        return batch_easy_hard_triplet(embeddings, labels, distance=self.distance, **own, **given)


@entry(
    "Schroff et al., FaceNet: A Unified Embedding, appendix: Harmonic Embedding",
    2015,
    block="triplets",
    primitive="row_rules",
)
class HarmonicTripletLoss(Loss):
    """`harmonic_triplet`: a new model's rows among themselves and an old model's, which stay put.

        sum over (a, p, n) of [d_ap - d_an + margin]+, d squared, p and n of either model

    loss(embeddings [N, D], labels [N], frozen [M, D], frozen_labels [M] or None: the same rows,
    indices): indices, a miner's over p and n of [embeddings, frozen], are taken as they are; then
    labels may be None.
    Args: margin, triplets, normalize: FaceNet's, 0.2 of semi-hard triplets of unit rows.
    Time O(N (N + M) D), memory O((N + M) D).
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        triplets: str = "semihard",
        distance: str = "sqeuclidean",
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.margin, self.triplets = margin, triplets
        self.distance, self.normalize = distance, normalize

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        frozen: Tensor,
        frozen_labels: Tensor | None = None,
        indices: Indices | None = None,
    ) -> Tensor:
        triplets = self.triplets if indices is None else "all"
        own: dict[str, Any] = dict(margin=self.margin, triplets=triplets, indices=indices)
        own |= dict(distance=self.distance)
        own |= dict(normalize=self.normalize) | self.common()
        return harmonic_triplet(embeddings, labels, frozen, frozen_labels, **own)


@entry(
    "Wieczorek et al., On the Unreasonable Effectiveness of Centroids in Image Retrieval",
    2021,
    block="triplets",
    primitive="topk",
    golden=("ctl_centroid",),
)
class CentroidTripletLoss(MetricLoss):
    """`centroid_triplet`: batch-hard of rows and leave-one-out centroids of their classes.

        loss_i = [d(x_i, c_own) - min over other classes d(x_i, c) + margin]+

    Args: margin: the authors' 0.3. centroid_anchors: True, the authors' code, where centroids are
    anchors too; False, the paper's formula above. normalize: False, as both. With ref_emb its
    classes' means are the centroids (centroid_anchors=False). Time O(N^2 D), memory O(N D).
    """

    refuses: ClassVar[dict[str, str]] = {"indices": "which takes each row's class mean"}

    def __init__(
        self,
        margin: float | None = 0.3,
        *,
        centroid_anchors: bool = True,
        normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(normalize=normalize, **options)
        self.margin, self.centroid_anchors = margin, centroid_anchors

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(margin=self.margin, centroid_anchors=self.centroid_anchors)
        return centroid_triplet(embeddings, labels, **own, **given)


@entry(
    "Mendez-Ruiz et al., SuSana Distancia is all you need: Enforcing class separability",
    2023,
    block="triplets",
    primitive="topk",
)
class PrototypeTripletLoss(Loss):
    """`prototype_triplet`: a row's own prototype against the nearest other one.

        loss_i = [d(x_i, p_y) - min_{c != y} d(x_i, p_c) + margin]+,  d = sqrt(|x - p|^2 + eps)

    loss(embeddings [N, D], prototypes [C, D], labels [N] in [0, C)): the class means of a support
    set. Args: margin, eps: the authors' code. Time O(N C D), memory O((N + C) D).
    """

    def __init__(self, margin: float = 0.5, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(**options)
        self.margin, self.eps = margin, eps

    def forward(self, embeddings: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
        own = dict(margin=self.margin, eps=self.eps)
        return prototype_triplet(embeddings, prototypes, labels, **own, **self.common())

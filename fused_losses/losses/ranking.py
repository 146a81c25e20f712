"""Losses over whole rows of distances: histograms, lists, tuplets, neighbours."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fused_losses.functions.angular import angular
from fused_losses.functions.neighbours import icnn
from fused_losses.functions.ranking import fast_ap, histogram, ranked_list, tuplet_margin
from fused_losses.functions.smooth_ranks import pnp, smooth_ap
from fused_losses.losses.module import BatchLoss, MetricLoss
from fused_losses.losses.registry import entry


@entry(
    "Wang et al., Deep Metric Learning with Angular Loss",
    2017,
    block="ranking",
    primitive="pairs",
    golden=("pml_AngularLoss",),
)
class AngularLoss(MetricLoss):
    """`angular` over the positive pairs (a, p), t = tan(alpha)^2.

        loss_ap = log(1 + sum_N e^(4 t <a + p, n> - 2 (1 + t) <a, p>))

    Args: alpha: degrees, pytorch-metric-learning's 40 (the paper has 36 to 55).
    normalize_negatives: False, as there, where a and p are divided by their norms and n is not;
    None: as `normalize`, the paper. Time O(P N D) over P positive pairs, memory O(N D).
    """

    def __init__(
        self, alpha: float = 40.0, *, normalize_negatives: bool | None = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.alpha, self.normalize_negatives = alpha, normalize_negatives

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(alpha=self.alpha, normalize_negatives=self.normalize_negatives)
        return angular(embeddings, labels, **own, **given)


@entry(
    "Yu and Tao, Deep Metric Learning with Tuplet Margin Loss",
    2019,
    block="ranking",
    primitive="row_rules",
)
class TupletMarginLoss(MetricLoss):
    """`tuplet_margin`: each positive pair against all negatives of its anchor, s the cosine.

        loss_ip = log(1 + sum_N e^(scale (s_in - cos(angle_ip - margin))))

    Args: margin: degrees, 5.73 = 0.1 radians, scale: 64: pytorch-metric-learning's and the paper's.
    A positive's cosine is kept 1e-6 from -1 and 1; there it is not, and equal rows give NaN.
    Time O(N^2 D), memory O(N D).
    """

    def __init__(self, margin: float = 5.73, scale: float = 64.0, **options: Any) -> None:
        super().__init__(**options)
        self.margin, self.scale = margin, scale

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        return tuplet_margin(embeddings, labels, margin=self.margin, scale=self.scale, **given)


@entry(
    "Cakir et al., Deep Metric Learning to Rank",
    2019,
    block="ranking",
    primitive="row_rules",
)
class FastAPLoss(MetricLoss):
    """`fast_ap`: 1 - average precision, from histograms of squared distances of unit rows.

        loss_i = 1 - (1 / |P|) sum_r h+_r H+_r / H_r

    Args: num_bins: pytorch-metric-learning's and the authors' 10. reduction "mean": over the rows
    with a positive. Time O(N^2 D), memory O(N D + N num_bins).
    """

    def __init__(self, num_bins: int = 10, **options: Any) -> None:
        super().__init__(**options)
        self.num_bins = num_bins

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        return fast_ap(embeddings, labels, bins=self.num_bins, **given)


@entry(
    "Ustinova and Lempitsky, Learning Deep Embeddings with Histogram Loss",
    2016,
    block="ranking",
    primitive="row_rules",
    golden=("pml_HistogramLoss",),
)
class HistogramLoss(BatchLoss):
    """`histogram`: the chance that a negative pair is more similar than a positive one.

        sum_r h-_r (h+_0 + ... + h+_r), h the normalised histograms of cosines

    Args: n_bins: 100, or delta, the width of a bin: 2 / n_bins, as pytorch-metric-learning has
    them. Every negative pair counts, as in the paper; there those of two rows without any positive
    do not. Time O(N^2 D), memory O(N D + N n_bins).
    """

    def __init__(
        self, n_bins: int | None = None, delta: float | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        if delta is not None and not (0 < delta <= 2 and abs(2 / delta - round(2 / delta)) < 1e-6):
            raise ValueError(f"delta: expected 2 / n for a whole n, got {delta}")
        of_delta = None if delta is None else round(2 / delta)
        if n_bins is not None and of_delta not in (None, n_bins):
            raise ValueError(f"delta: expected 2 / n_bins = {2 / n_bins}, got {delta}")
        self.n_bins = n_bins if n_bins is not None else of_delta if of_delta is not None else 100

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        return histogram(embeddings, labels, bins=self.n_bins, **given)


@entry(
    "Wang et al., Ranked List Loss for Deep Metric Learning",
    2019,
    block="ranking",
    primitive="row_rules",
)
class RankedListLoss(MetricLoss):
    """`ranked_list`: positives within alpha - margin, negatives beyond alpha, d Euclidean.

        loss_i = (1 - imbalance) mean_P' (d - alpha + margin) + imbalance mean_N' (alpha - d)

    Args: margin, Tn: 0.4 and 10, the paper's (pytorch-metric-learning has no default for them).
    imbalance: 0.5. alpha: None is 1 + margin / 2, as there (1.2, the paper's). Tp: 0. The weights
    e^(T violation) are differentiated, as there. Time O(N^2 D), memory O(N D).
    """

    refuses: ClassVar[dict[str, str]] = {"indices": "which ranks whole rows"}

    def __init__(
        self,
        margin: float = 0.4,
        Tn: float = 10.0,
        imbalance: float = 0.5,
        alpha: float | None = None,
        Tp: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.margin, self.imbalance, self.Tn, self.Tp = margin, imbalance, Tn, Tp
        self.alpha = 1 + margin / 2 if alpha is None else alpha

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(margin=self.margin, alpha=self.alpha, imbalance=self.imbalance)
        own |= dict(positive_temperature=self.Tp, negative_temperature=self.Tn)
        return ranked_list(embeddings, labels, **own, **given)


@entry(
    "Garcia Ramirez et al., Improving Few-Shot Learning with an Improved Class Nearest Neighbors "
    "loss; Mendez-Ruiz et al., SuSana Distancia is all you need",
    2023,
    block="ranking",
    primitive="row_rules",
    golden=("icnn_full",),
)
class ICNNLoss(BatchLoss):
    """`icnn`: -log of a score of each row's nearest rows, d Euclidean of rows of any length.

        score = ((same + different) / 2 + share of the k nearest that are of the same class) / 2

    Args: neighbors, window: 4 and 6, the authors' k and ipc (shots and queries of an episode).
    normalize: False, as there. Their variance term, which their code has as a comment, is left
    out. Time O(N^2 D), memory O(N window D).
    """

    refuses: ClassVar[dict[str, str]] = {"indices": "which takes each row's nearest rows"}

    def __init__(
        self, neighbors: int = 4, window: int = 6, *, normalize: bool = False, **options: Any
    ) -> None:
        super().__init__(normalize=normalize, **options)
        self.neighbors, self.window = neighbors, window

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own = dict(neighbors=self.neighbors, window=self.window)
        return icnn(embeddings, labels, **own, **given)


@entry(
    "Brown et al., Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval",
    2020,
    block="ranking",
    primitive="row_rules",
)
class SmoothAPLoss(MetricLoss):
    """`smooth_ap`: 1 - average precision, ranks counted by a sigmoid of cosines.

        loss_i = 1 - (1 / |P|) sum_P (1 + before_P) / (1 + before_P + before_N)

    Args: temperature: 0.01, the paper's and pytorch-metric-learning's. count_self: True, as both: a
    row is its own positive. Classes may have any sizes; there they must be of one size, in order.
    Time O(N^2 D + N^2 P) with P positives a row, memory O(N D).
    """

    def __init__(
        self, temperature: float = 0.01, *, count_self: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        self.temperature, self.count_self = temperature, count_self

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own: dict[str, Any] = dict(temperature=self.temperature, count_self=self.count_self)
        return smooth_ap(embeddings, labels, **own, **given)


@entry(
    "Li et al., Rethinking the Optimization of Average Precision: Only Penalizing Negative "
    "Instances before Positive Ones is Enough",
    2022,
    block="ranking",
    primitive="row_rules",
)
class PNPLoss(MetricLoss):
    """`pnp`: the negatives that stand before each positive, counted by a sigmoid of cosines.

        loss_i = (1 / |P|) sum_P f(r),  r = sum_N sigmoid((s_n - s_p) / anneal)

    Args: b, alpha, anneal, variant ("O", "Ds", "Dq", "Iu", "Ib"; `pnp` has each f):
    pytorch-metric-learning's 2, 1, 0.01 and "O". count_self: True, as there. Time
    O(N^2 D + N^2 P) with P positives a row, memory O(N D).
    """

    refuses: ClassVar[dict[str, str]] = {"indices": "which ranks whole rows"}

    def __init__(
        self,
        b: float = 2.0,
        alpha: float = 1.0,
        anneal: float = 0.01,
        variant: str = "O",
        *,
        count_self: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.b, self.alpha, self.anneal = b, alpha, anneal
        self.variant, self.count_self = variant, count_self

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own: dict[str, Any] = dict(b=self.b, alpha=self.alpha, temperature=self.anneal)
        own |= dict(variant=self.variant, count_self=self.count_self)
        return pnp(embeddings, labels, **own, **given)

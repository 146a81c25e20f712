"""Contrastive losses that choose or weigh their negatives, and losses of rows with their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_losses.base.integers import count_up
from fused_losses.base.memory_budget import half_of
from fused_losses.base.numerics import no_autocast
from fused_losses.base.products import product
from fused_losses.base.unit_norm import wide_unit
from fused_losses.functions.info_nce import info_nce
from fused_losses.functions.joint_pairs import (
    adaptive_temperature,
    guided_contrastive,
    hard_contrastive,
    masked_contrastive,
)
from fused_losses.functions.row_agreement import alignment, soft_label_kl
from fused_losses.losses.module import Loss
from fused_losses.losses.registry import entry


@entry(
    "Solatorio, GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding "
    "Fine-tuning",
    2024,
    block="contrastive",
    primitive="row_rules",
)
class GISTEmbedLoss(Loss):
    """`guided_contrastive`, s and the guide's g the cosines: InfoNCE without false negatives.

        loss_i = log(e^(s(a_i, p_i) / temperature) + sum_kept e^(s / temperature))
               - s(a_i, p_i) / temperature

    over (a_i, p_j), (a_i, a_j), (p_i, p_j), j != i, and (a_i, n_k), kept where g is not above
    g(a_i, p_i) - margin.

    Args:
        temperature, margin, margin_strategy, contrast_anchors, contrast_positives:
            sentence-transformers'; margin_strategy "absolute" or "relative".

    loss(anchor [N, D], positive [N, D], anchor_guide [N, G], positive_guide [N, G], negatives
    [K, D], negatives_guide [K, G]). Time O(3 N^2 (D + G)), memory O(N (D + G)) and a few blocks.
    """

    def __init__(
        self,
        temperature: float = 0.01,
        margin: float = 0.0,
        *,
        margin_strategy: str = "absolute",
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.temperature, self.margin, self.margin_strategy = temperature, margin, margin_strategy
        self.contrast_anchors, self.contrast_positives = contrast_anchors, contrast_positives

    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        anchor_guide: Tensor,
        positive_guide: Tensor,
        negatives: Tensor | None = None,
        negatives_guide: Tensor | None = None,
    ) -> Tensor:
        return guided_contrastive(
            anchor,
            positive,
            anchor_guide,
            positive_guide,
            negatives=negatives,
            negatives_guide=negatives_guide,
            temperature=self.temperature,
            margin=self.margin,
            strategy=self.margin_strategy,
            anchors=self.contrast_anchors,
            positives=self.contrast_positives,
            **self.common(),
        )


@entry(
    "Shafique et al., CriSp: Leveraging Tread Depth Maps for Enhanced Crime-Scene Shoeprint "
    "Matching",
    2024,
    block="contrastive",
    primitive="row_rules",
)
class CriSpLoss(Loss):
    """`masked_contrastive`: maps of features, compared where the query's mask shows.

        s_ij = <m_i q_i, k_j> / (|m_i q_i| |m_i k_j|)
        loss_i = log sum_j e^(s_ij / temperature) - log sum_P e^(s_ij / temperature)

    Args: temperature: > 0.

    loss(query [N, C, P], key [M, C, P], mask [N, P] bool, labels [N], key_labels [M]); labels None:
    key i is query i's. Time O(N M C P), memory O((N + M) C P) and a few blocks.
    """

    def __init__(self, temperature: float = 0.07, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor,
        labels: Tensor | None = None,
        key_labels: Tensor | None = None,
    ) -> Tensor:
        told: dict[str, Any] = dict(labels=labels, key_labels=key_labels)
        given: dict[str, Any] = dict(temperature=self.temperature, **told, **self.common())
        return masked_contrastive(query, key, mask, **given)


@entry(
    "Wang and Liu, Understanding the Behaviour of Contrastive Loss",
    2021,
    block="contrastive",
    primitive="row_rules",
)
class HardContrastiveLoss(Loss):
    """`hard_contrastive`: InfoNCE against the hardest share of a row's negatives, s the cosine.

        loss_i = log(e^z_ii + sum_hardest e^z_ij) - z_ii,   z = s / temperature

    Args: share: in (0, 1], of n negatives the ceil(share n) of largest s, by rank. temperature:
    > 0. normalize: divide rows by their norms first (True).

    loss(query [N, D], key [M, D], labels [N], key_labels [M]); labels None: key i is query i's.
    Time O(N M (D + log M)), memory O((N + M) D) and a few blocks.
    """

    def __init__(
        self,
        share: float = 0.1,
        temperature: float = 0.07,
        *,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.share, self.temperature, self.normalize = share, temperature, normalize

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        labels: Tensor | None = None,
        key_labels: Tensor | None = None,
    ) -> Tensor:
        own: dict[str, Any] = dict(
            share=self.share, temperature=self.temperature, normalize=self.normalize
        )
        told: dict[str, Any] = dict(labels=labels, key_labels=key_labels)
        return hard_contrastive(query, key, **own, **told, **self.common())


@entry(
    "Wang et al., Adaptive Multi-head Contrastive Learning",
    2023,
    block="contrastive",
    primitive="row_rules",
    golden=("amcl_ntxent",),
)
class AMCLLoss(Loss):
    """`adaptive_temperature` of each head, s the cosine, summed: a temperature a pair.

        t_ab = low + (high - low) sigmoid(-<phi(a), phi(b)>)
        loss_i = -s_ip / t_ip + mean_near s_in / t_in
               + beta (D / 2 log t_ip + 1 / t_ip - sum_near (log t_in + 1 / t_in))

    phi: two linear maps with a ReLU between, of rows of norm 1, the same for all heads.

    Args: dim: D of a head. topk: the negatives of a row. beta, tau_min, tau_max: the authors'.

    loss(first [N, H, D], second [N, H, D]). Time O(H N^2 D), memory O(H N D) and a few blocks.
    """

    def __init__(
        self,
        dim: int,
        topk: int = 100,
        beta: float = 1e-4,
        tau_min: float = 1e-5,
        tau_max: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.topk, self.beta, self.tau_min, self.tau_max = topk, beta, tau_min, tau_max
        self.phi = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def factors(self, x: Tensor) -> Tensor:
        """phi of rows, in their dtype, which may be wider than its weights'."""
        first, _, last = self.phi
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        return _linear(_linear(x, first).relu(), last)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if first.dim() != 3 or first.shape != second.shape:
            raise ValueError(
                "first, second: expected [N, H, D] both, got "
                f"{tuple(first.shape)} and {tuple(second.shape)}"
            )
        with no_autocast(first.device):
            views = [wide_unit(view) for view in (first, second)]
            maps = [self.factors(view) for view in views]
        own: dict[str, Any] = dict(
            nearest=self.topk, beta=self.beta, bounds=(self.tau_min, self.tau_max)
        )
        heads = [
            adaptive_temperature(
                *(view[:, head].contiguous() for view in (*views, *maps)), **own, **self.common()
            )
            for head in range(first.shape[1])
        ]
        return sum(heads[1:], heads[0])


@entry(
    "Zhang et al., Learning the Unlearned: Mitigating Feature Suppression in Contrastive Learning",
    2024,
    block="contrastive",
    primitive="pairs",
)
class MCLLoss(Loss):
    """`info_nce` whose negatives are of the anchor's cluster, s the cosine.

        loss_i = log sum_{c_j = c_i} e^(s_ij / temperature) - s_ii / temperature

    Args: temperature: > 0. symmetric: the mean of this and of the columns' loss. normalize: divide
    rows by their norms first (True).

    loss(query [N, D], key [N, D], clusters [N]): integers, of the earlier stage's features.
    Time O(N^2 D), memory O(N D).
    """

    keeps = True

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        symmetric: bool = True,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.temperature, self.symmetric, self.normalize = temperature, symmetric, normalize

    def forward(self, query: Tensor, key: Tensor, clusters: Tensor) -> Tensor:
        own: dict[str, Any] = dict(temperature=self.temperature, normalize=self.normalize)
        given: dict[str, Any] = dict(
            symmetric=self.symmetric, groups=clusters, **own, **self.common()
        )
        return info_nce(query, key, **given)


@entry(
    "Yeh et al., Decoupled Contrastive Learning",
    2022,
    block="contrastive",
    primitive="pairs",
)
class DecoupledContrastiveLoss(Loss):
    """`info_nce` of two views without the positive in its denominator, s the cosine.

        loss_i = log(sum_{j != i} e^(<a_i, b_j> / temperature) + sum_{j != i} e^(<a_i, a_j> / ...))
               - <a_i, b_i> / temperature

    and the same with the views exchanged; the mean of both.

    Args: temperature: > 0. normalize: divide rows by their norms first (True).

    loss(first [N, D], second [N, D]). Time O(4 N^2 D), memory O(N D).
    """

    keeps = True

    def __init__(self, temperature: float = 0.1, *, normalize: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.temperature, self.normalize = temperature, normalize

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        ids = count_up(first.shape[0], first)
        own: dict[str, Any] = dict(
            temperature=self.temperature, normalize=self.normalize, decoupled=True
        )
        given = {**self.common(), "memory_budget": half_of(self.memory_budget, first)}
        told: dict[str, Any] = dict(ids=ids, queue_ids=ids, **own, **given)
        ways = (first, second), (second, first)
        one, other = (info_nce(a, b, queue=a, **told) for a, b in ways)
        return (one + other) / 2


@entry(
    "Wang and Isola, Understanding Contrastive Representation Learning through Alignment and "
    "Uniformity on the Hypersphere",
    2020,
    block="contrastive",
    primitive="rows",
)
class AlignmentLoss(Loss):
    """`alignment`: how near rows are to their positives.

        loss_i = |x_i - y_i|^alpha

    Args: alpha: > 0. normalize: divide rows by their norms first (True).

    loss(x [N, D], y [N, D]). Time and memory O(N D).
    """

    def __init__(self, alpha: float = 2.0, *, normalize: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.alpha, self.normalize = alpha, normalize

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        own: dict[str, Any] = dict(alpha=self.alpha, normalize=self.normalize)
        return alignment(x, y, **own, reduction=self.reduction)


@entry(
    "Gu et al., UniME-V2: MLLM-as-a-Judge for Universal Multimodal Embedding Learning",
    2025,
    block="contrastive",
    primitive="rows",
    golden=("unimev2_symkl",),
)
class UniMEKLLoss(Loss):
    """`soft_label_kl`: a list's scores, drawn to a judge's by both divergences.

        loss_i = (KL(q || p) + KL(p || q)) / 2,   p = softmax(scores / T), q = softmax(judged / T)

    the logarithms of the second arguments being those of p + eps and q + eps, as the authors'.

    Args: temperature, eps: the authors'.

    loss(scores [N, K], judged [N, K]): of a positive and its hard negatives. Time and memory
    O(N K).
    """

    def __init__(self, temperature: float = 0.1, eps: float = 1e-8, **options: Any) -> None:
        super().__init__(**options)
        self.temperature, self.eps = temperature, eps

    def forward(self, scores: Tensor, judged: Tensor) -> Tensor:
        own: dict[str, Any] = dict(temperature=self.temperature, eps=self.eps)
        return soft_label_kl(scores, judged, **own, reduction=self.reduction)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return product(x, layer.weight.to(x.dtype)) + layer.bias.to(x.dtype)

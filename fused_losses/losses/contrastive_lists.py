"""Contrastive losses of anchors and documents, and of classes that open channels to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fused_losses.functions.gated_pairs import gated_contrastive
from fused_losses.functions.multiple_negatives import multiple_negatives
from fused_losses.losses.module import Loss
from fused_losses.losses.registry import entry


@entry(
    "Henderson et al., Efficient Natural Language Response Suggestion for Smart Reply",
    2017,
    block="contrastive",
    primitive="pairs",
)
class MultipleNegativesRankingLoss(Loss):
    """`multiple_negatives`, s the cosine: each anchor finds its positive among all documents.

        loss_i = log sum_documents e^(scale s(a_i, d)) - scale s(a_i, p_i)

    Args:
        scale, directions, partition_mode ("joint", "per_direction"): sentence-transformers'; all
            four directions in one denominator are GTE's loss, ("query_to_doc", "doc_to_query")
            per_direction the symmetric one.
        normalize: divide rows by their norms first (True).

    loss(anchor [N, D], positive [N, D], negatives [N, K, D]). Time O(N^2 (1 + K) D) a direction,
    memory O(N K D).
    """

    keeps = True

    def __init__(
        self,
        scale: float = 20.0,
        *,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.scale, self.normalize = scale, normalize
        self.directions, self.partition_mode = tuple(directions), partition_mode

    def forward(self, anchor: Tensor, positive: Tensor, negatives: Tensor | None = None) -> Tensor:
        return multiple_negatives(
            anchor,
            positive,
            negatives,
            scale=self.scale,
            directions=self.directions,
            partition=self.partition_mode,
            normalize=self.normalize,
            **self.common(),
        )


@entry(
    "Wu et al., Rethinking Positive Pairs in Contrastive Learning",
    2024,
    block="contrastive",
    primitive="pairs",
)
class HydraLoss(Loss):
    """`gated_contrastive`: InfoNCE in the channels that two classes open to each other.

        z_ij = sum_k g_abk q_ik k_jk / temperature,   a and b the classes of query i and key j
        loss_i = log sum_j e^z_ij - z_ii

    Args: temperature: > 0. normalize: divide rows by their norms, before the gates (True).

    loss(query [N, D], key [M, D], gates [A, B, D], labels [N], key_labels [M]): the gates are the
    caller's, of a network over two classes. Time O((N + A) M D), memory O((N + M) D).
    """

    def __init__(
        self, temperature: float = 0.07, *, normalize: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        self.temperature, self.normalize = temperature, normalize

    def forward(
        self, query: Tensor, key: Tensor, gates: Tensor, labels: Tensor, key_labels: Tensor
    ) -> Tensor:
        own: dict[str, Any] = dict(temperature=self.temperature, normalize=self.normalize)
        return gated_contrastive(query, key, gates, labels, key_labels, **own, **self.common())

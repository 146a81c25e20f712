"""Cross entropies whose rows count by what is known of them beside their loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.functions.row_weights import BiasWeights, equity_weights
from fused_losses.losses.owned import ClassifierLoss, of_classes, softmax_loss


class _Weighted(ClassifierLoss):
    """Cross entropy of plain scores times a weight a row, whose mean divides by the rows."""

    keeps = True

    def __init__(
        self, num_classes: int, embedding_size: int, *, normalize: bool = False, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, normalize=normalize, **options)

    def weighted(
        self,
        embeddings: Tensor,
        labels: Tensor,
        made: Tensor,
        *,
        row_weight: Tensor | None,
        reduction: str,
        **given: Any,
    ) -> Tensor:
        plain = torch.ones_like(made) if row_weight is None else row_weight.to(made)
        given = {**given, **dict(margin=None, scale=1.0, row_weight=made * plain)}
        whole = "sum" if reduction == "mean" else reduction
        loss = softmax_loss(embeddings, self.weight, labels, reduction=whole, **given)
        return self.over_rows(loss, labels, plain) if reduction == "mean" else loss


@of_classes(
    "Abrahamyan et al., Bias Loss for Mobile Neural Networks",
    2021,
    "biasloss_global",
    "biasloss_local",
)
class BiasLoss(_Weighted):
    """Cross entropy times `class_losses.BiasWeights`, larger where a sample's features vary more.

        loss = 1/N sum_i (exp(alpha v_i) - beta) CE_i,   v_i the scaled variance of features i

    loss(embeddings, labels, features=): [N, ...] whose variances count; None: the embeddings.
    The weights have no gradient.
    Args: alpha, beta: the paper's. within: "global", from the least variance so far, in
    `weights.low`; "local": of the batch. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        alpha: float = 0.3,
        beta: float = 0.3,
        within: str = "global",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.weights = BiasWeights(alpha, beta, within).to(self.weight.device)

    def loss(
        self, embeddings: Tensor, labels: Tensor, *, features: Tensor | None = None, **given: Any
    ) -> Tensor:
        made = self.weights(embeddings if features is None else features)
        return self.weighted(embeddings, labels, made, **given)


@of_classes(
    "Shekhar et al., DatasetEquity: Are All Samples Created Equal? In The Quest For Equity Within "
    "Datasets",
    2023,
)
class DatasetEquityLoss(_Weighted):
    """Cross entropy times `class_losses.equity_weights`, larger for rare samples.

        loss = 1/N sum_i (eta + (1 - p_i)^gamma) / (eta + 1) CE_i

    loss(embeddings, labels, likelihood=): [N] p_i of a sample in the data set, without gradient.
    Args: gamma, eta: the paper's. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        gamma: float = 5.0,
        eta: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.gamma, self.eta = gamma, eta

    def loss(
        self, embeddings: Tensor, labels: Tensor, *, likelihood: Tensor, **given: Any
    ) -> Tensor:
        made = equity_weights(likelihood, gamma=self.gamma, eta=self.eta)
        return self.weighted(embeddings, labels, made, **given)

"""Contrastive losses of a batch by its labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.indices import Indices, checked_indices
from fused_losses.base.validation import check_integers
from fused_losses.functions.contrastive import (
    nt_xent,
    soft_nearest_neighbor,
    supervised_contrastive,
)
from fused_losses.functions.pair_weighting import n_pairs
from fused_losses.losses.module import MetricLoss
from fused_losses.losses.registry import entry


@entry(
    "Chen et al., A Simple Framework for Contrastive Learning of Visual Representations",
    2020,
    block="contrastive",
    primitive="pairs",
)
class NTXentLoss(MetricLoss):
    """`nt_xent`: the mean over the positive pairs (i, p), z the cosine / temperature.

        pairs:  log(e^z_ip + sum_N e^z_in) - z_ip
        simclr: log sum_{k != i} e^z_ik - z_ip

    Args: temperature: 0.07, pytorch-metric-learning's; SimCLR has 0.1 to 0.5. form: "pairs", as
    there, where other positives of i are in no denominator, or the paper's "simclr": the same where
    a row has one positive. Time O(3 N^2 D / 2), memory O(N D); of P listed pairs O(P D).
    """

    keeps = True

    def __init__(
        self, temperature: float | Tensor = 0.07, *, form: str = "pairs", **options: Any
    ) -> None:
        super().__init__(**options)
        self.temperature, self.form = temperature, form

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own: dict[str, Any] = dict(temperature=self.temperature, form=self.form)
        return nt_xent(embeddings, labels, **own, **given)


@entry(
    "Khosla et al., Supervised Contrastive Learning",
    2020,
    block="contrastive",
    primitive="pairs",
    golden=("pml_SupConLoss", "supcon_simclr", "supcon_labels_one"),
)
class SupConLoss(MetricLoss):
    """`supervised_contrastive`, z the cosine / temperature.

        loss_i = log sum_{k != i} e^z_ik - mean_P z_ip

    Args: temperature: 0.1, the paper's and pytorch-metric-learning's; the authors' code has 0.07
    and multiplies by temperature / base_temperature, 0.07 (None: it does not). without_positive:
    "skip", as pytorch-metric-learning has it: the mean is over rows with a positive; "zero", the
    authors: over all rows. Time O(N^2 D / 2), memory O(N D); of P listed pairs O(P D).
    """

    keeps = True

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        base_temperature: float | None = None,
        without_positive: str = "skip",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.temperature, self.base_temperature = temperature, base_temperature
        self.without_positive = without_positive

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own: dict[str, Any] = dict(
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            without_positive=self.without_positive,
        )
        return supervised_contrastive(embeddings, labels, **own, **given)


@entry(
    "Frosst et al., Analyzing and Improving Representations with the Soft Nearest Neighbor Loss",
    2019,
    block="contrastive",
    primitive="pairs",
)
class SoftNearestNeighborLoss(MetricLoss):
    """`soft_nearest_neighbor`: the share of its class in a row's neighbourhood.

        loss_i = log sum_{k != i} e^(-|x_i - x_k|^2 / T) - log sum_P e^(-|x_i - x_p|^2 / T)

    Args: temperature: T, 1; the paper learns 1 / T. The paper's rows are as they come
    (normalize=False). The mean is over rows with a positive.
    Time O(N^2 D / 2), memory O(N D); of P listed pairs O(P D).
    """

    keeps = True

    def __init__(self, temperature: float | Tensor = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = temperature

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        return soft_nearest_neighbor(embeddings, labels, temperature=self.temperature, **given)


@entry(
    "Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective",
    2016,
    block="contrastive",
    primitive="pairs",
    golden=("pml_NPairsLoss",),
)
class NPairsLoss(MetricLoss):
    """`n_pairs` of one (anchor, positive) a class: its first two rows, or its first listed pair.

        loss_i = log sum_j e^<a_i, p_j> - <a_i, p_i> + l2_weight (|a_i|^2 + |p_i|^2) / 2

    Args: l2_weight: of the paper's regulariser, on rows as they come; 0. The paper's rows are not
    normalised (normalize=False); pytorch-metric-learning's are. No ref_emb. How many classes have a
    pair is read on the host. Time O(N log N + C^2 D), memory O(N D), C classes.
    """

    keeps = True

    def __init__(self, l2_weight: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.l2_weight = l2_weight

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        if given.pop("ref_embeddings", None) is not None or "ref_labels" in given:
            raise ValueError("ref_emb: expected None, the pairs are those of one batch")
        check_integers("labels", labels, (embeddings.shape[0],), embeddings)
        a, p = first_pairs(embeddings, labels, given.pop("indices", None))
        anchors, positives = embeddings[a], embeddings[p]
        return n_pairs(anchors, positives, l2_weight=self.l2_weight, **given)


def first_pairs(
    embeddings: Tensor, labels: Tensor, indices: Indices | None
) -> tuple[Tensor, Tensor]:
    """One (anchor, positive) of each class that has one: its first two rows, or its first listed.

    Rows of embeddings, int64, in the order of the classes' labels.
    """
    if indices is None:
        _, order = labels.sort(stable=True)
        a, p = order[:-1], order[1:]
        alike = labels[a] == labels[p]
        a, p = a[alike], p[alike]
    else:
        n = embeddings.shape[0]
        a, p = checked_indices(indices, n, n, embeddings)[:2]
    # the first line of each class
    _, line = labels[a].sort(stable=True)
    a, p = a[line], p[line]
    first = torch.ones_like(a, dtype=torch.bool)
    first[1:] = labels[a[1:]] != labels[a[:-1]]
    return a[first], p[first]

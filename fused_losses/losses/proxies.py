"""Losses against learnt proxies, one of a class or several, and centres of classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.base.indices import Indices
from fused_losses.base.numerics import no_autocast, reduced, unit_rows
from fused_losses.base.parameters import check_above
from fused_losses.base.validation import check_choice
from fused_losses.functions.class_values import MLCD, ClassLoss, SoftTriple
from fused_losses.functions.labels_together import LabelsTogether
from fused_losses.functions.proxies import proxy_anchor, proxy_nca
from fused_losses.losses.owned import (
    ClassifierLoss,
    ValuedClassifier,
    checked_rows,
    of_classes,
    refuse_references,
)
from fused_losses.margins import CosFace

PLAIN: dict[str, Any] = dict(normalize=False)  # rows and centres as they are


class _Proxies(ClassifierLoss):
    """`weight` is pytorch-metric-learning's `proxies`, [C, D] there, too."""

    keeps = True
    former = "proxies"

    def of_former(self, stored: Tensor) -> Tensor:
        return stored

    def check_whole(self) -> None:
        """The functions of proxies ignore no label."""
        if self.ignore_index != -100:
            raise ValueError(
                f"ignore_index: expected -100 of {type(self).__name__}, every row of which has a "
                "class"
            )


@of_classes(
    "Movshovitz-Attias et al., No Fuss Distance Metric Learning using Proxies",
    2017,
    "pml_ProxyNCALoss",
    primitive="pairs",
    block="proxies",
)
class ProxyNCALoss(_Proxies):
    """`proxy_nca`: a softmax over -softmax_scale |x_i - w_c|^2, rows and proxies of norm 1.

    Args: softmax_scale: > 0. positive_in_denominator: True, as pytorch-metric-learning computes;
    False: over the other proxies alone, the paper's. Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        softmax_scale: float = 1.0,
        *,
        positive_in_denominator: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        check_above("softmax_scale", softmax_scale)
        self.softmax_scale = softmax_scale
        self.positive_in_denominator = positive_in_denominator

    def loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        ignore_index: int,  # noqa: ARG002 (checked)
        row_weight: Tensor | None,
        reduction: str,
        **given: Any,
    ) -> Tensor:
        self.check_whole()
        own = dict(scale=self.softmax_scale, positive_in_denominator=self.positive_in_denominator)
        given = {**given, **own}
        if row_weight is None:
            return proxy_nca(embeddings, self.weight, labels, reduction=reduction, **given)
        each = proxy_nca(embeddings, self.weight, labels, reduction="none", **given)
        return reduced(
            each, torch.ones_like(labels, dtype=torch.bool), reduction, each.dtype, row_weight
        )


@of_classes(
    "Kim et al., Proxy Anchor Loss for Deep Metric Learning",
    2020,
    primitive="pairs",
    block="proxies",
)
class ProxyAnchorLoss(_Proxies):
    """`proxy_anchor`: the proxies are the anchors of the batch's rows, all of norm 1.

        log(1 + sum_{y_i = c} e^(-alpha (s - margin)))    mean over the proxies of the batch
        log(1 + sum_{y_i != c} e^(alpha (s + margin)))    mean over all proxies

    A miner's indices multiply the terms of row i by e^(w_i - 1), as pytorch-metric-learning has it
    (`proxy_anchor`); row weights are refused: the rows have no losses of their own.
    Args: margin, alpha: the paper's. reduction: as in `proxy_anchor`.
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.1,
        alpha: float = 32.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        self.margin, self.alpha = margin, alpha

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out")

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        self.check_whole()
        refuse_references(self, ref_emb, ref_labels)
        if row_weight is not None:
            raise ValueError(
                "row_weight: expected None of ProxyAnchorLoss, whose terms are the proxies' and "
                "not the rows'"
            )
        given = {k: v for k, v in self.common().items() if k != "ignore_index"}
        own = dict(margin=self.margin, alpha=self.alpha, indices=indices)
        return proxy_anchor(embeddings, self.weight, labels, **own, **given)


@of_classes(
    "Qian et al., SoftTriple Loss: Deep Metric Learning Without Triplet Sampling",
    2019,
    "pml_SoftTripleLoss",
    primitive="class_rules",
    block="proxies",
)
class SoftTripleLoss(ValuedClassifier):
    """`class_losses.SoftTriple`: a softmax over classes whose centres are pooled softly.

        S_c = sum_k softmax_k(c_ck / gamma) c_ck,     z_j = la (S_j - margin [j = y])

    weight [C, K, D]; pytorch-metric-learning's `fc` is [D, C K]. The paper's regulariser, which
    draws the centres of a class together, is not here.
    Args: centers_per_class: K. la, gamma > 0, margin. Time O(N C K D), memory O((N + C K) D).
    """

    former = "fc"

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        centers_per_class: int = 10,
        la: float = 20.0,
        gamma: float = 0.1,
        margin: float = 0.01,
        **options: Any,
    ) -> None:
        options = dict(centers=centers_per_class, **options)
        super().__init__(num_classes, embedding_size, **options)
        self.centers_per_class, self.la, self.gamma = centers_per_class, la, gamma
        self.margin = margin
        self.value()

    def value(self) -> ClassLoss:
        return SoftTriple(self.la, self.gamma, self.margin)


FORMS = ("sums", "softmax")


@of_classes(
    "An et al., Multi-label Cluster Discrimination for Visual Representation Learning",
    2024,
    primitive="class_rules",
    block="proxies",
)
class MLCDLoss(ValuedClassifier):
    """Multi-label cluster discrimination: labels [N, L] of several clusters a row.

        form "sums":     log(1 + sum_labels e^(-s c_p)) + log(1 + sum_neg e^(s c_j))
        form "softmax":  mean over the labels of a margin softmax of each against all other classes,
                         the row's other labels among them (`class_losses.LabelsTogether`)

    "sums" is the paper's, "softmax" what its authors' published training has since.
    Args: scale: s (the paper leaves it open: ours). margin: of "softmax", taken from the label's
    cosine (ours, too). For a sample of the classes use either in `ClassCenters`.
    Time O(N (C + L) D + N L^2), memory O((N + C) D + N L^2).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 64.0,
        form: str = "sums",
        margin: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **options)
        check_choice("form", form, FORMS)
        self.scale, self.form, self.margin = scale, form, margin
        self.value()

    def value(self) -> ClassLoss:
        if self.form == "sums":
            return MLCD(self.scale)
        return LabelsTogether(CosFace(self.margin), self.scale)


@of_classes(
    "Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition",
    2016,
    primitive="rows",
    block="proxies",
)
class CenterLoss(ClassifierLoss):
    """|x_i - w_{y_i}|^2 / 2: rows drawn to the centres of their classes, read by their labels.

    The centres move by their gradient, not by the paper's own rule. Rows and centres as they are.
    Time and memory O(N D), and the gradient of the weight.
    """

    def __init__(self, num_classes: int, embedding_size: int, **options: Any) -> None:
        super().__init__(num_classes, embedding_size, **PLAIN | options)

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        rows = checked_rows(self, embeddings, labels, **given)
        with no_autocast(embeddings.device):
            w = self.weight[rows.known].to(rows.x.dtype)
            x = rows.x
            if self.normalize:
                x, w = unit_rows(x), unit_rows(w)
            each = torch.where(rows.valid[:, None], x - w, 0).square().sum(dim=1) / 2
            return rows.reduced(each, given)

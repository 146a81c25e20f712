"""Losses against the mean of a class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.examples import examples
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced
from fused_losses.base.sides import batch_sides, class_sides
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_at_least, check_plain
from fused_losses.functions.chosen_triplets import chosen_distances, violated
from fused_losses.functions.scored_rows import scored_rows
from fused_losses.primitives.row_rules.inputs import RowInputs

SMALLEST_SQUARE = 1e-12  # the authors' floor under the squared distances


def centroid_triplet(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    margin: float | None = 0.5,
    centroid_anchors: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Centroid triplets at margin=0.5 (`CentroidTripletLoss`: 0.3).

    Batch-hard triplets of rows and leave-one-out centroids of their classes.

    In round r the r-th row of each class meets the classes' centroids c, each the mean of its
    class's other rows. embeddings [N, D], labels [N] integers; a class of one row takes no part.

    centroid_anchors: True (the authors' code): rows and centroids of a round are one batch, each
    an anchor, positive and negative in turn; d = sqrt(max(|.|^2, 1e-12)). False (the paper): rows
    are the anchors, centroids the positives and negatives. reduction: "mean" over the anchors with
    a negative in their round (classes of equal size: the mean of the rounds' means), "sum", "none"
    [2 N] or [N]: rows, then centroids. margin None: log(1 + e^.). ref_embeddings, ref_labels:
    [M, D], [M], whose classes' means are the centroids, of all rows, for a batch that is no part of
    them; with centroid_anchors=False.

    Returns float32 (float64 for float64 inputs), differentiable to any order. Raises ValueError,
    TypeError for bad arguments. Time O(N M D), memory O((N + M) D) and a few blocks.
    Paper: Wieczorek et al., On the Unreasonable Effectiveness of Centroids, 2021.
    """
    check_plain(margin=margin)
    both = batch_sides(embeddings, labels, reduction, precision, ref_embeddings, ref_labels)
    if centroid_anchors and not both.alone:
        raise ValueError(
            "centroid_anchors: expected False with ref_embeddings, whose centroids are no anchors, "
            "got True"
        )
    if margin is not None:
        check_at_least("margin", margin, 0)
    with no_autocast(embeddings.device):
        dtype = accumulate_dtype(both.x.dtype)
        x = both.x.to(dtype)
        x = unit(x) if normalize else x
        if both.alone:
            inputs = _of_itself(x, labels, both.labels[0], centroid_anchors, precision)
        else:
            y = both.y.to(dtype)
            y = _class_means(unit(y) if normalize else y, both.labels[1])
            inputs = RowInputs(x, y, *both.labels, score="sqeuclidean", precision=precision)
        near, far, found = chosen_distances(inputs, "hardest", "hardest", backend)
        near, far = (d.clamp_min(SMALLEST_SQUARE).sqrt() for d in (near, far))
        return reduced(violated(near, far, margin), found, reduction, dtype)


def _of_itself(
    x: Tensor, labels: Tensor, numbers: Tensor, centroid_anchors: bool, precision: str
) -> RowInputs:
    """Rows and leave-one-out centroids, a group a round."""
    others, rank = _leave_one_out(x, labels)
    # -1 and -2 meet nothing
    x_groups = torch.where(rank < 0, -1, rank)
    y_groups = torch.where(rank < 0, -2, rank)
    y = others
    if centroid_anchors:
        x = y = torch.cat([x, others])
        numbers = numbers.repeat(2)
        x_groups, y_groups = x_groups.repeat(2), y_groups.repeat(2)
    options: dict[str, Any] = dict(
        score="sqeuclidean", skip_self=centroid_anchors, precision=precision
    )
    return RowInputs(x, y, numbers, numbers, x_groups, y_groups, **options)


def _class_means(y: Tensor, labels: Tensor) -> Tensor:
    """The mean of each row's class, in the place of the row: no size depends on values. [M, D]"""
    numbers = labels.sort().values
    # of each row, where its class begins among sorted rows, and how many it has
    first = torch.searchsorted(numbers, labels)
    size = torch.searchsorted(numbers, labels, right=True) - first
    # in place: beside the rows, the sums and the means alone
    sums = torch.zeros_like(y).index_add_(0, first, y)
    return sums.index_select(0, first).div_(size[:, None])


def _leave_one_out(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each row's class without it [N, D], and its place in its class [N] int32.

    The place is -1 and the mean 0 where there is no other.
    """
    n = x.shape[0]
    # numbers below N, whatever the labels
    numbers, order = labels.sort(stable=True)
    places = torch.arange(n, device=x.device)
    first = torch.searchsorted(numbers, numbers)
    size = torch.searchsorted(numbers, numbers, right=True) - first
    sums = torch.zeros_like(x).index_add(0, first, x.index_select(0, order))
    others = sums.index_select(0, first) - x.index_select(0, order)
    others = others / (size - 1).clamp_min(1)[:, None]
    alone = size == 1
    others = torch.where(alone[:, None], 0, others)
    back = order.argsort()
    rank = torch.where(alone, -1, places - first).int()
    return others.index_select(0, back), rank.index_select(0, back)


def prototype_triplet(
    embeddings: Tensor,  # [N, D]
    prototypes: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    *,
    margin: float = 0.5,
    eps: float = 1e-6,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """A row's own prototype against the nearest other one, d = sqrt(|x - p|^2 + eps).

        loss_i = [d(x_i, p_y) - min_{c != y} d(x_i, p_c) + margin]+

    embeddings [N, D], prototypes [C, D] (class means of a support set), labels [N] in [0, C).
    reduction: "mean" over the rows (over none with one class: 0), "sum", "none" [N].

    Returns float32 (float64 for float64 inputs), differentiable to any order. Raises ValueError,
    TypeError, IndexError for bad arguments. Time O(N C D); memory O((N + C) D) and a few blocks.
    Paper: Mendez-Ruiz et al., SuSana Distancia is all you need, 2023.
    """
    check_plain(margin=margin, eps=eps)
    both = class_sides(embeddings, "prototypes", prototypes, labels, reduction, precision)
    check_at_least("margin", margin, 0)
    check_at_least("eps", eps, 0)
    with no_autocast(embeddings.device):
        inputs = scored_rows(both, "sqeuclidean", precision)
        near, far, found = chosen_distances(inputs, "hardest", "hardest", backend)
        # over nothing the root has no use for its slope
        near, far = (torch.where(found, d + eps, 1).sqrt() for d in (near, far))
        loss = violated(near, far, margin)
        return reduced(loss, found, reduction, accumulate_dtype(both.x.dtype))


examples(
    centroid_triplet,
    lambda f, t: f(t.x, t.labels),
    {"": {}, "of queries": {"centroid_anchors": False}},
)
examples(
    centroid_triplet,
    lambda f, t: f(t.x, t.labels, t.y, t.y_labels, centroid_anchors=False),
    {"ref": {}},
)
examples(prototype_triplet, lambda f, t: f(t.x, t.w, t.targets))

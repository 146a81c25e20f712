"""Losses over triplets, and over pairs against a margin, without listing them.

d is the distance by name: "euclidean" |x - y|, "sqeuclidean" |x - y|^2 or "cosine" 1 - <x, y> of
unit rows. Equal labels make a positive; where a batch meets itself a row is not its own positive.
A row without a positive or without a negative has no triplet: it is left out of every mean over
triplets, and with reduction="none" its loss is 0. Losses over pairs take the pairs that it has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.integers import count_up, dense, dense_pair
from fused_losses.base.numerics import (
    accumulate_dtype,
    no_autocast,
    reduced,
    root,
    row_dtype,
    softplus,
)
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import (
    check_at_least,
    check_both,
    check_class_ids,
    check_integers,
    check_rows,
    number,
)
from fused_losses.pair_front import scored, triangle
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, Rule
from fused_losses.primitives.pairs.op import PairStatistics, pair_statistics
from fused_losses.primitives.row_rules.inputs import PICKS, SCORES, TRIPLETS, RowInputs
from fused_losses.primitives.row_rules.op import row_losses
from fused_losses.primitives.topk.inputs import TopkInputs
from fused_losses.primitives.topk.op import best_screen, select

DISTANCES = ("euclidean", "sqeuclidean", "cosine")
PER = ("pair", "triplet")
SMALLEST_SQUARE = 1e-12  # the authors' floor under the squared distances of a centroid triplet


class Sides(NamedTuple):
    """Rows and columns with their labels as int32 numbers."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D], x itself where a batch meets itself
    x_labels: Tensor  # [N] int32
    y_labels: Tensor  # [M] int32
    alone: bool  # the batch meets itself

    def rows(self, distance: str, precision: str, normalize: bool = False) -> RowInputs:
        """The primitive's inputs but for its rule; rows of norm 1 if so wanted.

        distance: one of DISTANCES, or "dot" for the product itself.
        """
        x, y = self.x, self.y
        if normalize:
            # the blocks are in this dtype: nothing is won by rounding before
            dtype = accumulate_dtype(x.dtype)
            x = unit(x.to(dtype))
            y = x if self.y is self.x else unit(self.y.to(dtype))
        score = {"cosine": "minus_dot"}.get(distance, distance)
        labels = self.x_labels, self.y_labels
        return RowInputs(x, y, *labels, score=score, skip_self=self.alone, precision=precision)


def check_sides(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    reduction: str,
    precision: str,
) -> Tensor:
    """A batch [N, D] with labels [N], alone or against a second; under autocast in its dtype."""
    if (ref_embeddings is None) != (ref_labels is None):
        given, missing = ("ref_embeddings", "ref_labels")[:: 1 if ref_labels is None else -1]
        raise ValueError(f"{missing}: expected a tensor beside {given}, got None")
    if ref_embeddings is None:
        check_rows("embeddings", embeddings, precision)
    else:
        embeddings = check_both(
            "embeddings", embeddings, "ref_embeddings", ref_embeddings, precision
        )
        check_integers("ref_labels", ref_labels, (ref_embeddings.shape[0],), embeddings)
    check_integers("labels", labels, (embeddings.shape[0],), embeddings)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    return embeddings


def sides(x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None) -> Sides:
    """Both sides, y being x without a second."""
    if y is None:
        numbers = dense(labels)
        return Sides(x, x, numbers, numbers, True)
    return Sides(x, y, *dense_pair(labels, y_labels), False)


def over_nonzero(total: Tensor, count: Tensor) -> Tensor:
    """Sum of the totals over the sum of the counts, 0 over none."""
    return total.sum() / count.sum().clamp_min(1)


def over_terms(total: Tensor, count: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """Rows' sums of terms [N] and their numbers: the mean over terms, the sum, or the rows'."""
    if reduction == "mean":
        total = over_nonzero(total, count)
    elif reduction == "sum":
        total = total.sum()
    return total.to(dtype)


def all_triplets(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    margin: float = 0.05,
    triplets: str = "all",
    smooth: bool = False,
    distance: str = "euclidean",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """The sum over all triplets (a, p, n) of [d_ap - d_an + margin]+, by counting.

    Args:
        embeddings, labels: [N, D], [N] integers, the anchors. ref_embeddings, ref_labels: [M, D],
            [M], where positives and negatives come from; without them the batch itself.
        margin: >= 0.
        triplets: "all"; "hard": d_an <= d_ap; "semihard": d_ap < d_an <= d_ap + margin; "easy":
            d_an > d_ap + margin, with smooth=True only (the hinge is 0 there). The choice is not
            differentiated.
        smooth: log(1 + e^(d_ap - d_an + margin)) in the place of the hinge.
        distance: "euclidean", "sqeuclidean", "cosine" (of rows of norm 1; FaceNet: sqeuclidean,
            margin 0.2, semihard, normalize=True).
        reduction: "mean" over the triplets whose loss is not 0 (pytorch-metric-learning), "sum",
            "none" [N]: the sum of each anchor's.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    A row's gradient is counts: of the negatives that violate a positive, and the reverse.
    Time O(N M D), and O(M P) a row with P <= 32 positives, else O(M log M); smooth: O(M P). Memory
    O((N + M) D) and a few blocks. Paper: Schroff et al., FaceNet, 2015.
    """
    embeddings = check_sides(embeddings, labels, ref_embeddings, ref_labels, reduction, precision)
    check_at_least("margin", margin, 0)
    validation.check_choice("triplets", triplets, TRIPLETS)
    validation.check_choice("distance", distance, DISTANCES)
    if triplets == "easy" and not smooth:
        raise ValueError("triplets: expected smooth=True with 'easy', whose hinges are all 0")
    with no_autocast(embeddings.device):
        both = sides(embeddings, labels, ref_embeddings, ref_labels)
        inputs = both.rows(distance, precision, normalize)
        return _over_triplets(inputs, margin, triplets, smooth, reduction, backend)


def _over_triplets(
    inputs: RowInputs,
    margin: float,
    triplets: str,
    smooth: bool,
    reduction: str,
    backend: str | None,
) -> Tensor:
    params = (margin, TRIPLETS.index(triplets), smooth)
    inputs = inputs._replace(rule="triplets", params=params)
    total, count = row_losses(inputs, backend=backend).unbind(dim=1)
    return over_terms(total, count, reduction, accumulate_dtype(inputs.x.dtype))


def harmonic_triplet(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    frozen: Tensor,  # [M, D]
    frozen_labels: Tensor | None = None,  # [M]
    *,
    margin: float = 0.2,
    triplets: str = "semihard",
    distance: str = "sqeuclidean",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """`all_triplets` of a new model's rows among themselves and an old model's, which stay put.

    embeddings [N, D], labels [N] integers: the new model's, the anchors. frozen [M, D]: the old
    model's, further positives and negatives without a gradient; frozen_labels [M] (None: frozen
    are the same samples). A row is not its own positive, but its old version is. Other arguments,
    result, errors and cost as in `all_triplets`, with N + M columns.
    """
    embeddings = check_both("embeddings", embeddings, "frozen", frozen, precision)
    frozen_labels = labels if frozen_labels is None else frozen_labels
    check_integers("labels", labels, (embeddings.shape[0],), embeddings)
    check_integers("frozen_labels", frozen_labels, (frozen.shape[0],), embeddings)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    validation.check_choice("triplets", triplets, TRIPLETS[:3])
    validation.check_choice("distance", distance, DISTANCES)
    check_at_least("margin", margin, 0)
    with no_autocast(embeddings.device):
        numbers, others = dense_pair(labels, frozen_labels)
        columns = torch.cat([embeddings, frozen.detach()])
        both = Sides(embeddings, columns, numbers, torch.cat([numbers, others]), True)
        inputs = both.rows(distance, precision, normalize)
        return _over_triplets(inputs, margin, triplets, False, reduction, backend)


# ---- listed triplets ----------------------------------------------------------------------------


def triplet_margin(
    anchor: Tensor,  # [T, D]
    positive: Tensor,  # [T, D]
    negative: Tensor,  # [T, D]
    *,
    triplets: tuple[Tensor, Tensor, Tensor] | None = None,  # [T] each
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    smooth: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.triplet_margin_loss` of listed triplets: [d_ap - d_an + margin]+.

    Args:
        anchor, positive, negative: [T, D]; or with triplets any number of rows each.
        triplets: three integer tensors [T], the rows of anchor, positive and negative of each
            triplet: triplet_margin(x, x, x, triplets=mined).
        margin: > 0. p: of the norm. eps: added to each difference, as torch does.
        swap: d_pn in the place of d_an where it is smaller. smooth: log(1 + e^.), not the hinge.
        reduction: "mean" over the triplets (0 over none), "sum", "none" [T].

    Returns float32 (float64 for float64 inputs); differentiable to any order. Raises ValueError,
    TypeError, IndexError for bad arguments. Time and memory O(T D).
    """
    parts = dict(anchor=anchor, positive=positive, negative=negative)
    for name, rows in parts.items():
        validation.check_matrix(name, rows, "[T, D]")
        if rows.shape[1] != anchor.shape[1]:
            raise ValueError(
                f"{name}: expected [T, {anchor.shape[1]}] as anchor has, got "
                f"{validation.describe(rows)}"
            )
        validation.check_device("anchor", anchor, name, rows)
        validation.check_same_dtype("anchor", anchor, name, rows)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    for name, value in (("margin", margin), ("p", p)):
        number(name, value, anchor)
    check_at_least("eps", eps, 0)
    if triplets is None:
        for name, rows in parts.items():
            if rows.shape != anchor.shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(anchor.shape)} as anchor has, got "
                    f"{validation.describe(rows)}"
                )
    else:
        if not isinstance(triplets, tuple | list) or len(triplets) != 3:
            raise TypeError("triplets: expected (anchor, positive, negative) indices, three of [T]")
        for name, index in zip(parts, triplets, strict=True):
            size = triplets[0].shape[0] if isinstance(triplets[0], Tensor) else None
            check_integers(f"triplets, {name}", index, (size,), anchor)
            check_class_ids(f"triplets, {name}", index, parts[name].shape[0])
    with no_autocast(anchor.device):
        dtype = accumulate_dtype(anchor.dtype)
        a, near, far = (rows.to(dtype) for rows in parts.values())
        if triplets is not None:
            a, near, far = (
                rows.index_select(0, index.long())
                for rows, index in zip((a, near, far), triplets, strict=True)
            )
        d_near, d_far = (F.pairwise_distance(a, rows, p, eps) for rows in (near, far))
        if swap:
            d_far = torch.minimum(d_far, F.pairwise_distance(near, far, p, eps))
        violation = d_near - d_far + margin
        loss = softplus(violation) if smooth else F.relu(violation)
        return reduced(loss, torch.ones_like(loss, dtype=torch.bool), reduction, dtype)


# ---- one positive and one negative a row --------------------------------------------------------


def listed_distances(x: Tensor, y: Tensor, index: Tensor, distance: str) -> Tensor:
    """d(x_i, y_index[i, l]), of an index < 0 with row 0; differentiable to any order. [N, L]"""
    dtype = accumulate_dtype(x.dtype)
    near = y.index_select(0, index.clamp_min(0).flatten()).to(dtype)
    near = near.view(*index.shape, y.shape[1])
    x = x.to(dtype)[:, None]
    if distance == "cosine":
        return 1 - (x * near).sum(dim=2)
    squared = (x - near).square().sum(dim=2)
    return squared if distance == "sqeuclidean" else root(squared)


def _chosen(
    inputs: RowInputs, positive: str, negative: str, distance: str, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """d of each row's chosen positive and negative, [N] each, and which rows have both."""
    formula = backends.requested(backend) == "reference"
    extreme = "semihard" not in (positive, negative) and inputs.x_groups is None
    if extreme and not formula:
        index = _extremes(inputs, positive == "hardest", negative == "hardest", backend)
    else:
        params = (PICKS.index(positive), PICKS.index(negative))
        inputs = inputs._replace(rule="chosen", params=params)
        index = row_losses(inputs, backend=backend).long()
    if inputs.y.shape[0] == 0:
        nothing = inputs.x.to(accumulate_dtype(inputs.x.dtype)).sum(dim=1) * 0
        return nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool)
    found = (index >= 0).all(dim=1)
    near, far = listed_distances(inputs.x, inputs.y, index, distance).unbind(dim=1)
    if extreme and not formula:
        # a NaN among a row's candidates would have been the extreme one
        near = torch.where(inputs.y.detach().isnan().any(), torch.nan, near)
    return torch.where(found, near, 0), torch.where(found, far, 0), found


def _extremes(inputs: RowInputs, farthest: bool, nearest: bool, backend: str | None) -> Tensor:
    """The columns of each row's extreme positive and negative, -1 over none. [N, 2]"""
    kind, sign = SCORES[inputs.score]
    # NaN is put back by the distances of what is chosen
    x = inputs.x.detach().nan_to_num(0, torch.inf, -torch.inf)
    same = inputs.y is inputs.x
    y = x if same else inputs.y.detach().nan_to_num(0, torch.inf, -torch.inf)

    def best(match: str, far: bool) -> Tensor:
        return select(
            TopkInputs(
                x,
                y,
                x_labels=inputs.x_labels,
                y_labels=inputs.y_labels,
                kind="dot" if kind == "dot" else "sqeuclidean",
                k=1,
                largest=far == (sign > 0),
                match=match,
                skip_self=inputs.skip_self,
                symmetric=same,
                screen=best_screen(x, backend),
            ),
            backend,
        )[1]

    return torch.cat([best("same", farthest), best("different", not nearest)], dim=1)


def _violated(near: Tensor, far: Tensor, margin: float | None) -> Tensor:
    """The hinge, or without a margin softplus. [N]"""
    return softplus(near - far) if margin is None else F.relu(near - far + margin)


def batch_hard_triplet(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    margin: float | None = None,
    distance: str = "euclidean",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Each row's farthest positive against its nearest negative, the first of equal ones.

        loss_i = [max_P d - min_N d + margin]+;   margin=None: log(1 + e^(max_P d - min_N d))

    embeddings [N, D], labels [N] integers, and ref_embeddings [M, D], ref_labels [M] where the
    positives and negatives are not the batch itself. reduction: "mean" over the rows that have
    both, "sum", "none" [N].

    Returns float32 (float64 for float64 inputs), differentiable to any order. Raises ValueError,
    TypeError for bad arguments. Time O(N M D); memory O((N + M) D) and a few blocks.
    Paper: Hermans et al., In Defense of the Triplet Loss, 2017.
    """
    return batch_easy_hard_triplet(
        embeddings,
        labels,
        ref_embeddings,
        ref_labels,
        positive="hardest",
        negative="hardest",
        margin=margin,
        distance=distance,
        normalize=normalize,
        reduction=reduction,
        precision=precision,
        backend=backend,
    )


def batch_easy_hard_triplet(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    positive: str = "easiest",
    negative: str = "semihard",
    margin: float | None = 0.05,
    distance: str = "euclidean",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """One positive and one negative a row, chosen each its own way; else `batch_hard_triplet`.

    positive: "hardest" (farthest), "easiest" (nearest) or "semihard": the farthest that is nearer
    than the chosen negative. negative: "hardest" (nearest), "easiest" or "semihard": the nearest
    that is farther than the chosen positive. Not both "semihard". A row without such a pair is
    left out as well. Paper: Xuan et al., Improved Embeddings with Easy Positive Triplet Mining,
    2020.
    """
    embeddings = check_sides(embeddings, labels, ref_embeddings, ref_labels, reduction, precision)
    validation.check_choice("positive", positive, PICKS)
    validation.check_choice("negative", negative, PICKS)
    validation.check_choice("distance", distance, DISTANCES)
    if margin is not None:
        check_at_least("margin", margin, 0)
    if positive == negative == "semihard":
        raise ValueError("negative: expected another choice beside positive='semihard'")
    with no_autocast(embeddings.device):
        both = sides(embeddings, labels, ref_embeddings, ref_labels)
        inputs = both.rows(distance, precision, normalize)
        near, far, found = _chosen(inputs, positive, negative, distance, backend)
        loss = _violated(near, far, margin)
        return reduced(loss, found, reduction, accumulate_dtype(embeddings.dtype))


def centroid_triplet(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    margin: float | None = 0.5,
    centroid_anchors: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Batch-hard triplets of rows and leave-one-out centroids of their classes.

    In round r the r-th row of each class meets the classes' centroids c, each the mean of its
    class's other rows. embeddings [N, D], labels [N] integers; a class of one row takes no part.

    centroid_anchors: True (the authors' code): rows and centroids of a round are one batch, each
    an anchor, positive and negative in turn; d = sqrt(max(|.|^2, 1e-12)). False (the paper): rows
    are the anchors, centroids the positives and negatives. reduction: "mean" over the anchors with
    a negative in their round (classes of equal size: the mean of the rounds' means), "sum", "none"
    [2 N] or [N]: rows, then centroids. margin None: log(1 + e^.).

    Returns float32 (float64 for float64 inputs), differentiable to any order. Raises ValueError,
    TypeError for bad arguments. Time O(N^2 D), memory O(N D) and a few blocks.
    Paper: Wieczorek et al., On the Unreasonable Effectiveness of Centroids, 2021.
    """
    check_sides(embeddings, labels, None, None, reduction, precision)
    if margin is not None:
        check_at_least("margin", margin, 0)
    with no_autocast(embeddings.device):
        dtype = accumulate_dtype(embeddings.dtype)
        x = embeddings.to(dtype)
        x = unit(x) if normalize else x
        numbers = dense(labels)
        others, rank = _leave_one_out(x, labels)
        # -1 and -2 meet nothing
        x_groups = torch.where(rank < 0, -1, rank)
        y_groups = torch.where(rank < 0, -2, rank)
        if centroid_anchors:
            x = y = torch.cat([x, others])
            numbers = numbers.repeat(2)
            x_groups, y_groups = x_groups.repeat(2), y_groups.repeat(2)
        else:
            y = others
        inputs = RowInputs(
            x, y, numbers, numbers, x_groups, y_groups, skip_self=centroid_anchors,
            precision=precision,
        )  # fmt: skip
        near, far, found = _chosen(inputs, "hardest", "hardest", "sqeuclidean", backend)
        near, far = (d.clamp_min(SMALLEST_SQUARE).sqrt() for d in (near, far))
        return reduced(_violated(near, far, margin), found, reduction, dtype)


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
    embeddings = check_both("embeddings", embeddings, "prototypes", prototypes, precision, "C")
    check_integers("labels", labels, (embeddings.shape[0],), embeddings)
    check_class_ids("labels", labels, prototypes.shape[0])
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    check_at_least("margin", margin, 0)
    check_at_least("eps", eps, 0)
    with no_autocast(embeddings.device):
        both = Sides(
            embeddings, prototypes, labels.int(), count_up(prototypes.shape[0], embeddings), False
        )
        inputs = both.rows("sqeuclidean", precision)
        near, far, found = _chosen(inputs, "hardest", "hardest", "sqeuclidean", backend)
        # over nothing the root has no use for its slope
        near, far = (torch.where(found, d + eps, 1).sqrt() for d in (near, far))
        loss = _violated(near, far, margin)
        return reduced(loss, found, reduction, accumulate_dtype(embeddings.dtype))


# ---- pairs against a margin ---------------------------------------------------------------------


def _windows(
    both: Sides,
    nearest: Tensor,
    farthest: Tensor,
    normalize: bool,
    precision: str,
    backend: str | None,
) -> PairStatistics:
    """Totals of d over the positives with d > nearest_i and the negatives with d < farthest_i.

    With the counts, [2, N] each; both ends of a pair count where the batch meets itself.
    """
    given = dict(similarity="euclidean", normalize=normalize, precision=precision)
    y, one = None if both.alone else both.y, number("scale", 1.0, both.x)
    inputs = scored(both.x, y, one, **given)
    dtype = accumulate_dtype(both.x.dtype)
    endless = torch.full_like(nearest, torch.inf)
    # the score is -d
    window = torch.stack([-endless, -nearest, -farthest, endless]).to(dtype)
    inputs = inputs._replace(
        x_labels=both.x_labels, x_window=window, positive=Rule(-1.0), negative=Rule(-1.0)
    )
    if both.alone:
        inputs = triangle(inputs)
    else:
        inputs = inputs._replace(y_labels=both.y_labels)
    stats, _ = pair_statistics(inputs, reduction="relu", backend=backend)
    return stats


def contrastive(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss, d Euclidean.

        sum_P [d - positive_margin]+  and  sum_N [negative_margin - d]+

    embeddings [N, D], labels [N] integers, and ref_embeddings [M, D], ref_labels [M] for the other
    ends of the pairs. reduction: "mean" over P's terms that are not 0 plus the same of N
    (pytorch-metric-learning, which also normalises), "sum" over all pairs, "none" [N]: each row's
    terms (of one batch: half of each pair's at each of its ends).

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N M D), half for one batch; memory O((N + M) D). Paper: Hadsell et al., 2006.
    """
    embeddings = check_sides(embeddings, labels, ref_embeddings, ref_labels, reduction, precision)
    with no_autocast(embeddings.device):
        both = sides(embeddings, labels, ref_embeddings, ref_labels)
        ones = torch.ones(both.x.shape[0], dtype=row_dtype(both.x.device), device=both.x.device)
        near, far = positive_margin * ones, negative_margin * ones
        stats = _windows(both, near, far, normalize, precision, backend)
        attract = stats.total[POSITIVE] - stats.count[POSITIVE] * positive_margin
        repel = stats.count[NEGATIVE] * negative_margin - stats.total[NEGATIVE]
        dtype = accumulate_dtype(embeddings.dtype)
        if reduction == "mean":
            loss = over_nonzero(attract, stats.count[POSITIVE])
            return (loss + over_nonzero(repel, stats.count[NEGATIVE])).to(dtype)
        loss = (attract + repel) / (2 if both.alone else 1)
        return (loss.sum() if reduction == "sum" else loss).to(dtype)


def margin_loss(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    beta: float | Tensor = 1.2,  # a number, a scalar, or [C]
    margin: float = 0.2,
    nu: float = 0.0,
    per: str = "pair",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Margin loss: pairs on the wrong side of a boundary beta, d Euclidean.

        sum_P [d - beta_i + margin]+ + sum_N [beta_i + margin - d]+       + nu sum_i beta_i

    Args:
        embeddings, labels: [N, D], [N] integers, the anchors; ref_embeddings, ref_labels: [M, D],
            [M], the others, without them the batch itself.
        beta: the boundary, > 0 in the paper: a number or a tensor that may need a gradient, one
            for all or [C], one a class (labels then in [0, C)).
        nu: weight of the regulariser, the sum of beta_i over the rows.
        per: "pair", or "triplet" as pytorch-metric-learning counts: a positive once for each
            negative of its anchor, a negative once for each positive.
        reduction: "mean": over the terms that are not 0; "sum"; "none" [N].

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. Time O(N M D), half for one batch; memory O((N + M) D). Paper: Wu et al., Sampling
    Matters in Deep Embedding Learning, 2017.
    """
    embeddings = check_sides(embeddings, labels, ref_embeddings, ref_labels, reduction, precision)
    validation.check_choice("per", per, PER)
    n = embeddings.shape[0]
    if isinstance(beta, Tensor) and beta.dim() == 1 and beta.shape[0] != 1:
        validation.check_vector("beta", beta, beta.shape[0], "one a class", embeddings)
        check_class_ids("labels", labels, beta.shape[0])
        boundary = beta.index_select(0, labels.long())
    else:
        boundary = number("beta", beta, embeddings, positive=False).expand(n)
    with no_autocast(embeddings.device):
        both = sides(embeddings, labels, ref_embeddings, ref_labels)
        boundary = boundary.to(row_dtype(embeddings.device))
        low, high = boundary - margin, boundary + margin
        stats = _windows(both, low.detach(), high.detach(), normalize, precision, backend)
        count = stats.count
        attract = stats.total[POSITIVE] - count[POSITIVE] * low
        repel = count[NEGATIVE] * high - stats.total[NEGATIVE]
        if per == "triplet":
            positives, negatives = class_sizes(both)
            loss = attract * negatives + repel * positives
            terms = count[POSITIVE] * negatives + count[NEGATIVE] * positives
        else:
            loss, terms = attract + repel, count.sum(dim=0)
        dtype = accumulate_dtype(embeddings.dtype)
        return over_terms(loss + nu * boundary, terms, reduction, dtype)


def class_sizes(both: Sides) -> tuple[Tensor, Tensor]:
    """How many positives and negatives each row has, [N] each; O((N + M) log M)."""
    ordered = both.y_labels.sort().values
    last = torch.searchsorted(ordered, both.x_labels, right=True)
    same = last - torch.searchsorted(ordered, both.x_labels)
    return same - int(both.alone), both.y.shape[0] - same


def snr_contrastive(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    zero_mean_weight: float = 0.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """`contrastive` with the distance var(y - x) / var(x) over the coordinates, x the anchor.

    zero_mean_weight: of the paper's regulariser, the mean over the rows of |sum_k x_ik|. An anchor
    without variance has distance 0 to everything. reduction: as in `contrastive`, the distance
    not being symmetric each ordered pair counts for itself. Other arguments, result and errors the
    same; time O(N M D), memory O((N + M) D) and a few blocks. Paper: Yuan et al., Signal-To-Noise
    Ratio: A Robust Distance Metric for Deep Metric Learning, 2019.
    """
    embeddings = check_sides(embeddings, labels, ref_embeddings, ref_labels, reduction, precision)
    check_at_least("zero_mean_weight", zero_mean_weight, 0)
    with no_autocast(embeddings.device):
        dtype, wide = accumulate_dtype(embeddings.dtype), row_dtype(embeddings.device)
        both = sides(embeddings, labels, ref_embeddings, ref_labels)
        inputs = both.rows("sqeuclidean", precision, normalize)
        x, y = inputs.x.to(dtype), inputs.y.to(dtype)
        sums = x.sum(dim=1)
        x = x - x.mean(dim=1, keepdim=True)
        y = x if both.alone else y - y.mean(dim=1, keepdim=True)
        power = x.to(wide).square().sum(dim=1)
        alive = ~(power <= 0)
        inverse = torch.where(alive, 1 / torch.where(alive, power, 1), 0)
        ones = torch.ones_like(inverse)
        values = torch.stack([inverse, positive_margin * ones, negative_margin * ones], dim=1)
        inputs = inputs._replace(x=x, y=y, rule="hinges", params=(1,), values=values)
        attract, some, repel, others = row_losses(inputs, backend=backend).unbind(dim=1)
        bias = zero_mean_weight * sums.abs()
        if reduction == "mean":
            loss = over_nonzero(attract, some) + over_nonzero(repel, others)
            return (loss + over_nonzero(bias, torch.ones_like(bias))).to(dtype)
        loss = attract + repel + bias
        return (loss.sum() if reduction == "sum" else loss).to(dtype)

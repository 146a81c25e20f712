"""Losses on the order of a row's distances: histograms, lists, tuplets, neighbours.

Equal labels make a positive; where a batch meets itself a row is not its own positive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.examples import examples
from fused_losses.base.numerics import (
    accumulate_dtype,
    no_autocast,
    recomputed,
    reduced,
    row_dtype,
    softplus,
)
from fused_losses.base.sides import batch_sides
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_at_least, check_count, check_plain, number
from fused_losses.losses.scored_pairs import by_label
from fused_losses.losses.scored_rows import class_sizes, over_terms, scored_rows
from fused_losses.primitives.opaque import OpaqueOp
from fused_losses.primitives.pairs.inputs import NEGATIVE, PairInputs
from fused_losses.primitives.pairs.op import pair_statistics
from fused_losses.primitives.row_rules.op import row_losses


def tuplet_margin(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    margin: float = 5.73,
    scale: float = 64.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Tuplet margin loss: each positive pair against all negatives of its anchor.

        loss_ip = log(1 + sum_N e^(scale (s_in - cos(angle_ip - margin))))

    s = <x_i, y_j> is a cosine (normalize=True for rows of another norm); a positive's is kept 1e-6
    from -1 and 1, beyond which its gradient is 0. embeddings [N, D], labels [N] integers, and
    ref_embeddings [M, D], ref_labels [M] for positives and negatives outside the batch. margin: in
    degrees. scale: > 0. reduction: "mean" over the positive pairs whose anchor has a negative,
    "sum" over them, "none" [N]: the sum of each anchor's, 0 where it has none.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N M D); memory O((N + M) D) and a few blocks. Paper: Yu and Tao, Deep Metric Learning
    with Tuplet Margin Loss, 2019.
    """
    check_plain(margin=margin, scale=scale)
    both = batch_sides(embeddings, labels, reduction, precision, ref_embeddings, ref_labels)
    number("scale", scale, embeddings)
    with no_autocast(embeddings.device):
        inputs = scored_rows(both, "dot", precision, normalize)._replace(
            rule="tuplet", params=(math.radians(margin), scale)
        )
        total, count = row_losses(inputs, backend=backend).unbind(dim=1)
        return over_terms(total, count, reduction, accumulate_dtype(both.x.dtype))


def angular(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    alpha: float = 40.0,
    normalize: bool = False,
    normalize_negatives: bool | None = None,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Angular loss over the positive pairs (a, p) of one batch, t = tan(alpha)^2.

        loss_ap = log(1 + sum_N e^(4 t <a + p, n> - 2 (1 + t) <a, p>))

    embeddings [N, D] (norm 1 in the paper), labels [N] integers. alpha: in degrees, in (0, 90).
    normalize_negatives: None: as normalize; pytorch-metric-learning divides a and p by their norms
    but not n (True, False). reduction: "mean" over the positive pairs (with no negative their loss
    is 0), "sum" over the ordered ones, "none" [N]: the sum of each anchor's.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(P N D) over the P unordered positive pairs, a sweep for each row of the largest class,
    whose size the host reads; memory O(N D). Paper: Wang et al., Deep Metric Learning with Angular
    Loss, 2017.
    """
    check_plain(alpha=alpha)
    both = batch_sides(embeddings, labels, reduction, precision)
    if not 0 < alpha < 90:
        raise ValueError(f"alpha: expected degrees in (0, 90), got {alpha}")
    t = math.tan(math.radians(alpha)) ** 2
    with no_autocast(embeddings.device):
        rows = by_label(both, normalize)
        x, y = rows.x, rows.x
        if normalize_negatives is not None and normalize_negatives != normalize:
            y = embeddings.index_select(0, rows.order)
            y = unit(y) if normalize_negatives else y
        loss = _ANGULAR(x, y, rows.labels, t, precision, backends.requested(backend))
        dtype = accumulate_dtype(both.x.dtype)
        if reduction == "mean":
            ends = torch.searchsorted(rows.labels, rows.labels, right=True)
            ordered = (ends - torch.searchsorted(rows.labels, rows.labels) - 1).sum()
            return (loss.sum() / ordered.clamp_min(1)).to(dtype)
        return (loss.sum() if reduction == "sum" else rows.restored(loss)).to(dtype)


def _angular(
    x: Tensor, y: Tensor, labels: Tensor, t: float, precision: str, backend: str
) -> Tensor:
    """Each anchor's sum over its positive pairs, of sorted rows. [N]"""
    # a zero that knows x, for a batch without positive pairs
    loss = (x * 0).sum(dim=1).to(row_dtype(x.device))
    for offset in range(1, x.shape[0]):
        first = (labels[:-offset] == labels[offset:]).nonzero()[:, 0]
        if first.shape[0] == 0:
            break
        each = recomputed(_angular_pairs, x, y, labels, first, offset, t, precision, backend)
        loss = loss.index_add(0, first, each).index_add(0, first + offset, each)
    return loss


_ANGULAR = OpaqueOp(
    "angular",
    "(Tensor x, Tensor y, Tensor labels, float t, str precision, str backend)",
    _angular,
    lambda x, *_: x.new_empty(x.shape[0], dtype=row_dtype(x.device)),
)


def _angular_pairs(
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    first: Tensor,
    offset: int,
    t: float,
    precision: str,
    backend: str,
) -> Tensor:
    """The losses of the positive pairs (first, first + offset) of sorted rows, [P]."""
    dtype = accumulate_dtype(x.dtype)
    a, p = (x.index_select(0, i).to(dtype) for i in (first, first + offset))
    bias = (-2 * (1 + t)) * (a * p).sum(dim=1)
    inputs = PairInputs(
        (a + p).contiguous(),
        y.to(dtype).contiguous(),
        number("scale", 4 * t, x),
        x_bias=bias,
        x_labels=labels.index_select(0, first),
        y_labels=labels,
        precision=precision,
    )
    stats, _ = pair_statistics(inputs, backend=backend)
    return softplus(stats.value[NEGATIVE])


def ranked_list(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    margin: float = 0.4,
    alpha: float = 1.2,
    imbalance: float = 0.5,
    positive_temperature: float = 0.0,
    negative_temperature: float = 10.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Ranked list loss: positives within alpha - margin, negatives beyond alpha, d Euclidean.

        loss_i = (1 - imbalance) mean_P' (d - alpha + margin) + imbalance mean_N' (alpha - d)

    over the positives with d > alpha - margin and the negatives with d < alpha, the means weighted
    by e^(temperature violation); the weights are differentiated too, as pytorch-metric-learning
    does, whose 1e-5 a column in each mean's divisor is kept. embeddings [N, D] (norm 1 in the
    paper), labels [N] integers. imbalance: in [0, 1]. Temperatures: >= 0. reduction: "mean" over
    all rows (a row without a positive still has its negatives), "sum", "none" [N].

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D); memory O(N D) and a few blocks. Paper: Wang et al., Ranked List Loss for Deep
    Metric Learning, 2019.
    """
    check_plain(
        margin=margin,
        alpha=alpha,
        imbalance=imbalance,
        positive_temperature=positive_temperature,
        negative_temperature=negative_temperature,
    )
    both = batch_sides(embeddings, labels, reduction, precision)
    if not 0 <= imbalance <= 1:
        raise ValueError(f"imbalance: expected a value in [0, 1], got {imbalance}")
    check_at_least("positive_temperature", positive_temperature, 0)
    check_at_least("negative_temperature", negative_temperature, 0)
    with no_autocast(embeddings.device):
        params = (positive_temperature, negative_temperature, alpha - margin, alpha)
        inputs = scored_rows(both, "euclidean", precision, normalize)._replace(
            rule="ranked_list", params=params
        )
        stats = row_losses(inputs, backend=backend)
        guard = 1e-5 * embeddings.shape[0]
        attract, repel = (stats[:, k + 1] / (stats[:, k] + guard) for k in (0, 2))
        loss = (1 - imbalance) * attract + imbalance * repel
        everything = torch.ones_like(loss, dtype=torch.bool)
        return reduced(loss, everything, reduction, accumulate_dtype(both.x.dtype))


def fast_ap(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    bins: int = 10,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """1 - average precision of each row's neighbours, from histograms of its squared distances.

        loss_i = 1 - (1 / |P|) sum_r h+_r H+_r / H_r

    h+ the positives' histogram, with triangular bins around bins + 1 nodes in [0, 4] (rows have
    norm 1: normalize=True for others; beyond 4 counts as 4), H+ its running sum, H that of all.
    embeddings [N, D], labels [N] integers, and ref_embeddings [M, D], ref_labels [M] for neighbours
    outside the batch. bins: >= 1. reduction: "mean" over the rows with a positive, "sum", "none"
    [N], 0 on other rows.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N M D); memory O((N + M) D + N bins) and a few blocks. Paper: Cakir et al., Deep Metric
    Learning to Rank, 2019.
    """
    both = batch_sides(embeddings, labels, reduction, precision, ref_embeddings, ref_labels)
    check_count("bins", bins)
    with no_autocast(embeddings.device):
        inputs = scored_rows(both, "sqeuclidean", precision, normalize)._replace(
            rule="histogram", params=(0.0, 4 / bins, bins + 1)
        )
        stats = row_losses(inputs, backend=backend)
        near, far = stats[:, : bins + 1], stats[:, bins + 1 :]
        positives, _ = class_sizes(both)
        counted = positives > 0
        ahead = near.cumsum(dim=1)
        everything = ahead + far.cumsum(dim=1)
        some = ~(everything <= 0)
        precision_ = torch.where(some, near * ahead / torch.where(some, everything, 1), 0)
        loss = 1 - precision_.sum(dim=1) / positives.clamp_min(1)
        return reduced(loss, counted, reduction, accumulate_dtype(both.x.dtype))


def histogram(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    bins: int = 100,
    normalize: bool = False,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """The chance that a negative pair is more similar than a positive one; one number.

        sum_r h-_r (h+_0 + ... + h+_r)

    h+ and h- are the histograms, each of sum 1, of the cosines of all positive and all negative
    pairs of the batch, with triangular bins around bins + 1 nodes in [-1, 1] (rows have norm 1:
    normalize=True for others). embeddings [N, D], labels [N] integers, bins >= 1. A batch without
    a positive or a negative pair has loss 0.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D); memory O(N D + N bins) and a few blocks. Paper: Ustinova and Lempitsky, Learning
    Deep Embeddings with Histogram Loss, 2016.
    """
    both = batch_sides(embeddings, labels, "mean", precision)
    check_count("bins", bins)
    with no_autocast(embeddings.device):
        inputs = scored_rows(both, "dot", precision, normalize)._replace(
            rule="histogram", params=(-1.0, 2 / bins, bins + 1)
        )
        sums = row_losses(inputs, backend=backend).sum(dim=0)
        near, far = sums[: bins + 1], sums[bins + 1 :]
        positives, negatives = (size.sum().clamp_min(1) for size in class_sizes(both))
        loss = (far / negatives * (near / positives).cumsum(dim=0)).sum()
        return loss.to(accumulate_dtype(both.x.dtype))


_alone = lambda f, t: f(t.x, t.labels, normalize=True)


_ref = lambda f, t: f(t.x, t.labels, t.y, t.y_labels, normalize=True)


_BENT = dict(imbalance=0.3, positive_temperature=1.5, negative_temperature=4.0)


examples(tuplet_margin, _alone, {"": dict(scale=20)})
examples(tuplet_margin, _ref, {"ref": dict(scale=20, reduction="none")})
examples(angular, _alone, {"": {}, "none": dict(reduction="none")})
examples(ranked_list, _alone, {"": _BENT, "wide": dict(alpha=1.5)})
examples(fast_ap, _alone, {"": dict(bins=8)})
examples(fast_ap, _ref, {"ref": dict(bins=8)})
examples(histogram, _alone, {"": dict(bins=12)})

"""Losses on the order of a row's distances: histograms, lists, tuplets, neighbours.

Equal labels make a positive; where a batch meets itself a row is not its own positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.examples import examples
from fused_losses.base.indices import Indices
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced
from fused_losses.base.sides import batch_sides
from fused_losses.base.validation import check_at_least, check_count, check_plain, number
from fused_losses.functions.listed_rankings import (
    listed_histograms,
    listed_tuplets,
    miner_weights,
)
from fused_losses.functions.listed_triplets import listed_example
from fused_losses.functions.scored_rows import class_sizes, over_terms, scored_rows
from fused_losses.primitives.row_rules.op import row_losses


def tuplet_margin(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
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
    degrees. scale: > 0. indices: a miner's (a, p, n) or (a, p, a, n), int64, or `Triplets`,
    `Pairs`: each listed (a, p) meets all listed (a, n), and what is listed twice counts twice; no
    label is then asked for (None). reduction: "mean" over the positive pairs whose anchor has a
    negative (of a list over all positive pairs, as in pytorch-metric-learning), "sum" over them,
    "none" [N]: the sum of each anchor's, 0 where it has none.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. Time O(N M D), of P listed pairs O(P D); memory O((N + M) D) and a few blocks, and
    O(P). Paper: Yu and Tao, Deep Metric Learning
    with Tuplet Margin Loss, 2019.
    """
    check_plain(margin=margin, scale=scale)
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices
    )
    number("scale", scale, embeddings)
    with no_autocast(embeddings.device):
        params = (math.radians(margin), scale)
        inputs = scored_rows(both, "dot", precision, normalize)
        if both.listed is not None:
            total, count = listed_tuplets(inputs, both.listed, *params, backend)
        else:
            inputs = inputs._replace(rule="tuplet", params=params)
            total, count = row_losses(inputs, backend=backend).unbind(dim=1)
        return over_terms(total, count, reduction, accumulate_dtype(both.x.dtype))


def ranked_list(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
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
    paper), labels [N] integers, and ref_embeddings [M, D], ref_labels [M] for a list of rows
    outside the batch. imbalance: in [0, 1]. Temperatures: >= 0. reduction: "mean" over
    all rows (a row without a positive still has its negatives), "sum", "none" [N].

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N M D); memory O((N + M) D) and a few blocks. Paper: Wang et al., Ranked List
    Loss for Deep Metric Learning, 2019.
    """
    check_plain(
        margin=margin,
        alpha=alpha,
        imbalance=imbalance,
        positive_temperature=positive_temperature,
        negative_temperature=negative_temperature,
    )
    both = batch_sides(embeddings, labels, reduction, precision, ref_embeddings, ref_labels)
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
        guard = 1e-5 * max(1, both.y.shape[0])
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
    indices: Indices | None = None,
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
    outside the batch. bins: >= 1. indices: a miner's (a, p, n) or (a, p, a, n), int64: a row's
    loss is multiplied by how often it is listed over how often the one that is most, as in
    pytorch-metric-learning (of two batches: as an anchor; of empty lists 1). reduction: "mean" over
    the rows with a positive, "sum", "none" [N], 0 on other rows.

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
        # of what would be the first of all, every share is a positive's
        share = torch.where(some, ahead / torch.where(some, everything, 1), 1)
        precision_ = near * share
        loss = 1 - precision_.sum(dim=1) / positives.clamp_min(1)
        if indices is not None:
            sizes = (both.x.shape[0], both.y.shape[0])
            loss = loss * miner_weights(indices, *sizes, both.x, both.alone)
        return reduced(loss, counted, reduction, accumulate_dtype(both.x.dtype))


def histogram(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    bins: int = 100,
    normalize: bool = False,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """The chance that a negative pair is more similar than a positive one; one number.

        sum_r h-_r (h+_0 + ... + h+_r)

    h+ and h- are the histograms, each of sum 1, of the cosines of all positive and all negative
    pairs of the batch, with triangular bins around bins + 1 nodes in [-1, 1] (rows have norm 1:
    normalize=True for others). embeddings [N, D], labels [N] integers, and ref_embeddings [M, D],
    ref_labels [M] for pairs of two batches; bins >= 1. indices: a miner's (a, p, n) or
    (a, p, a, n), int64, or `Triplets`, `Pairs`: the pairs that are counted, once each, of the
    anchors that have both kinds, as in pytorch-metric-learning; no label is then asked for (None).
    Without a positive or a negative pair the loss is 0.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. Time O(N M D), of P listed pairs O(P D); memory O((N + M) D + N bins) and a few
    blocks, of a list O((N + M) D + P). Paper: Ustinova and Lempitsky, Learning
    Deep Embeddings with Histogram Loss, 2016.
    """
    both = batch_sides(embeddings, labels, "mean", precision, ref_embeddings, ref_labels, indices)
    check_count("bins", bins)
    with no_autocast(embeddings.device):
        inputs = scored_rows(both, "dot", precision, normalize)._replace(
            rule="histogram", params=(-1.0, 2 / bins, bins + 1)
        )
        if both.listed is not None:
            sums, *sizes = listed_histograms(inputs, both.listed, both.alone, backend)
        else:
            sums = row_losses(inputs, backend=backend).sum(dim=0)
            sizes = [size.sum() for size in class_sizes(both)]
        near, far = sums[: bins + 1], sums[bins + 1 :]
        positives, negatives = (size.clamp_min(1) for size in sizes)
        loss = (far / negatives * (near / positives).cumsum(dim=0)).sum()
        return loss.to(accumulate_dtype(both.x.dtype))


_alone = lambda f, t: f(t.x, t.labels, normalize=True)


_ref = lambda f, t: f(t.x, t.labels, t.y, t.y_labels, normalize=True)


def _listed(f: Callable[..., Any], t: Any) -> Any:
    return f(t.x, t.labels, indices=listed_example(len(t.x), t.x.device), normalize=True)


_BENT = dict(imbalance=0.3, positive_temperature=1.5, negative_temperature=4.0)


examples(tuplet_margin, _alone, {"": dict(scale=20)})
examples(tuplet_margin, _ref, {"ref": dict(scale=20, reduction="none")})
examples(ranked_list, _alone, {"": _BENT, "wide": dict(alpha=1.5)})
examples(fast_ap, _alone, {"": dict(bins=8)})
examples(fast_ap, _ref, {"ref": dict(bins=8)})
examples(histogram, _alone, {"": dict(bins=12)})
examples(tuplet_margin, _listed, {"listed": dict(scale=20)})
examples(ranked_list, _ref, {"ref": _BENT})
examples(fast_ap, _listed, {"listed": dict(bins=8)})
examples(histogram, _ref, {"ref": dict(bins=12)})
examples(histogram, _listed, {"listed": dict(bins=12)})

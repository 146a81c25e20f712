"""Losses over pairs against a margin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import (
    about_own_mean,
    accumulate_dtype,
    nan_where_infinite,
    no_autocast,
    row_dtype,
)
from fused_losses.base.sides import Sides, batch_sides
from fused_losses.base.validation import check_at_least, check_class_ids, check_plain, number
from fused_losses.losses.scored_pairs import scored, triangle
from fused_losses.losses.scored_rows import class_sizes, over_nonzero, over_terms, scored_rows
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, Rule
from fused_losses.primitives.pairs.op import PairStatistics, pair_statistics
from fused_losses.primitives.row_rules.op import row_losses

PER = ("pair", "triplet")


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
    given: dict[str, Any] = dict(similarity="euclidean", normalize=normalize, precision=precision)
    inputs = scored(both.x, both.other, number("scale", 1.0, both.x), **given)
    dtype = accumulate_dtype(both.x.dtype)
    endless = torch.full_like(nearest, torch.inf)
    # the score is -d
    window = torch.stack([-endless, -nearest, -farthest, endless]).to(dtype)
    inputs = inputs._replace(
        x_labels=both.numbers.x_labels, x_window=window, positive=Rule(-1.0), negative=Rule(-1.0)
    )
    if both.mirrored:
        inputs = triangle(inputs)
    else:
        inputs = inputs._replace(y_labels=both.numbers.y_labels, skip_self=both.alone)
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
    check_plain(positive_margin=positive_margin, negative_margin=negative_margin)
    both = batch_sides(embeddings, labels, reduction, precision, ref_embeddings, ref_labels)
    with no_autocast(embeddings.device):
        ones = torch.ones(both.x.shape[0], dtype=row_dtype(both.x.device), device=both.x.device)
        near, far = positive_margin * ones, negative_margin * ones
        stats = _windows(both, near, far, normalize, precision, backend)
        attract = stats.total[POSITIVE] - stats.count[POSITIVE] * positive_margin
        repel = stats.count[NEGATIVE] * negative_margin - stats.total[NEGATIVE]
        dtype = accumulate_dtype(both.x.dtype)
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
    check_plain(margin=margin, nu=nu)
    both = batch_sides(embeddings, labels, reduction, precision, ref_embeddings, ref_labels)
    validation.check_choice("per", per, PER)
    n = embeddings.shape[0]
    if isinstance(beta, Tensor) and beta.dim() == 1 and beta.shape[0] != 1:
        validation.check_vector("beta", beta, beta.shape[0], "one a class", embeddings)
        check_class_ids("labels", labels, beta.shape[0])
        # widened first: the rows' gradients add up in the dtype of the gather
        boundary = beta.to(accumulate_dtype(beta.dtype)).index_select(0, labels.long())
    else:
        boundary = number("beta", beta, embeddings, positive=False).expand(n)
    with no_autocast(embeddings.device):
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
        dtype = accumulate_dtype(both.x.dtype)
        return over_terms(loss + nu * boundary, terms, reduction, dtype)


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
    check_plain(
        positive_margin=positive_margin,
        negative_margin=negative_margin,
        zero_mean_weight=zero_mean_weight,
    )
    both = batch_sides(embeddings, labels, reduction, precision, ref_embeddings, ref_labels)
    check_at_least("zero_mean_weight", zero_mean_weight, 0)
    with no_autocast(embeddings.device):
        dtype, wide = accumulate_dtype(both.x.dtype), row_dtype(embeddings.device)
        inputs = scored_rows(both, "sqeuclidean", precision, normalize)
        sums = inputs.x.to(dtype).sum(dim=1) + nan_where_infinite(inputs.x)
        x = about_own_mean(inputs.x)
        y = x if both.y is both.x else about_own_mean(inputs.y)
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


_MARGINS = dict(positive_margin=0.2, negative_margin=1.1)
_SNR_MARGINS = dict(positive_margin=0.1, negative_margin=1.5, zero_mean_weight=0.3)
_REF = lambda f, t: f(t.x, t.labels, t.y, t.y_labels)
examples(
    contrastive,
    lambda f, t: f(t.x, t.labels),
    {"": _MARGINS, "none": dict(reduction="none", **_MARGINS), "unit": dict(normalize=True)},
)
examples(contrastive, _REF, {"ref": dict(reduction="none", **_MARGINS)})
examples(
    margin_loss,
    lambda f, t: f(t.x, t.labels, nu=0.1),
    {
        "beta, pair": lambda t: dict(beta=t.beta),
        "beta, triplet": lambda t: dict(beta=t.beta, per="triplet"),
        "class beta, pair": lambda t: dict(beta=t.class_beta),
        "class beta, triplet": lambda t: dict(beta=t.class_beta, per="triplet"),
        "none": lambda t: dict(beta=t.class_beta, per="triplet", reduction="none"),
    },
)
examples(snr_contrastive, lambda f, t: f(t.x, t.labels), {"": _SNR_MARGINS})
examples(snr_contrastive, _REF, {"ref": _SNR_MARGINS})

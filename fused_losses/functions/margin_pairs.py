"""Losses over pairs against a margin."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.indices import Indices
from fused_losses.base.memory_budget import MemoryBudget
from fused_losses.base.numerics import (
    about_own_mean,
    accumulate_dtype,
    common_factor,
    multiplied,
    nan_where_infinite,
    no_autocast,
    row_dtype,
)
from fused_losses.base.sides import Sides, batch_sides
from fused_losses.base.validation import check_at_least, check_class_ids, check_plain, number
from fused_losses.functions.pair_sums import mean_of_each
from fused_losses.functions.scored_pairs import BatchPairs, batch_pairs
from fused_losses.functions.scored_rows import (
    class_sizes,
    folded_rows,
    over_nonzero,
    over_terms,
    scored_rows,
)
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, Rule
from fused_losses.primitives.pairs.op import PairStatistics

PER = ("pair", "triplet")


def in_windows(
    pairs: BatchPairs,
    nearest: float | Tensor,
    farthest: float | Tensor,
    backend: str | None,
    rules: tuple[Rule, Rule] = (Rule(-1.0), Rule(-1.0)),
) -> PairStatistics:
    """Totals of d over the positives with d > nearest_i and the negatives with d < farthest_i.

    With the counts, [2, N] each; both ends of a pair count where the batch meets itself. rules:
    what of the score -d is summed in place of d.
    """
    x = pairs.inputs.x
    dtype = accumulate_dtype(x.dtype)

    def row(end: float | Tensor) -> Tensor:
        if isinstance(end, Tensor):
            return end.to(dtype)
        return torch.full((x.shape[0],), end, dtype=dtype, device=x.device)

    # the score is -d
    window = torch.stack([row(end) for end in (-torch.inf, -nearest, -farthest, torch.inf)])
    positive, negative = rules
    return pairs.statistics(
        positive=positive, negative=negative, reduction="relu", window=window, backend=backend
    )


def contrastive(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss, d Euclidean.

        sum_P [d - positive_margin]+  and  sum_N [negative_margin - d]+

    Args:
        embeddings, labels: [N, D], [N] integers, the anchors.
        ref_embeddings, ref_labels: [M, D], [M], the pairs' other ends; None: the batch itself.
        indices: a miner's pairs, (a, p, a, n) int64 [P], of which no others take part, or triplets
            (a, p, n), whose pairs are (a, p) and (a, n); also `Pairs`, `Triplets`. a are rows of
            embeddings, p and n of the other side. No label is then asked for (None). A pair that
            is listed twice counts twice. `WeightedPairs`: with what each counts for. None: all.
        reduction: "mean" over P's terms that are not 0 plus the same of N (pytorch-metric-learning,
            which also normalises), "sum" over all pairs, "none" [N]: each row's terms. Where the
            batch meets itself half of a pair's, which counts at both of its ends; of listed pairs,
            too, where all pairs are listed from either end.
        memory_budget: see `info_nce`; of listed pairs nothing is kept.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. Time O(N M D), half for one batch; memory O((N + M) D). Of P listed pairs time
    O(P D), memory O(P + (N + M) D), and products are not rounded. Paper: Hadsell et al., 2006.
    """
    check_plain(positive_margin=positive_margin, negative_margin=negative_margin)
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices,
        weighted=True, memory_budget=memory_budget,
    )  # fmt: skip
    with no_autocast(embeddings.device):
        near, far = float(positive_margin), float(negative_margin)
        pairs = batch_pairs(both, "euclidean", normalize, precision, once=False)
        stats = in_windows(pairs, near, far, backend, (Rule(-1.0, -near), Rule(1.0, -far)))
        dtype = accumulate_dtype(both.x.dtype)
        if reduction == "mean":
            return mean_of_each(stats.total, stats.count, dtype)
        loss = stats.total.sum(dim=0) / (2 if both.alone else 1)
        return (loss.sum() if reduction == "sum" else loss).to(dtype)


def margin_loss(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    beta: float | Tensor = 1.2,  # a number, a scalar, or [C]
    margin: float = 0.2,
    nu: float = 0.0,
    per: str = "pair",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Margin loss: pairs on the wrong side of a boundary beta, d Euclidean.

        sum_P [d - beta_i + margin]+ + sum_N [beta_i + margin - d]+       + nu sum_i beta_i

    Args:
        embeddings, labels: [N, D], [N] integers, the anchors; ref_embeddings, ref_labels: [M, D],
            [M], the others, without them the batch itself; indices: as in `contrastive`.
        beta: the boundary, > 0 in the paper: a number or a tensor that may need a gradient, one
            for all or [C], one a class (labels then in [0, C)).
        nu: weight of the regulariser, the sum of beta_i over the rows.
        per: "pair", or "triplet" as pytorch-metric-learning counts: a positive once for each
            negative of its anchor, a negative once for each positive (listed triplets are these).
        reduction: "mean": over the terms that are not 0; "sum"; "none" [N].
        memory_budget: see `info_nce`.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. Time O(N M D), half for one batch; memory O((N + M) D). Paper: Wu et al., Sampling
    Matters in Deep Embedding Learning, 2017.
    """
    check_plain(margin=margin, nu=nu)
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices,
        memory_budget=memory_budget,
    )  # fmt: skip
    validation.check_choice("per", per, PER)
    n = embeddings.shape[0]
    if isinstance(beta, Tensor) and beta.dim() == 1 and beta.shape[0] != 1:
        if labels is None:
            raise TypeError("labels: expected an integer tensor [N] beside beta [C], got None")
        validation.check_vector("beta", beta, beta.shape[0], "one a class", embeddings)
        check_class_ids("labels", labels, beta.shape[0])
        # widened first: the rows' gradients add up in the dtype of the gather
        boundary = beta.to(accumulate_dtype(beta.dtype)).index_select(0, labels.long())
    else:
        boundary = number("beta", beta, embeddings, positive=False).expand(n)
    with no_autocast(embeddings.device):
        boundary = boundary.to(row_dtype(embeddings.device))
        low, high = boundary - margin, boundary + margin
        pairs = batch_pairs(both, "euclidean", normalize, precision, once=False)
        stats = in_windows(pairs, low.detach(), high.detach(), backend)
        count = stats.count
        attract = stats.total[POSITIVE] - count[POSITIVE] * low
        repel = count[NEGATIVE] * high - stats.total[NEGATIVE]
        if per == "triplet" and not (both.listed is not None and both.listed.aligned):
            positives, negatives = _sizes(both)
            loss = attract * negatives + repel * positives
            terms = count[POSITIVE] * negatives + count[NEGATIVE] * positives
        else:
            loss, terms = attract + repel, count.sum(dim=0)
        dtype = accumulate_dtype(both.x.dtype)
        return over_terms(loss + nu * boundary, terms, reduction, dtype)


def _sizes(both: Sides) -> tuple[Tensor, Tensor]:
    """How many positives and negatives each row has, [N] each."""
    if both.listed is None:
        return class_sizes(both)
    n = both.x.shape[0]
    positives, negatives = (
        torch.zeros(n, dtype=torch.int64, device=at.device).index_add(0, at, torch.ones_like(at))
        for at in (both.listed.positive.rows, both.listed.negative.rows)
    )
    return positives, negatives


def threshold_consistent_margin(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    positive_margin: float = 0.9,
    negative_margin: float = 0.5,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
    normalize: bool = True,
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Threshold-consistent margin, a regulariser beside another loss; s the cosine. One number.

        positive_weight * mean of [positive_margin - s]+ over P
      + negative_weight * mean of [s - negative_margin]+ over N,     of the terms that are not 0

    embeddings [N, D], labels [N] integers. ref_embeddings, ref_labels, indices: as in
    `contrastive`. The weights are the paper's lambda+ and lambda-. memory_budget: see `info_nce`.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. Time O(N M D), half for one batch, O(P D) of P listed pairs; memory O((N + M) D), of
    a list O(P) more. Paper: Zhang et al., Threshold-Consistent Margin
    Loss for Open-World Deep Metric Learning, 2024.
    """
    check_plain(
        positive_margin=positive_margin,
        negative_margin=negative_margin,
        positive_weight=positive_weight,
        negative_weight=negative_weight,
    )
    both = batch_sides(
        embeddings, labels, "mean", precision, ref_embeddings, ref_labels, indices,
        memory_budget=memory_budget,
    )  # fmt: skip
    with no_autocast(embeddings.device):
        pairs = batch_pairs(both, "dot", normalize, precision, once=False)
        dtype = accumulate_dtype(both.x.dtype)
        ones = torch.ones(both.x.shape[0], dtype=dtype, device=both.x.device)
        endless = torch.inf * ones
        sides = [-endless, positive_margin * ones, negative_margin * ones, endless]
        stats = pairs.statistics(reduction="relu", window=torch.stack(sides), backend=backend)
        count, total = stats.count, stats.total
        attract = count[POSITIVE] * positive_margin - total[POSITIVE]
        repel = total[NEGATIVE] - count[NEGATIVE] * negative_margin
        loss = positive_weight * over_nonzero(attract, count[POSITIVE])
        return (loss + negative_weight * over_nonzero(repel, count[NEGATIVE])).to(dtype)


def snr_contrastive(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
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
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices
    )
    check_at_least("zero_mean_weight", zero_mean_weight, 0)
    with no_autocast(embeddings.device):
        dtype, wide = accumulate_dtype(both.x.dtype), row_dtype(embeddings.device)
        inputs = scored_rows(both, "sqeuclidean", precision, normalize)
        sums = inputs.x.to(dtype).sum(dim=1) + nan_where_infinite(inputs.x)
        # a ratio of squares: of rows near 1, before a mean is rounded
        one = both.y is both.x
        x = inputs.x.to(dtype)
        x, y = multiplied(common_factor(x, inputs.y, 0, 0), x, x if one else inputs.y.to(dtype))
        x = about_own_mean(x)
        y = x if one else about_own_mean(y)
        power = x.to(wide).square().sum(dim=1)
        alive = ~(power <= 0)
        inverse = torch.where(alive, 1 / torch.where(alive, power, 1), 0)
        ones = torch.ones_like(inverse)
        values = torch.stack([inverse, positive_margin * ones, negative_margin * ones], dim=1)
        inputs = inputs._replace(x=x, y=y, rule="hinges", params=(1,), values=values)
        found = folded_rows(inputs, both.listed, backend)
        attract, some, repel, others = found.unbind(dim=1)
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
# every pair is within its margin: a mean over those within jumps where 16 bits move a pair across
examples(
    threshold_consistent_margin,
    lambda f, t: f(t.x, t.labels),
    {"": dict(positive_margin=1.25, negative_margin=-1.25)},
)
examples(snr_contrastive, lambda f, t: f(t.x, t.labels), {"": _SNR_MARGINS})
examples(snr_contrastive, _REF, {"ref": _SNR_MARGINS})

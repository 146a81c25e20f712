"""Pair and proxy losses of metric learning, on statistics of one sweep over pairs (`pairs`).

Most are the grammar's two sums of a row, its positives' and its negatives', each with its `Rule`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.indices import Indices
from fused_losses.base.memory_budget import MemoryBudget
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced, softplus
from fused_losses.base.sides import batch_sides
from fused_losses.base.validation import check_both, check_plain, number
from fused_losses.functions.info_nce import info_nce
from fused_losses.functions.scored_pairs import BatchPairs, batch_pairs, has_both, sum_of_both
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, Rule


def multi_similarity(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    mining_margin: float | None = None,
    duplicate: float = 1 - 1e-5,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Multi-similarity loss, s = <x_i, x_j>.

        loss_i = log(1 + sum_P e^(-alpha (s - base))) / alpha
               + log(1 + sum_N e^(beta (s - base))) / beta

    Args:
        embeddings, labels: [N, D], [N] integers. alpha, beta: > 0.
        ref_embeddings, ref_labels, indices: as in `contrastive`, also `WeightedPairs`; what is
            listed twice counts once.
        mining_margin: None, or the paper's miner: of negatives those with s > min_P s - margin, of
            positives those with s < max_N s + margin and s < `duplicate` take part; a row left
            without either has loss 0. The choice is not differentiated. One more sweep.
        normalize: the paper's embeddings have norm 1.
        reduction: "mean" over all rows (the authors' divisor), "sum", "none" [N].
        memory_budget: see `info_nce`.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2), mined O(N^2 D); memory O(N D). Paper: Wang et al., 2019.
    """
    check_plain(alpha=alpha, beta=beta, base=base, mining_margin=mining_margin, duplicate=duplicate)
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices,
        weighted=True, memory_budget=memory_budget,
    )  # fmt: skip
    for name, value in (("alpha", alpha), ("beta", beta)):
        number(name, value, embeddings)
    with no_autocast(embeddings.device):
        pairs, window = batch_pairs(both, "dot", normalize, precision), None
        if mining_margin is not None:
            window, unclear = _mined(pairs, mining_margin, duplicate, backend)
        stats = pairs.statistics(
            positive=Rule(-alpha, base), negative=Rule(beta, base), window=window, backend=backend
        )
        positive, negative = softplus(stats.value).unbind(0)
        loss = positive / alpha + negative / beta
        if mining_margin is not None:
            loss = torch.where(has_both(stats), loss, 0)
            # which pairs count cannot be said, and a NaN in a window leaves out or in
            loss = torch.where(unclear, torch.nan, loss)
        everything = torch.ones_like(loss, dtype=torch.bool)
        dtype = accumulate_dtype(both.x.dtype)
        return reduced(loss, everything, reduction, dtype)


@torch.no_grad()
def _mined(
    pairs: BatchPairs, margin: float, duplicate: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Windows (positive low, high, negative low, high) of the multi-similarity miner.

    And which rows [N] have a similarity that is NaN, of which there is no least.
    """
    x = pairs.inputs.x
    dtype = accumulate_dtype(x.dtype)
    window = torch.full((4, x.shape[0]), torch.inf, dtype=dtype, device=x.device)
    window[0], window[1], window[2] = -torch.inf, float(duplicate), -torch.inf
    # z = -s on positives: their best is minus their least similarity
    seen = pairs.statistics(window=window, positive=Rule(-1.0), backend=backend)
    window = window.clone()
    window[1] = (seen.best[NEGATIVE] + margin).clamp_max(duplicate)
    window[2] = -seen.best[POSITIVE] - margin
    return window, seen.total.isnan().any(dim=0)


def circle(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    m: float = 0.4,
    gamma: float = 80.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Circle loss, s = <x_i, x_j>, with weights that are not differentiated.

        loss_i = softplus(log sum_P e^(-gamma [1 + m - s]+ (s - 1 + m))
                        + log sum_N e^(gamma [s + m]+ (s - m)))

    embeddings [N, D] (norm 1 in the paper: normalize=True), labels [N] integers, gamma > 0.
    ref_embeddings, ref_labels, indices: as in `contrastive`, also `WeightedPairs`; what is listed
    twice counts once.
    reduction: "mean" over the rows with a positive and a negative (pytorch-metric-learning: over
    losses that are not 0, the same but for underflow), "sum", "none" [N], 0 on other rows.
    memory_budget: see `info_nce`.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2); memory O(N D). Paper: Sun et al., 2020.
    """
    check_plain(m=m, gamma=gamma)
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices,
        weighted=True, memory_budget=memory_budget,
    )  # fmt: skip
    number("gamma", gamma, embeddings)
    with no_autocast(embeddings.device):
        stats = batch_pairs(both, "dot", normalize, precision).statistics(
            positive=Rule(-gamma, 1 - m, reach=1 + m),
            negative=Rule(gamma, m, reach=m),
            backend=backend,
        )
        total, counted = sum_of_both(stats)
        return reduced(softplus(total), counted, reduction, accumulate_dtype(both.x.dtype))


def n_pairs(
    anchors: Tensor,  # [N, D]
    positives: Tensor,  # [N, D]
    *,
    l2_weight: float = 0.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """N-pairs loss: `info_nce` at temperature 1 over one (anchor, positive) a class.

        loss_i = log sum_j e^<a_i, p_j> - <a_i, p_i> + l2_weight (|a_i|^2 + |p_i|^2) / 2

    anchors, positives [N, D]; arguments and errors as in `info_nce`. Paper: Sohn, 2016.
    """
    check_both("anchors", anchors, "positives", positives, precision, rows="N")
    if anchors.shape != positives.shape:
        raise ValueError(
            f"positives: expected shape {tuple(anchors.shape)}, got "
            f"{validation.describe(positives)}"
        )
    loss = info_nce(
        anchors,
        positives,
        temperature=1.0,
        normalize=normalize,
        reduction=reduction,
        precision=precision,
        memory_budget=memory_budget,
        backend=backend,
    )
    if not isinstance(l2_weight, Tensor) and l2_weight == 0:
        return loss
    first, second = (t.to(loss.dtype).square().sum(dim=1) for t in (anchors, positives))
    squares = (first + second) / 2
    everything = torch.ones_like(squares, dtype=torch.bool)
    return loss + l2_weight * reduced(squares, everything, reduction, loss.dtype)


def orthogonal_projection(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    gamma: float = 0.5,
    absolute: bool = False,
    normalize: bool = True,
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Orthogonal projection: positives' mean cosine to 1, negatives' to 0; one number.

        1 - mean_P s + gamma mean_N s        (absolute: mean_N |s|)

    embeddings [N, D], labels [N] integers; the means are over all pairs of two rows, and over none
    they are 0. memory_budget: see `info_nce`.
    ref_embeddings, ref_labels, indices: as in `contrastive`; what is listed twice counts once.
    The authors use gamma 0.5 without `absolute`, or 2 with it (twice the work).

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2); memory O(N D). Paper: Ranasinghe et al., 2021.
    """
    both = batch_sides(
        embeddings, labels, "mean", precision, ref_embeddings, ref_labels, indices,
        memory_budget=memory_budget,
    )  # fmt: skip
    with no_autocast(embeddings.device):
        listed = batch_pairs(both, "dot", normalize, precision)
        stats = listed.statistics(reduction="relu", backend=backend)
        near, far = stats.total.sum(dim=1)
        if absolute:
            turned = listed.statistics(negative=Rule(-1.0), reduction="relu", backend=backend)
            far = stats.value[NEGATIVE].sum() + turned.value[NEGATIVE].sum()
        pairs = stats.count.sum(dim=1) + 1e-6  # the authors' guard
        loss = 1 - near / pairs[POSITIVE] + gamma * far / pairs[NEGATIVE]
        return loss.to(accumulate_dtype(both.x.dtype))


_alone = lambda f, t: f(t.x, t.labels)


examples(
    multi_similarity,
    lambda f, t: f(t.x, t.labels, beta=20.0, normalize=True),
    {"": {}, "mined": dict(mining_margin=0.1)},
)
examples(circle, _alone, {"": dict(m=0.25, gamma=40.0, normalize=True)})
examples(n_pairs, lambda f, t: f(t.x, t.y[: len(t.x)], l2_weight=0.1))
examples(orthogonal_projection, _alone)
_ABSOLUTE = dict(gamma=2.0, absolute=True)
examples(orthogonal_projection, _alone, {"absolute": _ABSOLUTE})

"""Losses on the variance of a class's pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.examples import examples
from fused_losses.base.indices import Indices
from fused_losses.base.memory_budget import MemoryBudget
from fused_losses.base.numerics import accumulate_dtype, no_autocast
from fused_losses.base.sides import batch_sides
from fused_losses.base.validation import check_at_least, check_plain
from fused_losses.functions.scored_pairs import batch_pairs
from fused_losses.functions.scored_rows import folded_rows, scored_rows
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE


def intra_pair_variance(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    positive_eps: float = 0.01,
    negative_eps: float = 0.01,
    normalize: bool = False,
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Pairs on the wrong side of their class's mean similarity, s = <x_i, x_j>; one number.

        mean_P [(1 - positive_eps) mean_P s - s]+^2 + mean_N [s - (1 + negative_eps) mean_N s]+^2

    embeddings [N, D] (norm 1 in the paper), labels [N] integers; the means are over all pairs of
    two rows, 0 over none, and are differentiated. ref_embeddings, ref_labels, indices: as in
    `contrastive`. memory_budget: see `info_nce`; of the first sweep.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D), in two sweeps; memory O(N D) and a few blocks. Paper: Yu et al., Deep Metric
    Learning with Intra-Pair Variance, 2020 (as in pytorch-metric-learning).
    """
    check_plain(positive_eps=positive_eps, negative_eps=negative_eps)
    both = batch_sides(
        embeddings, labels, "mean", precision, ref_embeddings, ref_labels, indices,
        memory_budget=memory_budget,
    )  # fmt: skip
    check_at_least("positive_eps", positive_eps, 0)
    check_at_least("negative_eps", negative_eps, 0)
    with no_autocast(embeddings.device):
        # the score is -s
        inputs = scored_rows(both, "cosine", precision, normalize)
        rows = both._replace(x=inputs.x, y=inputs.y)
        pairs = batch_pairs(rows, "dot", False, precision, once=False)
        stats = pairs.statistics(reduction="relu", backend=backend)
        count = stats.count.sum(dim=1).clamp_min(1)
        means = stats.total.sum(dim=1) / count
        ones = torch.ones_like(stats.total[0])
        values = torch.stack(
            [
                ones,
                -(1 - positive_eps) * means[POSITIVE] * ones,
                -(1 + negative_eps) * means[NEGATIVE] * ones,
            ],
            dim=1,
        )
        inputs = inputs._replace(rule="hinges", params=(2,), values=values)
        sums = folded_rows(inputs, both.listed, backend).sum(dim=0)
        loss = sums[0] / count[POSITIVE] + sums[2] / count[NEGATIVE]
        return loss.to(accumulate_dtype(both.x.dtype))


def mean_of_means(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over rows that have any of their means under the mask (values 0 elsewhere)."""
    count = mask.sum(dim=1)
    means = values.sum(dim=1) / count.clamp_min(1)
    return means.sum() / (count > 0).sum().clamp_min(1)


examples(
    intra_pair_variance,
    lambda f, t: f(t.x, t.labels),
    {"": dict(positive_eps=0.05, negative_eps=0.03, normalize=True)},
)

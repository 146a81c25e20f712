"""Losses on a row's nearest neighbours."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_losses.base.examples import examples
from fused_losses.base.numerics import accumulate_dtype, no_autocast
from fused_losses.base.sides import batch_sides
from fused_losses.base.validation import check_at_least, check_count
from fused_losses.functions.chosen_triplets import listed_distances
from fused_losses.functions.scored_rows import scored_rows
from fused_losses.functions.variance import mean_of_means
from fused_losses.primitives.row_rules.op import row_losses


def icnn(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    neighbors: int = 4,
    window: int = 6,
    normalize: bool = False,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Improved class nearest neighbours: -log of a score of each row's nearest rows; one number.

        score = (lambda + gamma) / 2;   lambda = (same + different) / 2
        gamma: how many of the k nearest rows are of the same class, as a share of k
        same: 1 - mean over them of d / r, divided by the row's largest where that is above 1
        different: mean over those of another class of d / (the largest of any row)

    d Euclidean; k = neighbors; r is the farthest row of another class among the k nearest or,
    without one there, the nearest among the first `window`, without one there infinite. Means are
    taken in a row, then over the rows that have such neighbours; without any `same` and
    `different` are 1. embeddings [N, D], labels [N] integers, and ref_embeddings [M, D], ref_labels
    [M] for neighbours outside the batch; 1 <= neighbors <= window. Divisors
    have 1e-6 added. The choice of neighbours is not differentiated, and a row is no neighbour of
    itself.

    Returns float32 (float64 for float64 inputs), differentiable to any order. Raises ValueError,
    TypeError for bad arguments. Time O(N M D); memory O(M D + N window D) and a few blocks. Papers:
    Garcia Ramirez et al., 2021; Mendez-Ruiz et al., SuSana Distancia is all you need, 2023.
    """
    both = batch_sides(embeddings, labels, "mean", precision, ref_embeddings, ref_labels)
    for name, value in (("neighbors", neighbors), ("window", window)):
        check_count(name, value)
    check_at_least("window", window, neighbors)
    with no_autocast(embeddings.device):
        dtype = accumulate_dtype(both.x.dtype)
        if embeddings.shape[0] == 0:
            return both.x.to(dtype).sum() + both.y.to(dtype).sum()
        inputs = scored_rows(both, "euclidean", precision, normalize)._replace(
            rule="nearest", params=(window,)
        )
        index = row_losses(inputs, backend=backend).long()
        if both.y.shape[0] == 0:
            return (both.x.to(dtype) * 0).sum() + math.log(2)
        d = listed_distances(inputs, index, backend)
        real = index >= 0
        numbers, others = both.labels
        alike = others[index.clamp_min(0)] == numbers[:, None]
        first = torch.arange(window, device=index.device) < neighbors
        same, other = real & alike & first, real & ~alike
        beyond = torch.where(other, d, torch.inf).amin(dim=1, keepdim=True)
        other = other & first
        within = torch.where(other, d, 0).amax(dim=1, keepdim=True)
        radius = torch.where(other.any(dim=1, keepdim=True), within, beyond)
        near = torch.where(same, d / (radius + 1e-6), 0)
        near = near / near.amax(dim=1, keepdim=True).clamp_min(1)
        far = torch.where(other, d, 0)
        far = far / (far.amax() + 1e-6)
        apart = mean_of_means(far, other)
        score = (1 - mean_of_means(near, same)) + torch.where(other.any(), apart, 1)
        gamma = same.sum(dim=1).to(dtype).mean() / neighbors
        return -((score / 2 + gamma) / 2).log()


examples(icnn, lambda f, t: f(t.x, t.labels, neighbors=3, window=5))
examples(
    icnn,
    lambda f, t: f(t.x, t.labels, t.y, t.y_labels, neighbors=3, window=5),
    {"ref": {}},
)

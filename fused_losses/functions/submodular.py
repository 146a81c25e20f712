"""Functions of sets as losses of a batch: cuts, facility locations, and what two sets share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.indices import Indices
from fused_losses.base.memory_budget import MemoryBudget
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced
from fused_losses.base.sides import batch_sides
from fused_losses.base.validation import check_choice, check_plain, number
from fused_losses.functions.scored_pairs import batch_pairs, has_both
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE

KINDS = ("graph_cut", "facility_location", "flmi", "gcmi")


def submodular(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    kind: str,
    temperature: float | Tensor = 0.2,
    weight: float = 1.0,
    indices: Indices | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """A batch's classes as sets, row by row; s the product, T the temperature.

        graph_cut          sum_N e^((s - 1) / T) - weight sum_P e^((s - 1) / T)
        facility_location  log sum_N e^((s - 1) / T), of rows with a negative
        flmi               min(m_P, weight m_N), m = T log sum e^(s / T), of rows with both
        gcmi               2 weight sum_N s

    For unit rows 1 is the largest s, a row's own: what the authors' code subtracts as its maximum.
    Arguments, what is returned and raised as in `multi_similarity`; weight >= 0 is a number.
    Time O(N^2 D / 2), memory O(N D).
    """
    check_choice("kind", kind, KINDS)
    check_plain(weight=weight)
    if not 0 <= weight < float("inf"):
        raise ValueError(f"weight: expected a value >= 0, got {weight}")
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices,
        memory_budget=memory_budget,
    )  # fmt: skip
    t = number("temperature", temperature, embeddings)
    with no_autocast(embeddings.device):
        options: dict[str, Any] = dict(scale=None if kind == "gcmi" else 1 / t)
        pairs = batch_pairs(both, "dot", normalize, precision, **options)
        stats = pairs.statistics(backend=backend)
        near, far = stats.value[POSITIVE], stats.value[NEGATIVE]
        counted = torch.ones_like(far, dtype=torch.bool)
        if kind == "graph_cut":
            loss = (far - 1 / t).exp() - weight * (near - 1 / t).exp()
        elif kind == "facility_location":
            counted = stats.count[NEGATIVE] > 0
            loss = torch.where(counted, far, 0) - 1 / t
        elif kind == "flmi":
            counted = has_both(stats)
            soft = [t * torch.where(counted, z, 0) for z in (near, far)]
            loss = torch.minimum(soft[0], weight * soft[1])
        else:
            loss = 2 * weight * stats.total[NEGATIVE]
        loss = torch.where(counted, loss, 0)
        return reduced(loss, counted, reduction, accumulate_dtype(both.x.dtype))

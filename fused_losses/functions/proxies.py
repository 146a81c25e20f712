"""Losses against a proxy a class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.examples import examples
from fused_losses.base.indices import Indices, occurrences
from fused_losses.base.memory_budget import MemoryBudget
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced, softplus
from fused_losses.base.sides import class_sides
from fused_losses.base.validation import check_plain, number
from fused_losses.functions.listed_triplets import listed_example
from fused_losses.functions.scored_pairs import has_both, scored
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, Rule
from fused_losses.primitives.pairs.op import pair_statistics


def proxy_nca(
    embeddings: Tensor,  # [N, D]
    proxies: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    *,
    scale: float | Tensor = 1.0,
    positive_in_denominator: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Proxy-NCA: softmax over -scale |x_i - w_c|^2.

        loss_i = log sum_c e^z_ic - z_iy;   positive_in_denominator=False: over c != y (the paper)

    embeddings [N, D], proxies [C, D] (both of norm 1 in the paper), labels [N] in [0, C), scale > 0
    (a number or a scalar tensor, which may need a gradient). True is what
    pytorch-metric-learning computes. reduction: "mean", "sum", "none" [N]. memory_budget: see
    `info_nce`.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. Time O(N C D); memory O((N + C) D). Paper: Movshovitz-Attias et al., 2017.
    """
    both = class_sides(
        embeddings, "proxies", proxies, labels, reduction, precision, memory_budget=memory_budget
    )
    scale = number("scale", scale, embeddings)
    with no_autocast(embeddings.device):
        inputs = scored(
            both.x, both.y, scale, similarity="rbf", normalize=normalize, precision=precision
        )
        stats, _ = pair_statistics(inputs.known(both.numbers), room=both.room, backend=backend)
        # with one class alone there is nothing to tell apart
        counted = has_both(stats)
        gap = torch.where(counted, stats.value[NEGATIVE] - stats.value[POSITIVE], 0)
        loss = torch.where(counted, softplus(gap) if positive_in_denominator else gap, 0)
        everything = torch.ones_like(counted)
        return reduced(loss, everything, reduction, accumulate_dtype(both.x.dtype))


def proxy_anchor(
    embeddings: Tensor,  # [N, D]
    proxies: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    *,
    indices: Indices | None = None,
    alpha: float = 32.0,
    margin: float = 0.1,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Proxy-anchor loss: the proxies are the anchors, s = <w_c, x_i>.

        attract_c = log(1 + sum_{y_i = c} e^(-alpha (s - margin)))
        repel_c = log(1 + sum_{y_i != c} e^(alpha (s + margin)))

    embeddings [N, D], proxies [C, D] (both of norm 1 in the paper), labels [N] in [0, C),
    alpha > 0. reduction: "mean" (the paper): attract's over the proxies whose class is there, plus
    repel's over all of them; "sum" and "none" [C]: of attract + repel. indices: a miner's,
    (a, p, n) or (a, p, a, n), int64: row i's terms are times e^(w_i - 1), with w_i how often it is
    in them over the most that one row is, as pytorch-metric-learning has it; 1 of empty lists.
    memory_budget: see `info_nce`.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. Time O(N C D), twice with indices; memory O((N + C) D). Paper: Kim et al., 2020.
    """
    check_plain(alpha=alpha, margin=margin)
    both = class_sides(
        embeddings, "proxies", proxies, labels, reduction, precision, memory_budget=memory_budget
    )
    number("alpha", alpha, embeddings)
    with no_autocast(embeddings.device):
        one = number("scale", 1.0, embeddings)
        # the sums are the proxies', so the proxies are the rows
        inputs = scored(both.y, both.x, one, normalize=normalize, precision=precision)
        inputs = inputs._replace(
            x_labels=both.numbers.y_labels,
            y_labels=both.numbers.x_labels,
            positive=Rule(-alpha, margin),
            negative=Rule(alpha, -margin),
        )
        dtype = accumulate_dtype(both.x.dtype)
        how: dict[str, Any] = dict(room=both.room, backend=backend)
        if indices is None:
            stats, _ = pair_statistics(inputs, **how)
            sums = stats.value
        else:
            # the scores move, down for the ones and up for the others: a sweep for each
            move = ((occurrences(indices, embeddings) - 1) / alpha).to(dtype)
            stats, _ = pair_statistics(inputs._replace(y_bias=-move), **how)
            others, _ = pair_statistics(inputs._replace(y_bias=move), **how)
            sums = torch.stack([stats.value[POSITIVE], others.value[NEGATIVE]])
        attract, repel = softplus(sums)
        present = stats.count[POSITIVE] > 0
        everything = torch.ones_like(present)
        if reduction != "mean":
            return reduced(attract + repel, everything, reduction, dtype)
        return reduced(attract, present, "mean", dtype) + reduced(repel, everything, "mean", dtype)


examples(
    proxy_nca,
    lambda f, t: f(t.x, t.w, t.targets, scale=t.scale, normalize=True),
    {"": {}, "paper": dict(positive_in_denominator=False)},
)
examples(proxy_anchor, lambda f, t: f(t.x, t.w, t.targets), {"": dict(alpha=8.0, normalize=True)})
examples(
    proxy_anchor,
    lambda f, t: f(t.x, t.w, t.targets, indices=listed_example(len(t.x), t.x.device)),
    {"mined": dict(alpha=8.0, normalize=True)},
)

"""Higher-order compatibility of new features with those of an older model."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import no_autocast, reduced
from fused_losses.base.validation import number
from fused_losses.similarity.attention import logsumexp_similarity


def higher_order_compatibility(
    new: Tensor,  # [N, D]
    old: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    scale: float | Tensor = 10.0,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """HOC: each old feature finds its new one among the new features of other classes.

        loss_i = log sum_j exp(scale [y_j != y_i] <old_i, new_j>) - scale <old_i, new_i>

    Pairs of one class keep the score 0 in the sum, the row's own among them, as the authors have
    it. The paper mixes it, with weight 0.1, with cross entropy on a `DSimplexHead`.

    Args:
        new: [N, D] features of the model that trains; the authors' are normalised.
        old: [N, D] of the model that they must stay compatible with, of the same inputs; a gradient
            goes to it if it asks for one.
        labels: [N] integers.
        scale: > 0, mu; a number or a scalar tensor, which may need a gradient.
        reduction: "mean" (0 of no rows), "sum", "none" [N].

    Returns the loss in float32 (float64 of float64 inputs). Raises ValueError, TypeError for bad
    arguments. Time O(N^2 D), memory O(N D). Paper: Biondi et al., "Stationary representations",
    2024.
    """
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    validation.check_matrix("new", new, "[N, D]")
    validation.check_matrix("old", old, "[N, D]")
    if old.shape != new.shape:
        raise ValueError(
            f"old: expected shape {tuple(new.shape)} as new has, got {validation.describe(old)}"
        )
    factor = number("scale", scale, new)
    sums = logsumexp_similarity(
        old, new, scale=factor, x_labels=labels, y_labels=labels, zero="same",
        precision=precision, backend=backend,
    )  # fmt: skip
    with no_autocast(new.device):
        own = (old.to(torch.float64) * new.to(torch.float64)).sum(dim=1)
        each = (sums - factor * own).to(sums.dtype)
        return reduced(each, torch.ones_like(each, dtype=torch.bool), reduction, each.dtype)


examples(
    higher_order_compatibility,
    lambda f, t: f(t.x, t.y[: len(t.x)], t.labels, scale=t.scale),
)

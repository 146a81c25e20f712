"""Losses of rows and what belongs to them alone, O(N D): two views, a list of candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_plain, number


def alignment(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    *,
    alpha: float = 2.0,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """How near a row is to its positive: |x_i - y_i|^alpha.

    x, y [N, D] (norm 1 in the paper: normalize=True), alpha > 0. reduction: "mean" (0 of no rows),
    "sum" or "none" [N]. Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError
    for bad arguments. Time and memory O(N D). Paper: Wang and Isola, 2020.
    """
    check_plain(alpha=alpha)
    x = validation.check_both("x", x, "y", y, "fp32")
    if x.shape != y.shape:
        raise ValueError(
            f"y: expected shape {tuple(x.shape)} as x has, got {validation.describe(y)}"
        )
    number("alpha", alpha, x)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    with no_autocast(x.device):
        dtype = accumulate_dtype(x.dtype)
        x, y = x.to(dtype), y.to(dtype)
        x, y = (unit(x), unit(y)) if normalize else (x, y)
        square = (x - y).square().sum(dim=1)
        # rows that agree have no slope; `not <=`: a NaN stays one
        apart = ~(square <= 0)
        loss = torch.where(apart, torch.where(apart, square, 1) ** (alpha / 2), 0)
        return reduced(loss, torch.ones_like(apart), reduction, dtype)


def soft_label_kl(
    scores: Tensor,  # [N, K]
    judged: Tensor,  # [N, K]
    *,
    temperature: float | Tensor = 0.1,
    eps: float = 1e-8,
    reduction: str = "mean",
) -> Tensor:
    """Both divergences between the softmax of a list's scores and that of a judge's, halved.

        p = softmax(scores / temperature), q = softmax(judged / temperature)
        loss_i = (sum_k q (log q - log(p + eps)) + sum_k p (log p - log(q + eps))) / 2

    Args:
        scores, judged: [N, K], a list of K candidates a row, the same in both.
        temperature: > 0; a float or a scalar tensor, which may need a gradient.
        eps: >= 0, the authors' 1e-8, which is seen where a softmax is sharp.
        reduction: "mean" (0 of no rows), "sum" or "none" [N].

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time and memory O(N K). Paper: Gu et al., UniME-V2, 2025.
    """
    check_plain(eps=eps)
    scores = validation.check_both("scores", scores, "judged", judged, "fp32", rows="N")
    if scores.shape != judged.shape:
        raise ValueError(
            f"judged: expected shape {tuple(scores.shape)} as scores have, got "
            f"{validation.describe(judged)}"
        )
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    validation.check_at_least("eps", eps, 0.0)
    t = number("temperature", temperature, scores)
    with no_autocast(scores.device):
        dtype = accumulate_dtype(scores.dtype)
        log_p, log_q = (
            (side.to(dtype) / t.to(dtype)).log_softmax(dim=1) for side in (scores, judged)
        )
        p, q = log_p.exp(), log_q.exp()
        # without eps, what a logarithm of 0 would be
        of_p = (p + eps).log() if eps else log_p
        of_q = (q + eps).log() if eps else log_q
        loss = (q * (log_q - of_p) + p * (log_p - of_q)).sum(dim=1) / 2
        return reduced(loss, torch.ones_like(loss, dtype=torch.bool), reduction, dtype)

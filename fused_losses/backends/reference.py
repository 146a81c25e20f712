"""The truth: each loss from its formula, materialised, in plain PyTorch, in the dtype it is given.

Nothing here knows how the kernels work: the scores are a matrix, the loss is F.cross_entropy.
Memory O(N C); runs on any device, in float64, with derivatives of any order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base.numerics import unit_rows
from fused_losses.margins import Margin, apply_margin, bend_of


def unavailable() -> str | None:
    return None


def reasons_against(device: torch.device, dtype: torch.dtype, precision: str) -> list[str]:
    if precision != "fp32":
        return [f"precision={precision!r}: the reference computes in the dtype of its inputs"]
    return []


def margin_softmax(
    embeddings: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    *,
    margin: Margin | None,
    scale: float | Tensor,  # scalar or [N]
    normalize: bool,
    bias: Tensor | None,  # [C]
    label_smoothing: float,
    ignore_index: int,
    class_weight: Tensor | None,  # [C]
    classes: Tensor | None,  # [K], sorted
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [N], the cosines [N, K] and the logits [N, K] that entered the loss.

    The cosines are those before the margin, other classes' bent where the margin bends.
    """
    if classes is not None:
        weight, labels = weight[classes], positions(labels, classes, ignore_index)
        bias = None if bias is None else bias[classes]
        class_weight = None if class_weight is None else class_weight[classes]
    valid = labels != ignore_index
    # an ignored row must not reach the gradients, not even with NaN
    embeddings = torch.where(valid[:, None], embeddings, 0)
    norm = embeddings.norm(dim=1)
    x = unit_rows(embeddings) if normalize else embeddings
    w = unit_rows(weight) if normalize else weight
    cosine = x @ w.T
    picked = torch.where(valid, labels, 0)[:, None]
    target = cosine.gather(1, picked)[:, 0]
    bend = bend_of(margin, target, valid)
    if bend is not None:
        cosine = bent(cosine, bend).scatter(1, picked, target[:, None])
    moved = apply_margin(margin, target, norm, gradient)
    logits = cosine.scatter(1, picked, torch.where(valid, moved, target)[:, None])
    logits = logits * (scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale)
    if bias is not None:
        logits = logits + bias
    loss = F.cross_entropy(
        logits,
        labels,
        weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    if hasattr(margin, "penalty"):
        loss = loss + torch.where(valid, margin.penalty(norm), 0)
    return loss, cosine, logits


def bent(score: Tensor, bend: Tensor) -> Tensor:
    """psi of `fused_losses.sweep`: a row's scores above its threshold as its polynomial says.

    score [N, C] · bend [4, N] · returns [N, C]
    """
    t, p, q, r = bend.to(score.dtype)[:, :, None]
    return torch.where(score > t, p + q * score + r * score**2, score)


def positions(labels: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """Where each label stands in `classes`; ignore_index stays."""
    found = torch.searchsorted(classes, labels).clamp_max(classes.numel() - 1)
    return torch.where(labels == ignore_index, ignore_index, found)


def row_statistics(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N], -1: no target
    classes: Tensor | None,
    bias: Tensor | None,
    column_weight: Tensor | None,
    normalize: bool,
    bend: Tensor | None = None,  # [4, N]
) -> dict[str, Tensor]:
    """The primitive of `fused_losses.sweep`, spelled out on the score matrix."""
    ids = torch.arange(weight.shape[0], device=x.device) if classes is None else classes
    w = unit_rows(weight) if normalize else weight
    raw = x @ w.T
    scores = raw if bend is None else bent(raw, bend)
    scores = (scores if bias is None else scores + bias)[:, ids]
    is_target = labels[:, None] == ids[None, :]
    others = scores.masked_fill(is_target, -torch.inf)
    has_target = labels >= 0
    target = raw.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    v = torch.ones_like(scores[:1]) if column_weight is None else column_weight[ids].to(scores)
    best = others.max(dim=1)
    return {
        "lse": torch.logsumexp(others, dim=1),
        "target": torch.where(has_target, target, 0),
        "weighted_sum": (v * scores).masked_fill(is_target, 0).sum(dim=1),
        "hardest": torch.where(best.values > -torch.inf, ids[best.indices], -1),
        "hardest_score": best.values,
    }

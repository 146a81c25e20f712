"""What the ends of a margin softmax have in common: weights of rows, smoothing, means, a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import reduced
from fused_losses.base.parameters import check_above
from fused_losses.primitives.row_statistics.op import RowStatistics


def smoothed(
    loss: Tensor,
    logsumexp: Tensor,
    target: Tensor,
    row_weight: float | Tensor,
    stats: RowStatistics,
    class_weight: Tensor | None,
    classes: Tensor | None,
    label_smoothing: float,
    taking_part: int,
) -> Tensor:
    """(1 - eps) v_y loss + eps / K sum_j v_j (lse - z_j), as torch defines label smoothing."""
    if class_weight is None:
        total: float | Tensor = float(taking_part)
    else:
        total = (class_weight if classes is None else class_weight[classes]).sum()
    uniform = total * logsumexp - stats.weighted_sum - row_weight * target
    return (1 - label_smoothing) * row_weight * loss + label_smoothing / taking_part * uniform


def row_weights(
    labels: Tensor,
    ignore_index: int,
    class_weight: Tensor | None,
    like: Tensor,
    row_weight: Tensor | None = None,
) -> Tensor:
    """What each row counts for in a mean: 0 if ignored, else its class's weight, times its own."""
    valid = labels != ignore_index
    counts = valid.to(like.dtype)
    if class_weight is not None:
        counts = torch.where(valid, class_weight[torch.where(valid, labels, 0)].to(like.dtype), 0)
    return counts if row_weight is None else counts * row_weight.to(like.dtype)


def mean_of(
    loss: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    row_weight: Tensor | None = None,
) -> Tensor:
    """A loss a row, that has its class's weight but not its own, reduced."""
    if class_weight is None and row_weight is None and reduction != "none":
        return reduced(loss, labels != validation.NO_TARGET, reduction, loss.dtype)
    if row_weight is not None:
        loss = loss * row_weight.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = row_weights(labels, validation.NO_TARGET, class_weight, loss, row_weight).sum()
    # where nothing counts: 0, but for what is no number; smoothing alone may have a loss there
    return loss.sum() * (total != 0) / torch.where(total == 0, 1, total)


def checked_scale(scale: float | Tensor, embeddings: Tensor) -> float | Tensor:
    """A float, or a tensor [] or [N]."""
    if isinstance(scale, Tensor):
        n = embeddings.shape[0]
        if scale.dim() == 1 and scale.shape[0] == 1:  # a parameter that learns often has a row
            scale = scale.reshape(())
        if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != n):
            raise ValueError(
                f"scale: expected a number, a scalar tensor or shape ({n},), got "
                f"{validation.describe(scale)}"
            )
        validation.check_device("embeddings", embeddings, "scale", scale)
        return scale
    check_above("scale", scale)
    return scale if isinstance(scale, int | float) else float(scale)

"""Margin softmax materialised: the loss is F.cross_entropy of a matrix of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base.numerics import unit_rows
from fused_losses.base.products import product
from fused_losses.base.validation import NO_TARGET
from fused_losses.functions.margin_calls import apply_margin, bend_of, penalty_of
from fused_losses.margins import Margin
from fused_losses.primitives.row_statistics.reference import bent


def margin_softmax(
    embeddings: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N], NO_TARGET: ignored
    *,
    margin: Margin | None,
    scale: float | Tensor,  # scalar or [N]
    normalize: bool,
    bias: Tensor | None,  # [C]
    label_smoothing: float,
    class_weight: Tensor | None,  # [C]
    classes: Tensor | None,  # [K], sorted
    gradient: str,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row losses [N], the cosines [N, K] and the logits [N, K] that entered the loss.

    The cosines are those before the margin, other classes' bent where the margin bends.
    """
    if classes is not None:
        weight, labels = weight[classes], positions(labels, classes)
        bias = None if bias is None else bias[classes]
        class_weight = None if class_weight is None else class_weight[classes]
    valid = labels != NO_TARGET
    # an ignored row must not reach the gradients, not even with NaN
    embeddings = torch.where(valid[:, None], embeddings, 0)
    norm = embeddings.norm(dim=1)
    x = unit_rows(embeddings) if normalize else embeddings
    w = unit_rows(weight) if normalize else weight
    cosine = product(x, w)
    picked = torch.where(valid, labels, 0)[:, None]
    target = cosine.gather(1, picked)[:, 0]
    bend = bend_of(margin, target, valid)
    if bend is not None:
        cosine = bent(cosine, bend).scatter(1, picked, target[:, None])
    moved = apply_margin(margin, target, norm, gradient, valid)
    logits = cosine.scatter(1, picked, torch.where(valid, moved, target)[:, None])
    logits = logits * (scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale)
    if bias is not None:
        logits = logits + bias
    loss = F.cross_entropy(
        logits,
        labels,
        weight=class_weight,
        ignore_index=NO_TARGET,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    row_weight = 1.0 if class_weight is None else class_weight[picked[:, 0]]
    loss = loss + torch.where(valid, row_weight * penalty_of(margin, norm), 0)
    if z_loss:
        loss = loss + torch.where(valid, row_weight * z_loss * logits.logsumexp(dim=1) ** 2, 0)
    return loss, cosine, logits


def positions(labels: Tensor, classes: Tensor) -> Tensor:
    """Where each label stands in `classes`; NO_TARGET stays."""
    found = torch.searchsorted(classes, labels).clamp_max(classes.numel() - 1)
    return torch.where(labels == NO_TARGET, NO_TARGET, found)

"""What a margin softmax tells of each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.validation import NO_TARGET


class MarginSoftmaxStats(NamedTuple):
    """What a margin softmax knows of each row, [N] each; ignored rows 0, -1, False.

    Detached, but with return_stats="grad" logsumexp and target_cosine have gradients.
    """

    logsumexp: Tensor  # log of the softmax denominator, margin included
    target_cosine: Tensor  # before the margin
    # where the margin bends other classes, the highest is so as bent, and its cosine the bent one
    hardest_class: Tensor  # int64 id of the highest other class; -1 if there is none
    hardest_cosine: Tensor  # its cosine
    hit: Tensor  # bool: the target scores above every other class, margin left out


def check_return_stats(return_stats: object) -> None:
    if not isinstance(return_stats, bool) and return_stats != "grad":
        raise ValueError(f'return_stats: expected True, False or "grad", got {return_stats!r}')


DIFFERENTIABLE = ("logsumexp", "target_cosine")


def blanked(valid: Tensor, attached: bool, *columns: Tensor) -> MarginSoftmaxStats:
    """The stats with ignored rows blank: 0, no class, no hit; those of DIFFERENTIABLE attached."""
    blank = (0.0, 0.0, -1, 0.0, False)
    kept = (attached and name in DIFFERENTIABLE for name in MarginSoftmaxStats._fields)
    return MarginSoftmaxStats(
        *(
            torch.where(valid, c if keep else c.detach(), b)
            for c, b, keep in zip(columns, blank, kept, strict=True)
        )
    )


def reference_stats(
    cosine: Tensor,
    logits: Tensor,
    labels: Tensor,
    classes: Tensor | None,
    scale: float | Tensor,
    bias: Tensor | None,
    attached: bool,
) -> MarginSoftmaxStats:
    with torch.set_grad_enabled(torch.is_grad_enabled() and attached):
        ids = torch.arange(cosine.shape[1], device=cosine.device) if classes is None else classes
        valid = labels != NO_TARGET
        is_target = (labels[:, None] == ids) & valid[:, None]
        factor = scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale
        plain = cosine * factor + (0 if bias is None else bias[ids])
        best = plain.masked_fill(is_target, -torch.inf).max(dim=1)
        alone = best.values == -torch.inf
        target = torch.where(is_target, cosine, 0).sum(1)
        hardest = cosine.gather(1, best.indices[:, None])[:, 0]
        return blanked(
            valid,
            attached,
            torch.logsumexp(logits, dim=1),
            target,
            torch.where(alone, -1, ids[best.indices]),
            torch.where(alone, -torch.inf, hardest),
            torch.where(is_target, plain, 0).sum(1) > best.values,
        )

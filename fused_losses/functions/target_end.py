"""What a margin softmax does with the scores of a row's target, before its sweep and after it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fused_losses.base.numerics import against, followed, reduced
from fused_losses.base.target_loss import MovedTarget, TargetEnd, target_loss
from fused_losses.functions.margin_calls import apply_margin, bend_of
from fused_losses.margins import ArcFace, CombinedMargin, CosFace, Margin
from fused_losses.primitives.row_statistics import bounded


def score_bend(
    x: Tensor,  # [N, D], of norm 1 if normalize
    weight: Tensor,
    labels: Tensor,  # [N], -1: no target
    margin: Margin | None,
    scale: float | Tensor,
    normalize: bool,
    shortest: float,
) -> Tensor | None:
    """The margin's bends [4, N] of scores, from its bends of cosines, in the accumulation dtype."""
    if not hasattr(margin, "bend"):
        return None
    if isinstance(scale, Tensor) and followed(scale):
        raise NotImplementedError(
            "scale: its gradient through a margin that bends other classes is not supported by the "
            "streamed kernels; use backend='reference', or detach the scale"
        )
    cosine = bounded.targets(x.detach(), weight.detach(), labels, normalize, shortest)
    bend = bend_of(margin, cosine, labels != -1)
    assert bend is not None
    t, p, q, r = bend
    return torch.stack((t * scale, p * scale, q, r / scale)).to(x.dtype)


def against_target(target: Tensor, lse: Tensor) -> Tensor:
    """softplus(lse - target). [N]

    Of an infinite target the limit is 0, but that is a fault that must show, as it does in
    F.cross_entropy.
    """
    return against(target, lse) * torch.where(target == torch.inf, torch.nan, 1)


def at_once(
    lse: Tensor,  # [N]
    target: Tensor,  # [N]
    labels: Tensor,  # [N], -1: no target
    margin: Margin | None,
    scale: float | Tensor,
    gradient: str,
    reduction: str,
) -> Tensor | None:
    """The mean or sum of the losses in one launch, where a device has it for this margin; or None.

    Nothing else may be in the loss: no bias, weight, smoothing or penalty.
    """
    if isinstance(scale, Tensor) or gradient != "exact" or reduction == "none":
        return None
    moved = _moved(margin)
    if moved is None and margin is not None:
        return None
    end = TargetEnd(float(scale), moved, reduction == "mean")
    formula = partial(_formula, labels=labels, margin=margin, scale=scale, reduction=reduction)
    return target_loss(lse, target, labels, end, formula)


def _formula(
    lse: Tensor,
    target: Tensor,
    *,
    labels: Tensor,
    margin: Margin | None,
    scale: float,
    reduction: str,
) -> Tensor:
    valid = labels != -1
    moved = scale * apply_margin(margin, target / scale, None, "exact", valid)
    loss = torch.where(valid, against_target(moved, lse), 0)
    return reduced(loss, valid, reduction, torch.float32)


def _moved(margin: Margin | None) -> MovedTarget | None:
    """A margin in numbers, or None: it has tensors, or a formula of its own."""
    kind = type(margin)
    if isinstance(margin, CosFace) and kind is CosFace:
        parts = (0.0, margin.margin, "none")
    elif isinstance(margin, ArcFace) and kind is ArcFace:
        parts = (margin.margin, 0.0, margin.beyond_pi)
    elif isinstance(margin, CombinedMargin) and kind is CombinedMargin:
        if isinstance(margin.m1, Tensor) or margin.m1 != 1:
            return None
        parts = (margin.m2, margin.m3, margin.beyond_pi)
    else:
        return None
    m2, m3, beyond = parts
    if isinstance(m2, Tensor) or isinstance(m3, Tensor):
        return None
    if m2 == 0 and beyond == "clip":  # which moves the cosine, too
        return None
    return MovedTarget(float(m2), float(m3), beyond)

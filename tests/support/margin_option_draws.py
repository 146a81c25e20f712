"""Options of the margins at other values than their defaults, for the draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import margin_calls as calls
import torch
from pair_cases import Case
from pair_rows import Inputs
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import margins


def seeded(kind: type, *args: Any) -> Callable[[], Any]:
    """Draws of no spread: each is the margin."""
    return lambda: kind(
        *args, std=0.0, plus="reference", generator=torch.Generator().manual_seed(1)
    )


def magface(t: Inputs) -> Tensor:
    a = calls.norm_of(t).clamp(0.5, 2.0)
    margin = 0.35 / 1.5 * (a - 0.5) + 0.45
    return calls.head(lambda c, t: calls.added(c, margin)[1])(t) + (35.0 * (a / 4 + 1 / a)).mean()


def clipped(c: Tensor, t: Inputs) -> Tensor:
    angle = 1.4 * calls.theta(c.clamp(-0.99, 0.99)) + 0.4
    return angle.clamp(0.01, math.pi - 0.01).cos() - 0.1


MARGINS: dict[str, tuple[Callable[[], Any], Callable[[Inputs], Tensor]]] = {
    "ArcFace_eps": (
        lambda: margins.ArcFace(0.5, "clip", 0.01),
        calls.head(lambda c, t: calls.clip(c, 0.5, 0.01)),
    ),
    "CombinedMargin_clip": (
        lambda: margins.CombinedMargin(1.4, 0.4, 0.1, "clip", 0.01),
        calls.head(clipped),
    ),
    "SphereFace_none": (
        lambda: margins.SphereFace(3.0, "none"),
        calls.head(lambda c, t: calls.added(c, 0.0, 3.0)[1]),
    ),
    "ElasticArcFace_others": (
        seeded(partial(margins.ElasticArcFace, beyond_pi="easy"), 0.3),
        calls.head(lambda c, t: calls.easy(c, 0.3)),
    ),
    "ElasticCosFace_others": (
        seeded(margins.ElasticCosFace, 0.25),
        calls.head(lambda c, t: c - 0.25),
    ),
    "AdaFace_others": (
        partial(margins.AdaFace, 0.3, 0.5, momentum=0.05, eps=0.01),
        calls.head(lambda c, t: calls.ada(c, calls.norm_of(t), 0.3, 0.5, 0.05, 0.01)),
    ),
    "MagFace_none": (partial(margins.MagFace, 0.5, 2.0, beyond_pi="none"), magface),
    "MVSoftmax_none": (
        partial(margins.MVSoftmax, "arc", 0.3, 0.2, "fixed", "none"),
        calls.head(
            lambda c, t: calls.added(c, 0.3)[1],
            lambda c, y: calls.bent(c, calls.added(y, 0.3)[1], c + 0.2),
        ),
    ),
}


def margin_softmax(make: Callable[[], Any], t: Inputs, **more: Any) -> Tensor:
    made = make()
    wide = torch.float64 if t.x.dtype == torch.float64 else torch.float32
    made = made.to(wide) if isinstance(made, torch.nn.Module) else made  # averages
    return fl.margin_softmax(t.x, t.w, t.targets, margin=made, scale=calls.SCALE, **more)


DRAWN = [
    Case(
        f"margin_{name}",
        calls.classes,
        partial(margin_softmax, make),
        f,
        ("x", "w"),
        function=fl.margin_softmax,
    )
    for name, (make, f) in MARGINS.items()
]

"""Options of the margins at other values than their defaults, for the draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import margin_draws as m
import torch
from pair_cases import Case
from pair_formulas import Inputs
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import margins


def seeded(kind: type, *args: Any) -> Callable[[], Any]:
    """Draws of no spread: each is the margin."""
    return lambda: kind(
        *args, std=0.0, plus="reference", generator=torch.Generator().manual_seed(1)
    )


def magface(t: Inputs) -> Tensor:
    a = m.norm_of(t).clamp(0.5, 2.0)
    margin = 0.35 / 1.5 * (a - 0.5) + 0.45
    return m.head(lambda c, t: m.added(c, margin)[1])(t) + (35.0 * (a / 4 + 1 / a)).mean()


def clipped(c: Tensor, t: Inputs) -> Tensor:
    angle = 1.4 * m.theta(c.clamp(-0.99, 0.99)) + 0.4
    return angle.clamp(0.01, math.pi - 0.01).cos() - 0.1


MARGINS: dict[str, tuple[Callable[[], Any], Callable[[Inputs], Tensor]]] = {
    "ArcFace_eps": (
        lambda: margins.ArcFace(0.5, "clip", 0.01),
        m.head(lambda c, t: m.clip(c, 0.5, 0.01)),
    ),
    "CombinedMargin_clip": (
        lambda: margins.CombinedMargin(1.4, 0.4, 0.1, "clip", 0.01),
        m.head(clipped),
    ),
    "SphereFace_none": (
        lambda: margins.SphereFace(3.0, "none"),
        m.head(lambda c, t: m.added(c, 0.0, 3.0)[1]),
    ),
    "ElasticArcFace_others": (
        seeded(partial(margins.ElasticArcFace, beyond_pi="easy"), 0.3),
        m.head(lambda c, t: m.easy(c, 0.3)),
    ),
    "ElasticCosFace_others": (
        seeded(margins.ElasticCosFace, 0.25),
        m.head(lambda c, t: c - 0.25),
    ),
    "AdaFace_others": (
        partial(margins.AdaFace, 0.3, 0.5, momentum=0.05, eps=0.01),
        m.head(lambda c, t: m.ada(c, m.norm_of(t), 0.3, 0.5, 0.05, 0.01)),
    ),
    "MagFace_none": (partial(margins.MagFace, 0.5, 2.0, beyond_pi="none"), magface),
    "MVSoftmax_none": (
        partial(margins.MVSoftmax, "arc", 0.3, 0.2, "fixed", "none"),
        m.head(
            lambda c, t: m.added(c, 0.3)[1],
            lambda c, y: m.bent(c, m.added(y, 0.3)[1], c + 0.2),
        ),
    ),
}


def margin_softmax(make: Callable[[], Any], t: Inputs, **more: Any) -> Tensor:
    made = make()
    wide = torch.float64 if t.x.dtype == torch.float64 else torch.float32
    made = made.to(wide) if isinstance(made, torch.nn.Module) else made  # averages
    return fl.margin_softmax(t.x, t.w, t.targets, margin=made, scale=m.SCALE, **more)


DRAWN = [
    Case(
        f"margin_{name}",
        m.classes,
        partial(margin_softmax, make),
        f,
        ("x", "w"),
        function=fl.margin_softmax,
    )
    for name, (make, f) in MARGINS.items()
]

"""Margins and losses over classes for the draws: calls, and literal formulas.

The formulas follow the papers and use nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from margin_calls import (
    MARGINS,
    SCALE,
    classes,
)
from pair_cases import Case
from pair_rows import Inputs, lse, proxies, unit
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import class_losses, margins


def sub_centers(n: int, m: int, d: int) -> Inputs:
    """Three centres a class; one label or two a row, some rows without."""
    t = proxies(n, m, d)
    t.w = torch.randn(m, 3, d) / d**0.5
    second = torch.where((torch.rand(n) < 0.5) | (m == 1), -100, (t.targets + 1) % m)
    t.targets = torch.stack([t.targets, second], dim=1)
    t.targets[n // 2] = -100
    t.bias = torch.tensor(-3.0)
    return t


# ---- losses over classes ------------------------------------------------------------------------


def softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


class Seen:
    """Pooled cosines with every class, and which classes are a row's own."""

    def __init__(self, t: Inputs, softness: float = 0.0) -> None:
        each = torch.einsum("nd,ckd->nck", unit(t.x), unit(t.w.flatten(0, 1)).view_as(t.w))
        weights = (each / softness).softmax(2) if softness else None
        self.cosine = each.amax(2) if weights is None else (weights * each).sum(2)
        self.own = (t.targets[:, :, None] == torch.arange(len(t.w))).any(1)
        self.some = self.own.any(1)

    def mean(self, rows: Tensor) -> Tensor:
        """Over the rows with a label."""
        return torch.where(self.some, rows, 0).sum() / self.some.sum().clamp_min(1)

    def over_labels(self, each: Tensor) -> Tensor:
        return torch.where(self.own, each, 0).sum(1)


def of_softmax(scale: float, margin: float, softness: float = 0.0) -> Callable[[Inputs], Tensor]:
    def formula(t: Inputs) -> Tensor:
        s = Seen(t, softness)
        repel = lse(scale * s.cosine, ~s.own)[:, None]
        z = scale * (s.cosine - margin)
        some = (repel > -torch.inf) & s.own
        each = torch.where(some, torch.logaddexp(z, torch.where(some, repel, 0)) - z, 0)
        return s.mean(s.over_labels(each) / s.own.sum(1).clamp_min(1))

    return formula


def sface(t: Inputs) -> Tensor:
    s = Seen(t)
    angle = s.cosine.detach().clamp(-1, 1).acos()
    pull, push = torch.sigmoid(80 * (angle - 0.8)), torch.sigmoid(80 * (1.23 - angle))
    rows = torch.where(s.own, 0, push * s.cosine).sum(1) - s.over_labels(pull * s.cosine)
    return s.mean(64.0 * rows)


def sphereface2(t: Inputs) -> Tensor:
    s = Seen(t)
    g = 2 * ((s.cosine + 1) / 2) ** 3 - 1
    labels = s.over_labels(softplus(-(40 * (g - 0.4) + t.bias)))
    rest = torch.where(s.own, 0, softplus(40 * (g + 0.4) + t.bias)).sum(1)
    return s.mean(50 / 40 * (0.7 * labels + 0.3 * rest))


def mlcd(t: Inputs) -> Tensor:
    s = Seen(t)
    attract, repel = lse(-8.0 * s.cosine, s.own), lse(8.0 * s.cosine, ~s.own)
    return s.mean(sum(torch.logaddexp(a, torch.zeros_like(a)) for a in (attract, repel)))


def together(t: Inputs) -> Tensor:
    """Each label of a row against every other class, its other labels too."""
    s = Seen(t)
    z = 16.0 * s.cosine
    n, c = z.shape
    others = ~torch.eye(c, dtype=torch.bool).expand(n, c, c).flatten(0, 1)
    repel = lse(z[:, None].expand(n, c, c).flatten(0, 1), others).view(n, c)
    some = (repel > -torch.inf) & s.own
    each = torch.where(some, softplus(torch.where(some, repel, 0) - (z - 16.0 * 0.3)), 0)
    return s.mean(s.over_labels(each) / s.own.sum(1).clamp_min(1))


def of_probability(end: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    """The end of p = softmax(16 cos)_y, for a row's label among the negatives alone, each."""

    def loss(t: Inputs) -> Tensor:
        s = Seen(t)
        others = lse(16.0 * s.cosine, ~s.own)[:, None]
        log_p = -torch.logaddexp(torch.zeros_like(s.cosine), others - 16.0 * s.cosine)
        each = torch.where(s.own, end(log_p), 0).sum(1) / s.own.sum(1).clamp_min(1)
        return s.mean(each)

    return loss


def rest(log_p: Tensor) -> Tensor:
    """1 - p."""
    return -torch.expm1(log_p)


PROBABILITY: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "CompSum": (class_losses.CompSum(0.5, scale=16.0), lambda z: 2 * torch.expm1(-0.5 * z)),
    "GCE": (class_losses.GCE(0.7, scale=16.0), lambda z: -torch.expm1(0.7 * z) / 0.7),
    "MAE": (class_losses.MAE(scale=16.0), lambda z: 2 * rest(z)),
    "AGCE": (class_losses.AGCE(1.0, 2.0, scale=16.0), lambda z: rest(z) * (3 + z.exp()) / 2),
    "AUL": (class_losses.AUL(2.0, 2.0, scale=16.0), lambda z: rest(z) * (3 - z.exp()) / 2),
    "SCE": (class_losses.SCE(0.5, 2.0, scale=16.0), lambda z: -0.5 * z + 8 * rest(z)),
    "Focal": (class_losses.Focal(2.0, scale=16.0), lambda z: -z * rest(z) ** 2),
    "Poly1": (class_losses.Poly1(2.0, scale=16.0), lambda z: -z + 2 * rest(z)),
}


CLASS_LOSSES: dict[str, tuple[Callable[[Inputs], Any], Callable[[Inputs], Tensor]]] = {
    "Softmax": (
        lambda t: class_losses.Softmax(margins.CosFace(0.3), 16.0),
        of_softmax(16.0, 0.3),
    ),
    "SoftTriple": (lambda t: class_losses.SoftTriple(), of_softmax(20.0, 0.01, 0.1)),
    "SFace": (lambda t: class_losses.SFace(), sface),
    "SphereFace2": (lambda t: class_losses.SphereFace2(t.bias), sphereface2),
    "MLCD": (lambda t: class_losses.MLCD(8.0), mlcd),
    "LabelsTogether": (
        # of CosFace, whose slope is 1, straight through is exact
        lambda t: class_losses.LabelsTogether(
            margins.CosFace(0.3), 16.0, gradient="straight_through"
        ),
        together,
    ),
    **{
        name: (lambda t, loss=loss: loss, of_probability(end))
        for name, (loss, end) in PROBABILITY.items()
    },
}


# ---- the table ----------------------------------------------------------------------------------


def _margin(make: Callable[[Inputs], Any]) -> Callable[..., Tensor]:
    return lambda t, **more: fl.margin_softmax(
        t.x, t.w, t.targets, margin=make(t), scale=SCALE, **more
    )


def _class_loss(make: Callable[[Inputs], Any]) -> Callable[..., Tensor]:
    return lambda t, **more: fl.class_loss(t.x, t.w, t.targets, make(t), **more)


ROWS = ("x", "w")
DRAWN = [
    *(
        Case(f"margin_{name}", classes, _margin(make), f, ROWS, function=fl.margin_softmax)
        for name, (make, f) in MARGINS.items()
    ),
    *(
        Case(
            f"class_loss_{name}",
            sub_centers,
            _class_loss(make),
            f,
            (*ROWS, "bias") if name == "SphereFace2" else ROWS,
            function=fl.class_loss,
        )
        for name, (make, f) in CLASS_LOSSES.items()
    ),
]

"""Margins and losses over classes for the draws: calls, and literal formulas.

The formulas follow the papers and use nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from class_pair_draws import cross_entropy
from pair_cases import Case
from pair_formulas import Inputs, equal, lse, proxies, unit
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import class_losses, margins

SCALE = 16.0


def classes(n: int, m: int, d: int) -> Inputs:
    """Rows and classes; a margin a row, as if drawn."""
    t = proxies(n, m, d)
    t.drawn = 0.4 + 0.1 * torch.randn(n)
    return t


def sub_centers(n: int, m: int, d: int) -> Inputs:
    """Three centres a class; one label or two a row, some rows without."""
    t = proxies(n, m, d)
    t.w = torch.randn(m, 3, d) / d**0.5
    second = torch.where((torch.rand(n) < 0.5) | (m == 1), -100, (t.targets + 1) % m)
    t.targets = torch.stack([t.targets, second], dim=1)
    t.targets[n // 2] = -100
    t.bias = torch.tensor(-3.0)
    return t


# ---- margins: the target's cosine, the norms -> what enters; a bend: what others become ---------


def theta(t: Tensor) -> Tensor:
    """The angle, without slope at 1 and -1, where the cosine has none in the rows."""
    inside = t.abs() < 1
    return torch.where(inside, torch.where(inside, t, 0).acos(), torch.where(t < 0, math.pi, 0.0))


def added(t: Tensor, m: float | Tensor, m1: float = 1.0) -> tuple[Tensor, Tensor]:
    phi = m1 * theta(t) + m
    return phi, phi.cos()


def linear(t: Tensor, m: float) -> Tensor:
    phi, value = added(t, m)
    return torch.where(phi < math.pi, value, t - m * math.sin(m))


def monotone(t: Tensor, m: float, m1: float = 1.0) -> Tensor:
    phi, value = added(t, m, m1)
    k = (phi.detach() / math.pi).floor()
    return torch.where(k % 2 == 0, value, -value) - 2 * k


def clip(t: Tensor, m: float | Tensor, eps: float = 1e-3) -> Tensor:
    return added(t.clamp(-1 + eps, 1 - eps), m)[0].clamp(eps, math.pi - eps).cos()


def easy(t: Tensor, m: float | Tensor) -> Tensor:
    return torch.where(t > 0, added(t, m)[1], t)


def ada(
    t: Tensor,
    norm: Tensor,
    m: float = 0.4,
    h: float = 0.333,
    momentum: float = 0.01,
    eps: float = 1e-3,
) -> Tensor:
    """The averages start at 20 and 100 and move by the momentum, before use."""
    norm = norm.detach().clamp(0.001, 100)
    mean = (1 - momentum) * 20 + momentum * norm.mean()
    n = len(norm)
    spread = ((norm - norm.mean()).square().sum() / max(n - 1, 1)).sqrt()
    std = (1 - momentum) * 100 + momentum * spread if n > 1 else 100.0
    z = (h * (norm - mean) / (std + eps)).clamp(-1, 1)
    return clip(t, -m * z, eps) - m * (1 + z)


def mag(t: Tensor, norm: Tensor) -> Tensor:
    return easy(t, 0.35 / 1.5 * (norm.clamp(0.5, 2.0) - 0.5) + 0.45)


def ranked(t: Tensor, drawn: Tensor) -> Tensor:
    """The nearer to its centre, the smaller the margin."""
    by_rank, found = drawn.sort().values, torch.empty_like(drawn)
    found[t.detach().argsort(descending=True, stable=True)] = by_rank
    return found


Moved = Callable[[Tensor, Inputs], Tensor]  # (target cosines, inputs)
Bend = Callable[[Tensor, Tensor], Tensor]  # (all cosines, target cosines [N, 1])


def norm_of(t: Inputs) -> Tensor:
    square = t.x.square().sum(1)
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)


def bent(c: Tensor, above: Tensor, value: Tensor) -> Tensor:
    return torch.where(c > above.detach(), value, c)


def curricular(c: Tensor, own: Tensor) -> Tensor:
    mean = 0.01 * own.detach().mean()
    return bent(c, added(own, 0.5)[1], c * (mean + c))


def head(moved: Moved | None, bend: Bend | None = None) -> Callable[[Inputs], Tensor]:
    """Cross entropy of s times the cosines, that of the target moved, others bent."""

    def formula(t: Inputs) -> Tensor:
        cosine, target = unit(t.x) @ unit(t.w).T, equal(t.targets, torch.arange(len(t.w)))
        own = torch.where(target, cosine, 0).sum(1)
        others = cosine if bend is None else bend(cosine, own[:, None])
        into = own if moved is None else moved(own, t)
        return cross_entropy(SCALE * torch.where(target, into[:, None], others), t.targets)

    return formula


def with_penalty(t: Inputs) -> Tensor:
    a = norm_of(t).clamp(0.5, 2.0)
    return head(lambda c, t: mag(c, norm_of(t)))(t) + (35.0 * (a / 4 + 1 / a)).mean()


def arc(how: str) -> Callable[[Inputs], Any]:
    return lambda t: margins.ArcFace(0.5, how)


def elastic(kind: type, plus: str | None = None) -> Callable[[Inputs], Any]:
    """With given draws in the place of normal ones."""

    def make(t: Inputs) -> Any:
        made = kind(plus=plus)
        object.__setattr__(made, "draw", lambda cosine: t.drawn.to(cosine))
        return made

    return make


def averaging(kind: type) -> Callable[[Inputs], Any]:
    """Whose averages are float64's for float64 rows."""
    return lambda t: kind().to(t.x.dtype if t.x.dtype == torch.float64 else torch.float32)


def mv(base: str, weighting: str) -> Callable[[Inputs], Any]:
    return lambda t: margins.MVSoftmax(base, 0.3, 0.2, weighting)


def mv_formula(base: str, weighting: str) -> Callable[[Inputs], Tensor]:
    own = (lambda c, *_: c - 0.3) if base == "am" else (lambda c, *_: linear(c, 0.3))
    slope = 1.2 if weighting == "adaptive" else 1.0
    return head(own, lambda c, y: bent(c, own(y), slope * c + 0.2))


FILTER = lambda c, y: torch.where(c > 0.4, 0.0, c)
MARGINS: dict[str, tuple[Callable[[Inputs], Any], Callable[[Inputs], Tensor]]] = {
    "none": (lambda t: None, head(None)),
    "ArcFace_linear": (arc("linear"), head(lambda c, t: linear(c, 0.5))),
    "ArcFace_none": (arc("none"), head(lambda c, t: added(c, 0.5)[1])),
    "ArcFace_clip": (arc("clip"), head(lambda c, t: clip(c, 0.5))),
    "ArcFace_clamp": (arc("clamp"), head(lambda c, t: added(c, 0.5)[0].clamp_max(3.14159).cos())),
    "ArcFace_easy": (arc("easy"), head(lambda c, t: easy(c, 0.5))),
    "ArcFace_monotone": (arc("monotone"), head(lambda c, t: monotone(c, 0.5))),
    "CosFace": (lambda t: margins.CosFace(0.35), head(lambda c, t: c - 0.35)),
    "SphereFace": (lambda t: margins.SphereFace(4.0), head(lambda c, t: monotone(c, 0.0, 4.0))),
    "CombinedMargin": (
        lambda t: margins.CombinedMargin(1.7, 0.3, 0.2),
        head(lambda c, t: monotone(c, 0.3, 1.7) - 0.2),
    ),
    "ElasticArcFace": (
        elastic(margins.ElasticArcFace),
        head(lambda c, t: added(c, t.drawn)[1]),
    ),
    "ElasticCosFace": (elastic(margins.ElasticCosFace), head(lambda c, t: c - t.drawn)),
    "ElasticCosFace_rank": (
        elastic(margins.ElasticCosFace, "rank"),
        head(lambda c, t: c - ranked(c, t.drawn)),
    ),
    "AdaFace": (averaging(margins.AdaFace), head(lambda c, t: ada(c, norm_of(t)))),
    "MagFace": (lambda t: margins.MagFace(0.5, 2.0), with_penalty),
    "CurricularFace": (
        averaging(margins.CurricularFace),
        head(lambda c, t: linear(c, 0.5), curricular),
    ),
    **{
        f"MVSoftmax_{base}_{how}": (mv(base, how), mv_formula(base, how))
        for base in ("arc", "am")
        for how in ("adaptive", "fixed")
    },
    "InterclassFilter": (
        lambda t: margins.InterclassFilter(margins.ArcFace(0.3)),
        head(lambda c, t: linear(c, 0.3), FILTER),
    ),
}


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

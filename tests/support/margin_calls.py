"""Margins for the draws: calls, and literal formulas that use nothing of the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from class_pair_draws import cross_entropy
from pair_rows import Inputs, equal, proxies, unit
from torch import Tensor

from fused_losses import margins

SCALE = 16.0


def classes(n: int, m: int, d: int) -> Inputs:
    """Rows and classes; a margin a row, as if drawn."""
    t = proxies(n, m, d)
    t.drawn = 0.4 + 0.1 * torch.randn(n)
    return t


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

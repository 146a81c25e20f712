"""Losses that bend other classes: their formulas, cases and data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses
from fused_losses import margins
from fused_losses.margins import ArcFace, CurricularFace, InterclassFilter, MVSoftmax

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def arc(t: Tensor, m: float) -> Tensor:
    """cos(theta + m), or t - m sin(m) past pi, by the addition theorem."""
    added = t * math.cos(m) - (1 - t * t).sqrt() * math.sin(m)
    return torch.where(t > math.cos(math.pi - m), added, t - m * math.sin(m))


def curricular(cosine: Tensor, is_target: Tensor, m: float = 0.5, t: float = 0.3) -> Tensor:
    """N(t, theta_j) = cos(theta_j) (t + cos(theta_j)) where cos(theta_y + m) < cos(theta_j)."""
    y = (cosine * is_target).sum(1, keepdim=True)
    hard = cosine > torch.cos(torch.acos(y) + m)
    return torch.where(is_target, arc(y, m), torch.where(hard, cosine * (t + cosine), cosine))


def mv_softmax(
    cosine: Tensor, is_target: Tensor, f: Callable[[Tensor], Tensor], t: float, adaptive: bool
) -> Tensor:
    """log(h e^{s cos}) / s with log(h) / s = t (cos + 1), or t, where f(theta_y) < cos(theta_j)."""
    y = f((cosine * is_target).sum(1, keepdim=True))
    wrong = (cosine > y).to(cosine.dtype)
    return torch.where(is_target, y, cosine + wrong * t * (cosine + 1 if adaptive else 1))


def filtered(
    cosine: Tensor, is_target: Tensor, f: Callable[[Tensor], Tensor], threshold: float
) -> Tensor:
    """insightface: 0 in the place of another class's cosine above the threshold."""
    y = f((cosine * is_target).sum(1, keepdim=True))
    return torch.where(is_target, y, cosine * (cosine <= threshold))


def stored_curricular(t: float = 0.3, dtype: torch.dtype = F64) -> CurricularFace:
    margin = CurricularFace().to(dtype).eval()
    margin.t.fill_(t)
    return margin


def easy(t: Tensor, m: float) -> Tensor:
    return torch.where(t > 0, torch.cos(torch.acos(t) + m), t)


Formula = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Callable[[], margins.Margin], Formula]] = {
    "curricular": (stored_curricular, curricular),
    "mv-arc": (
        lambda: MVSoftmax("arc", 0.5, 0.2),
        lambda c, y: mv_softmax(c, y, lambda t: arc(t, 0.5), 0.2, True),
    ),
    "mv-arc-easy": (
        lambda: MVSoftmax("arc", 0.4, 0.3, beyond_pi="easy"),
        lambda c, y: mv_softmax(c, y, lambda t: easy(t, 0.4), 0.3, True),
    ),
    "mv-am-fixed": (
        lambda: MVSoftmax("am", 0.35, 0.15, "fixed"),
        lambda c, y: mv_softmax(c, y, lambda t: t - 0.35, 0.15, False),
    ),
    "filter-arc": (
        lambda: InterclassFilter(ArcFace(0.5), 0.25),
        lambda c, y: filtered(c, y, lambda t: arc(t, 0.5), 0.25),
    ),
    "filter-alone": (
        lambda: InterclassFilter(None, 0.1),
        lambda c, y: filtered(c, y, lambda t: t, 0.1),
    ),
}


@dataclass(frozen=True)
class Case:
    """One call: sizes, the loss, and the options of `margin_softmax`."""

    id: str
    loss: str
    n: int = 23
    c: int = 61
    d: int = 12
    scale: float | str = 16.0  # "rows": one a row
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    shares: bool = False
    part: bool = False  # of the classes
    normalize: bool = True


class Data:
    def __init__(self, case: Case) -> None:
        n, c, d = case.n, case.c, case.d
        self.labels = torch.randint(0, c, (n,))
        self.w = torch.randn(c, d, dtype=F64)
        near = self.w[self.labels] / self.w[self.labels].norm(dim=1, keepdim=True)
        self.x = near + 0.3 * torch.randn(n, d, dtype=F64)
        if not case.normalize:
            self.x, self.w = F.normalize(self.x), F.normalize(self.w)
        self.options: dict[str, Any] = dict(case.options)
        self.scale = case.scale
        if case.scale == "rows":
            self.scale = torch.linspace(6, 20, n, dtype=F64)
        if case.bias:
            self.options["bias"] = torch.randn(c, dtype=F64)
        if case.shares:
            self.options["class_weight"] = torch.rand(c, dtype=F64) + 0.5
        if case.part:
            keep = torch.rand(c) < 0.6
            keep[self.labels] = True
            self.options["classes"] = keep.nonzero()[:, 0].flip(0)
        if n > 3:
            self.labels[2] = -100
            self.x[2] = torch.nan  # an ignored row touches nothing

    def leaves(self) -> list[Tensor]:
        found = [self.x, self.w, self.options.get("bias")]
        return [t.clone().requires_grad_() for t in found if t is not None]


def ask(case: Case, data: Data, backend: str, **changes: Any) -> tuple[Any, list[Tensor]]:
    leaves = data.leaves()
    options = data.options | ({"bias": leaves[2]} if case.bias else {}) | changes
    out = fused_losses.margin_softmax(
        leaves[0],
        leaves[1],
        data.labels,
        margin=LOSSES[case.loss][0](),
        scale=data.scale,
        normalize=case.normalize,
        backend=backend,
        **options,
    )
    loss = out[0] if isinstance(out, tuple) else out
    return out, list(torch.autograd.grad(loss, leaves))

"""Divergences of two score matrices as literal formulas on probabilities, and a table of calls.

Nothing of the package is imported: what every backend is held to, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PARAMS: dict[str, list[float]] = {
    "forward": [],
    "reverse": [],
    "power": [0.7],
    "jensen_shannon": [0.3],
    "total_variation": [],
    "bernoulli": [math.inf],
    "bernoulli_norm": [math.inf],
    "squared": [],
}
# the rows of folds that have a gradient
DIFFERENTIABLE = {"power": 2}


@dataclass
class Call:
    """Two sides in float64, leaves all; what is None is not given."""

    x: Tensor
    weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor | None
    labels: Tensor
    classes: Tensor | None
    bias: Tensor | None
    teacher_bias: Tensor | None
    teacher_scale: Tensor | None
    normalize: bool
    teacher_normalize: bool

    @property
    def leaves(self) -> list[Tensor]:
        fields = (
            self.x, self.weight, self.teacher, self.teacher_weight, self.bias,
            self.teacher_bias, self.teacher_scale,
        )  # fmt: skip
        return [t for t in fields if t is not None]

    def to(self, dtype: torch.dtype) -> Call:
        """The same numbers, new leaves."""
        moved: dict[str, Any] = {
            name: value.detach().to(dtype).requires_grad_()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in vars(self).items()
        }
        return Call(**moved)


def drawn(
    n: int = 6,
    c: int = 23,
    *,
    dense: bool = False,
    sampled: bool = False,
    plain: bool = False,
    rounded: torch.dtype = torch.float64,
    d: tuple[int, int] = (5, 7),
) -> Call:
    """Rows of some length on both sides; labels, of which every third row has none."""

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(rounded).double().requires_grad_()

    labels = torch.randint(0, c, (n,))
    labels[::3] = -1
    classes = None
    if sampled:
        others = torch.arange(0, c, 3)
        classes = torch.cat([others, labels[labels >= 0]]).unique()
    return Call(
        rows(n, d[0]),
        rows(c, d[0]),
        rows(n, c) if dense else rows(n, d[1]),
        None if dense else rows(c, d[1]),
        labels,
        classes,
        None if plain else rows(c),
        None if plain else rows(c),
        rows(n) if dense and not plain else None,
        not plain,
        not plain and not dense,
    )


def scores(call: Call) -> tuple[Tensor, Tensor]:
    """u and v, [N, C]."""
    w = call.weight
    w = w / w.norm(dim=1, keepdim=True) if call.normalize else w
    u = call.x @ w.T
    if call.teacher_weight is None:
        v = (
            call.teacher
            if call.teacher_scale is None
            else call.teacher_scale[:, None] * call.teacher
        )
    else:
        wt = call.teacher_weight
        wt = wt / wt.norm(dim=1, keepdim=True) if call.teacher_normalize else wt
        v = call.teacher @ wt.T
    u = u if call.bias is None else u + call.bias
    v = v if call.teacher_bias is None else v + call.teacher_bias
    return u, v


def row_folds(kind: str, params: list[float], u: Tensor, v: Tensor) -> list[Tensor]:
    """The differentiable folds of one row's other classes, [K] each -> [] each."""
    q_s, q_t = torch.softmax(u, 0), torch.softmax(v, 0)
    if kind == "forward":
        return [(q_t * (q_t.log() - q_s.log())).sum()]
    if kind == "reverse":
        return [(q_s * (q_s.log() - q_t.log())).sum()]
    if kind == "power":
        (eps,) = params
        return [(eps * v).exp().sum().log(), (torch.softmax(eps * v, 0) * u).sum()]
    if kind == "jensen_shannon":
        (beta,) = params
        m = beta * q_t + (1 - beta) * q_s
        return [beta * (q_t * (q_t / m).log()).sum() + (1 - beta) * (q_s * (q_s / m).log()).sum()]
    if kind == "total_variation":
        return [(q_t - q_s).abs().sum() / 2]
    if kind == "squared":
        return [((u - v) ** 2).sum()]
    (limit,) = params
    low = 1 / (1 + math.exp(limit)) if math.isfinite(limit) else 0.0
    if kind == "bernoulli":
        p, q = (1 / (1 + (-z).exp()) for z in (v, u))
        p, q = p.clamp(low, 1 - low), q.clamp(low, 1 - low)
        return [(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()]
    q = (1 / (1 + (v - u).exp())).clamp(low, 1 - low)
    return [(0.5 * (0.5 / q).log() + 0.5 * (0.5 / (1 - q)).log()).sum()]


def divergence(call: Call, kind: str, params: list[float]) -> tuple[Tensor, ...]:
    """lse, teacher_lse, target, teacher_target [N], folds [F, N]; rows have others."""
    u, v = scores(call)
    ids = torch.arange(len(call.weight)) if call.classes is None else call.classes
    columns = []
    for i, label in enumerate(call.labels.tolist()):
        kept = ids[ids != label]
        a, b = u[i, kept], v[i, kept]
        zero = u.new_zeros(())
        pair = (u[i, label], v[i, label]) if label >= 0 else (zero, zero)
        lse = (a.exp().sum().log(), b.exp().sum().log())
        columns.append(torch.stack([*lse, *pair, *row_folds(kind, params, a, b)]))
    found = torch.stack(columns, dim=1)
    return found[0], found[1], found[2], found[3], found[4:]

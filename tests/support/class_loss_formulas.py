"""Class losses by literal formulas in float64 that use nothing of the package, and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fused_losses import margins
from fused_losses.class_losses import (
    MLCD,
    ClassLoss,
    LabelsTogether,
    SFace,
    Softmax,
    SoftTriple,
    SphereFace2,
)
from fused_losses.primitives.class_rules import bounded as class_rules_bounded
from fused_losses.primitives.class_rules.inputs import ClassInputs

N, D, C, K, L = 7, 5, 19, 3, 4


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, the last one shorter, at the sizes of these tests."""
    monkeypatch.setattr(class_rules_bounded, "TILE_BYTES", 700)
    monkeypatch.setattr(class_rules_bounded, "GPU_TILE_BYTES", 700)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


@dataclass
class Row:
    """Cosines of one row with its labels' classes, and with all others that take part."""

    labels: Tensor
    others: Tensor


def rows_of(
    x: Tensor, w: Tensor, labels: Tensor, taking_part: list[int], pool: Callable[[Tensor], Tensor]
) -> list[Row | None]:
    """Row by row, class by class; None for a row without labels."""
    w = w if w.dim() == 3 else w[:, None]
    found: list[Row | None] = []
    for i in range(len(x)):
        mine = [int(y) for y in labels[i].flatten() if y != -100]
        if not mine:
            found.append(None)
            continue
        cosine = {c: pool(unit(w[c]) @ unit(x[i])) for c in taking_part}
        others = [cosine[c] for c in taking_part if c not in mine]
        found.append(
            Row(
                torch.stack([cosine[c] for c in mine]),
                torch.stack(others) if others else x.new_zeros(0),
            )
        )
    return found


def softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


def softmax_formula(row: Row, scale: float, margin: float) -> Tensor:
    total = sum(
        -torch.log(torch.exp(z) / (torch.exp(z) + torch.exp(scale * row.others).sum()))
        for z in scale * (row.labels - margin)
    )
    return total / len(row.labels)


def together_formula(row: Row, scale: float, margin: float) -> Tensor:
    """Each label against the others of its row, too."""
    every = torch.exp(scale * torch.cat([row.labels, row.others])).sum()
    total = sum(
        -torch.log(
            torch.exp(scale * (c - margin))
            / (every - torch.exp(scale * c) + torch.exp(scale * (c - margin)))
        )
        for c in row.labels
    )
    return total / len(row.labels)


def sface_formula(row: Row, s: float, k: float, a: float, b: float) -> Tensor:
    pull = 1 / (1 + torch.exp(-k * (torch.acos(row.labels) - a)))
    push = 1 / (1 + torch.exp(k * (torch.acos(row.others) - b)))
    return s * ((push.detach() * row.others).sum() - (pull.detach() * row.labels).sum())


def sphereface2_formula(row: Row, bias: Tensor, exact: bool) -> Tensor:
    def g(c: Tensor) -> Tensor:
        value = 2 * ((c + 1) / 2) ** 3 - 1
        return value if exact else c + (value - c).detach()

    of_labels = softplus(-(40 * (g(row.labels) - 0.4) + bias)).sum()
    of_others = softplus(40 * (g(row.others) + 0.4) + bias).sum()
    return 50 / 40 * (0.7 * of_labels + 0.3 * of_others)


def mlcd_formula(row: Row, s: float) -> Tensor:
    return torch.log(1 + torch.exp(-s * row.labels).sum()) + torch.log(
        1 + torch.exp(s * row.others).sum()
    )


def hard(c: Tensor) -> Tensor:
    return c.max()


def soft(c: Tensor) -> Tensor:
    weight = torch.exp(c / 0.1)
    return (weight / weight.sum() * c).sum()


BIAS = 0.7


@dataclass(frozen=True)
class Named:
    """A loss beside its literal formula."""

    loss: Callable[[Tensor], ClassLoss]  # of the bias
    formula: Callable[[Row, Tensor], Tensor]
    pool: Callable[[Tensor], Tensor] = hard


LOSSES: dict[str, Named] = {
    "softmax": Named(
        lambda b: Softmax(margins.CosFace(0.3), 8.0), lambda r, b: softmax_formula(r, 8.0, 0.3)
    ),
    "together": Named(
        lambda b: LabelsTogether(margins.CosFace(0.3), 8.0),
        lambda r, b: together_formula(r, 8.0, 0.3),
    ),
    "soft-triple": Named(lambda b: SoftTriple(), lambda r, b: softmax_formula(r, 20.0, 0.01), soft),
    "sface": Named(lambda b: SFace(), lambda r, b: sface_formula(r, 64.0, 80.0, 0.8, 1.23)),
    "sphereface2": Named(lambda b: SphereFace2(b), lambda r, b: sphereface2_formula(r, b, True)),
    "sphereface2-through": Named(
        lambda b: SphereFace2(b, gradient="straight_through"),
        lambda r, b: sphereface2_formula(r, b, False),
    ),
    "mlcd": Named(lambda b: MLCD(8.0), lambda r, b: mlcd_formula(r, 8.0)),
}


def inputs(several: bool, centers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and labels: with an ignored row of NaN, a label given twice, padding."""
    x = torch.randn(N, D, dtype=dtype)
    x[3] = torch.nan
    w = torch.randn(C, centers, D, dtype=dtype)
    labels = torch.tensor([0, 3, 18, -100, 3, 5, 11])
    if several:
        labels = torch.stack([labels, (labels + 1).clamp(max=18), (labels * 5) % C, labels], 1)
        labels[1, 2] = labels[4, 0] = -100
        labels[3] = -100
    return x.requires_grad_(), (w if centers > 1 else w[:, 0]).requires_grad_(), labels


FILTER = margins.InterclassFilter(margins.ArcFace(0.5, "none"))


def curricular(t: float) -> margins.CurricularFace:
    margin = margins.CurricularFace().double()
    margin.t.fill_(t)
    return margin


RULE_PARAMS = {
    "softmax": (8.0,),
    "softmax-bent": (8.0,),
    "sface": (80.0, 1.23),
    "sphereface2": (4.0, 0.4, 3.0, 0.0),
}


def op_inputs(
    rule: str, dtype: torch.dtype = torch.float64, softness: float = 0.0, sampled: bool = True
) -> ClassInputs:
    x = unit(torch.randn(N, D, dtype=dtype)).requires_grad_()
    labels = torch.randint(0, C, (N, 2))
    labels[1, 1] = labels[4, 0] = labels[4, 1] = -1
    classes = torch.unique(torch.cat([labels[labels >= 0], torch.arange(0, C, 2)]))
    classes = classes if sampled else None
    values = None
    if rule == "softmax-bent":
        p, q, r = torch.rand(3, N, dtype=dtype)
        values = torch.stack([torch.full_like(p, 0.1), p, q, r])
    elif rule == "sphereface2":
        values = torch.full((1, N), 0.3, dtype=dtype)
    return ClassInputs(
        x,
        torch.randn(C * K, D, dtype=dtype).requires_grad_(),
        labels,
        classes,
        values,
        rule.partition("-")[0],
        list(RULE_PARAMS[rule]),
        K,
        softness,
    )

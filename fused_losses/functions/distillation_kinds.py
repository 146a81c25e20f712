"""The kinds of distillation: a divergence, and a row's loss by its statistics (`KINDS`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import softplus
from fused_losses.base.parameters import check_above, check_parameter
from fused_losses.base.validation import check_plain
from fused_losses.primitives.divergence.op import DivergenceStatistics
from fused_losses.primitives.divergence.rules import bernoulli_kl

Option = float | None


class DistillationOptions(NamedTuple):
    """What a kind is told, each None where it takes none."""

    alpha: Option = None
    beta: Option = None
    eps: Option = None
    removed: Option = None


class DistillationKind(NamedTuple):
    """One way to distil: a divergence and the loss of a row by its statistics."""

    divergence: str
    loss: Callable[[DivergenceStatistics, DistillationOptions], Tensor]  # [N]
    params: Callable[[DistillationOptions], list[float]] = lambda o: []
    defaults: DistillationOptions = DistillationOptions()
    temperature: float = 1.0
    squared: bool = False  # times T^2
    labelled: bool = False  # the label's class stands apart
    mean: bool = False  # over the classes


def _fold(s: DivergenceStatistics, o: DistillationOptions) -> Tensor:  # noqa: ARG001 (one signature)
    return s.folds[0]


def _finite(s: DivergenceStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """Both lse, 0 where there is no other class, and where that is."""
    alone = s.lse == -torch.inf
    return torch.where(alone, 0, s.lse), torch.where(alone, 0, s.teacher_lse), alone


class _Soft(NamedTuple):
    """What cross entropies with soft targets are made of, [N] each."""

    hard: Tensor  # -log p_s of the label
    further: Tensor  # lse of all classes less the mean of u under the teacher's power, label apart
    own: Tensor  # the teacher's p of the label
    others: Tensor  # 1 - own


def _soft(s: DivergenceStatistics) -> _Soft:
    lse, teacher_lse, alone = _finite(s)
    further = lse - s.folds[1] + softplus(s.target - lse)
    z = s.teacher_target - teacher_lse
    return _Soft(
        softplus(s.lse - s.target),
        torch.where(alone, 0, further),
        torch.where(alone, 1, _share(z)),
        torch.where(alone, 0, _share(-z)),
    )


def _share(z: Tensor) -> Tensor:
    """sigmoid(z), whose slope is that of the rarer outcome: s (1 - s) has no digits of s near 1."""
    rare = torch.sigmoid(torch.where(z > 0, -z, z))
    return torch.where(z > 0, 1 - rare, rare)


def _self_distillation(s: DivergenceStatistics, o: DistillationOptions) -> Tensor:
    assert o.alpha is not None
    t = _soft(s)
    return (1 - o.alpha) * t.hard + o.alpha * (t.own * t.hard + t.others * t.further)


def _one_for_all(s: DivergenceStatistics, o: DistillationOptions) -> Tensor:
    assert o.eps is not None
    t = _soft(s)
    _, teacher_lse, alone = _finite(s)
    of_label = torch.expm1(o.eps * torch.log1p(t.own)) * t.hard
    if o.eps == 1:
        return of_label + t.others * t.further
    # sum p_t^eps over the others, of which log sum exp(eps v) is known
    whole = teacher_lse + softplus(s.teacher_target - teacher_lse)
    mass = torch.where(alone, 0, s.folds[0]) - o.eps * whole
    mass = torch.where(alone, 0, mass.exp())
    return of_label + mass * t.further


def _decoupled(s: DivergenceStatistics, o: DistillationOptions) -> Tensor:
    lse, teacher_lse, alone = _finite(s)
    assert o.alpha is not None and o.beta is not None
    z_s, z_t = (
        torch.where(alone, 0, target - of)
        for target, of in ((s.target, lse), (s.teacher_target, teacher_lse))
    )
    others = s.folds[0]
    if o.removed is not None:
        shifted = z_s + o.removed, z_t + o.removed
        others = torch.where(alone, 0, bernoulli_kl(*shifted) + torch.sigmoid(-shifted[1]) * others)
    return o.alpha * torch.where(alone, 0, bernoulli_kl(z_s, z_t)) + o.beta * others


def _limit(o: DistillationOptions) -> list[float]:
    """The score at which a sigmoid is cut to [eps, 1 - eps]."""
    return [math.log1p(-o.eps) - math.log(o.eps) if o.eps else math.inf]


KINDS: Mapping[str, DistillationKind] = MappingProxyType(
    {
        "kl": DistillationKind("forward", _fold, squared=True),
        "reverse_kl": DistillationKind("reverse", _fold, squared=True),
        "jsd": DistillationKind(
            "jensen_shannon",
            _fold,
            lambda o: [o.beta or 0.0],
            DistillationOptions(beta=0.5),
            squared=True,
        ),
        "tv": DistillationKind("total_variation", _fold),
        "soft_ce": DistillationKind("power", lambda s, o: s.lse - s.folds[1], lambda o: [1.0]),
        "pskd": DistillationKind(
            "power",
            _self_distillation,
            lambda o: [1.0],
            DistillationOptions(alpha=0.8),
            labelled=True,
        ),
        "dkd": DistillationKind(
            "forward",
            _decoupled,
            defaults=DistillationOptions(alpha=1.0, beta=8.0),
            temperature=4.0,
            squared=True,
            labelled=True,
        ),
        "ofa": DistillationKind(
            "power",
            _one_for_all,
            lambda o: [o.eps or 0.0],
            DistillationOptions(eps=1.0),
            labelled=True,
        ),
        "bernoulli": DistillationKind(
            "bernoulli", _fold, _limit, DistillationOptions(eps=0.0), temperature=2.0, squared=True
        ),
        "bernoulli_norm": DistillationKind(
            "bernoulli_norm",
            _fold,
            _limit,
            DistillationOptions(eps=0.0),
            temperature=2.0,
            squared=True,
        ),
        "mse": DistillationKind("squared", _fold, mean=True),
    }
)


def checked_options(kind: str, of: DistillationKind, **given: Option) -> DistillationOptions:
    """The kind's own options; those that it does not take are refused."""
    check_plain(**given)
    for name, value in given.items():
        takes = getattr(of.defaults, name) is not None or (name == "removed" and kind == "dkd")
        if value is not None and not takes:
            raise ValueError(f"{name}: expected None with kind={kind!r}, which takes none")
        if value is not None:
            check_parameter(name, value)
    told = of.defaults._replace(**{k: float(v) for k, v in given.items() if v is not None})
    if kind == "jsd" and not 0 < (told.beta or 0) < 1:
        raise ValueError(f"beta: expected a value in (0, 1) with kind='jsd', got {told.beta}")
    if kind == "pskd":
        check_parameter("alpha", told.alpha or 0.0, 0, 1)
    if kind == "ofa":
        check_above("eps", told.eps or 0.0)
    if kind.startswith("bernoulli"):
        check_parameter("eps", told.eps or 0.0, 0, 0.5)
    return told

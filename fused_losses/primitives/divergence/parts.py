"""Statistics of a divergence over disjoint sets of classes, joined: chunks of a table, or shards.

A Kullback-Leibler divergence over all classes is

    sum_r Q(r) (KL_r + exp(x_r) - 1 - x_r),    x_r = log of R(r) / Q(r)

of the sets r, with Q(r) and R(r) their masses in the leading softmax and in the other, and KL_r
between the two softmaxes within r: every term is >= 0, and 0 where both softmaxes are one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import exp_excess
from fused_losses.primitives.divergence.op import DivergenceStatistics
from fused_losses.primitives.divergence.rules import DIVERGENCES

LSE, TEACHER_LSE, TARGET, TEACHER_TARGET, FOLDS = range(5)  # rows of statistics [4 + F, N]


class Reduction(NamedTuple):
    """Over the sets of classes: [..., S, N] -> [S, N]."""

    maximum: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]


STACKED = Reduction(lambda t: t.amax(0), lambda t: t.sum(0))  # sets along the first dimension


def logs_of(kind: str) -> list[int]:
    """The rows that are logarithms of sums, which are -inf over no classes."""
    return [LSE, TEACHER_LSE, FOLDS] if DIVERGENCES[kind].power else [LSE, TEACHER_LSE]


def empty_statistics(kind: str, like: Tensor) -> Tensor:
    """Over no classes at all, of the rows of `like` [N, ...], in float64. [4 + F, N]"""
    rows = FOLDS + DIVERGENCES[kind].folds
    out = torch.zeros((rows, like.shape[0]), dtype=torch.float64, device=like.device)
    out[logs_of(kind)] = -torch.inf
    return out


def joined(kind: str, parts: Tensor, over: Reduction = STACKED) -> Tensor:
    """Statistics over all the sets. [..., 4 + F, N] -> [4 + F, N]"""
    rule, logs = DIVERGENCES[kind], logs_of(kind)
    own = parts[..., logs, :]
    top = over.maximum(own.clone())
    top = torch.where(top > -torch.inf, top, 0)
    share = (own - top).exp()
    mass = over.total(share.clone())
    share = share / torch.where(mass == 0, 1, mass)
    lse = mass.log() + top
    rest = parts[..., TARGET:, :].clone()
    if rule.lead:
        one, other = (1, 0) if rule.lead == "teacher" else (0, 1)
        apart = (own[..., other, :] - own[..., one, :]) - (lse[other] - lse[one])
        masses = share[..., one, :], share[..., other, :]
        rest[..., 2, :] = _within(*masses, apart, rest[..., 2, :])
    elif rule.power:
        rest[..., 2, :] = 0
        rest[..., 3, :] *= share[..., 2, :]
    out = torch.cat([lse[:2], over.total(rest)])
    if rule.power:
        out[FOLDS] = lse[2]
    return out


def _within(one: Tensor, other: Tensor, apart: Tensor, value: Tensor) -> Tensor:
    """one (value + exp(apart) - 1 - apart) of a set, where other = one exp(apart)."""
    apart = torch.where((one == 0) & (other == 0), 0, apart)
    near = apart.abs() < 1
    close = one * exp_excess(torch.where(near, apart, 0))
    return one * value + torch.where(near, close, other - one - one * apart)


def statistics_of(rows: Tensor, kind: str) -> DivergenceStatistics:
    """Rows [4 + F, N] as what a loss is made of."""
    last = FOLDS + DIVERGENCES[kind].differentiable
    lse, teacher_lse, target, teacher_target = rows[:FOLDS]
    return DivergenceStatistics(lse, teacher_lse, target, teacher_target, rows[FOLDS:last])

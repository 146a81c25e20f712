"""The rules as formulas over a block of rows: what "reference" and "bounded" share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype, row_dtype
from fused_losses.base.rounding import random_bits, stochastic
from fused_losses.primitives.row_update.inputs import Adagrad, Adamw, CatchUp, RowStep, Sgd


class Formula(NamedTuple):
    """A rule with the numbers of a call."""

    tables: list[Tensor]  # [C, D], changed
    step: Callable[..., tuple[Tensor, ...]]  # grad and the tables' rows [k, D]: their new values


def in_blocks(p: RowStep, height: int) -> None:
    """The call, for so many of its rows at a time."""
    dtype = accumulate_dtype(p.weight.dtype)
    tables, step = FORMULAS[type(p)](p)
    for at, g in zip(p.rows.split(height), p.grad.split(height), strict=True):
        old = [t.index_select(0, at).to(dtype) for t in tables]
        for slot, new in enumerate(step(g.to(dtype), *old)):
            tables[slot].index_copy_(0, at, _narrowed(p, new, tables[slot].dtype, at, slot))


def _narrowed(p: RowStep, new: Tensor, dtype: torch.dtype, at: Tensor, slot: int) -> Tensor:
    if p.rounding_key is None or dtype.itemsize != 2:
        return new.to(dtype)
    bits = random_bits(p.rounding_key, at + p.row_offset, slot, new.shape[1])
    return stochastic(new, dtype, bits)


def _sgd(p: Sgd) -> Formula:
    lr = _rate(p)

    def step(g: Tensor, w: Tensor, v: Tensor | None = None) -> tuple[Tensor, ...]:
        g = -g if p.maximize else g
        if p.weight_decay != 0:  # 0 times an infinite weight is NaN
            g = g + p.weight_decay * w
        if v is None:
            return (w - lr * g,)
        v = p.momentum * v + (1 - p.dampening) * g
        return w - lr * (g + p.momentum * v if p.nesterov else v), v

    return Formula(_with_momentum(p), step)


def _adamw(p: Adamw) -> Formula:
    lr = _rate(p)
    first, second = _debias(p, p.beta1), _debias(p, p.beta2)

    def step(g: Tensor, w: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        g = -g if p.maximize else g
        m = m + (1 - p.beta1) * (g - m)
        v = p.beta2 * v + (1 - p.beta2) * g * g
        change = lr / first * m / (v.sqrt() / second**0.5 + p.eps)
        return w - (change + _decay(lr, p.weight_decay, w)), m, v

    return Formula([p.weight, p.exp_avg, p.exp_avg_sq], step)


def _adagrad(p: Adagrad) -> Formula:
    def step(g: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        g = -g if p.maximize else g
        s = s + g * g
        change = p.lr * g / ((s + p.initial_accumulator_value).sqrt() + p.eps)
        return w - (change + _decay(p.lr, p.weight_decay, w)), s

    return Formula([p.weight, p.sum], step)


def _catch_up(p: CatchUp) -> Formula:
    def product(factor: Tensor, t: Tensor) -> Tensor:
        return torch.where(factor == 0, 0, factor * t)  # 0 times an infinite weight is NaN

    def step(f: Tensor, w: Tensor, v: Tensor | None = None) -> tuple[Tensor, ...]:
        a, b, c, d = f[:, :, None].unbind(1)
        if v is None:
            return (w + product(a, w),)
        return w + (product(a, w) + product(b, v)), product(c, w) + product(d, v)

    return Formula(_with_momentum(p), step)


FORMULAS: dict[type, Callable[[Any], Formula]] = {
    Sgd: _sgd,
    Adamw: _adamw,
    Adagrad: _adagrad,
    CatchUp: _catch_up,
}


def _with_momentum(p: Sgd | CatchUp) -> list[Tensor]:
    return [p.weight] if p.momentum_buffer is None else [p.weight, p.momentum_buffer]


def _rate(p: Sgd | Adamw) -> float | Tensor:
    return p.lr if p.lr_tensor is None else p.lr_tensor.to(accumulate_dtype(p.weight.dtype))


def _decay(lr: float | Tensor, weight_decay: float, w: Tensor) -> Tensor | float:
    """Part of one change: 1 - lr weight_decay would round a small decay alike in every step."""
    return lr * weight_decay * w if weight_decay != 0 else 0.0


def _debias(p: Adamw, beta: float) -> float | Tensor:
    """1 - beta^step, without its cancellation."""
    if p.step_tensor is None:
        return -math.expm1(p.step * log_of(beta))
    step = p.step_tensor.to(row_dtype(p.step_tensor.device))
    return (-torch.expm1(step * log_of(beta))).to(accumulate_dtype(p.weight.dtype))


def log_of(beta: float) -> float:
    """-inf of 0, where math.log raises."""
    return math.log(beta) if beta > 0 else -math.inf

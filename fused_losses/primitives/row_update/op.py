"""Steps of an optimiser on some rows of a table, in place: for a gradient that only they have.

    weight[rows], state[rows] = step(weight[rows], state[rows], grad)

Everything else stays as it is: a row that takes no part sees neither momentum nor weight decay.
The formulas are those of torch.optim.SGD, AdamW and Adagrad; `catch_up_rows_` does what missed
steps would have done (fused_losses.centers.optimizers). On "cpu" and "cuda" one kernel reads the
gradient once and reads and writes each row of the weight and of its state once; "bounded" goes by
blocks of rows. docs/row_update.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, row_dtype
from fused_losses.base.rounding import random_bits, stochastic
from fused_losses.base.validation import describe
from fused_losses.primitives.op import LIBRARY

BLOCK_BYTES = 1 << 20  # of weights in a block of rows, widened
NAMES = ("reference", "bounded", "cpu", "cuda")
ON_CUDA = ("sgd", "adamw")  # the rules with a CUDA kernel
FACTORS = 4  # of a row that catches up

_ROWS = "(Tensor(a!) weight, Tensor rows, Tensor grad, "
_RATE = "Tensor? lr_tensor, float lr, "
_ROUNDING = "int? rounding_key=None, int row_offset=0) -> ()"
SGD = (
    f"{_ROWS}Tensor(b!)? momentum_buffer, {_RATE}float momentum, float dampening, "
    f"float weight_decay, bool nesterov, bool maximize, {_ROUNDING}"
)
ADAMW = (
    f"{_ROWS}Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, {_RATE}Tensor? step_tensor, float step, "
    f"float beta1, float beta2, float eps, float weight_decay, bool maximize, {_ROUNDING}"
)
ADAGRAD = (
    f"{_ROWS}Tensor(b!) sum, float lr, float eps, float weight_decay, "
    f"float initial_accumulator_value, bool maximize, {_ROUNDING}"
)
CATCH_UP = (
    "(Tensor(a!) weight, Tensor rows, Tensor factors, Tensor(b!)? momentum_buffer, " + _ROUNDING
)

Number = float | Tensor


class Sgd(NamedTuple):
    """One call, in the order of the op's schema."""

    weight: Tensor
    rows: Tensor
    grad: Tensor
    momentum_buffer: Tensor | None
    lr_tensor: Tensor | None  # for lr
    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    rounding_key: int | None = None
    row_offset: int = 0


class Adamw(NamedTuple):
    """One call, in the order of the op's schema."""

    weight: Tensor
    rows: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    lr_tensor: Tensor | None  # for lr
    lr: float
    step_tensor: Tensor | None  # for step
    step: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    rounding_key: int | None = None
    row_offset: int = 0


class Adagrad(NamedTuple):
    """One call, in the order of the op's schema."""

    weight: Tensor
    rows: Tensor
    grad: Tensor
    sum: Tensor
    lr: float
    eps: float
    weight_decay: float
    initial: float
    maximize: bool
    rounding_key: int | None = None
    row_offset: int = 0


class CatchUp(NamedTuple):
    """One call, in the order of the op's schema."""

    weight: Tensor
    rows: Tensor
    grad: Tensor  # the factors, which take its place
    momentum_buffer: Tensor | None
    rounding_key: int | None = None
    row_offset: int = 0


Call = Sgd | Adamw | Adagrad | CatchUp


@torch.no_grad()
def sgd_rows_(
    weight: Tensor,  # [C, D], changed
    rows: Tensor,  # [K] int64, distinct
    grad: Tensor,  # [K, D]
    momentum_buffer: Tensor | None = None,  # [C, D], changed
    *,
    lr: Number,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    rounding_key: int | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> None:
    """One step of torch.optim.SGD on weight[rows].

        v = momentum v + (1 - dampening) (grad + weight_decay w);   w -= lr v

    momentum_buffer: float32 or of the weight's dtype, zeros before the first step; with
    `dampening` such a step is (1 - dampening) grad, where torch's first one is grad.
    lr: a number, or a tensor of one element, which is read on its device (CUDA graphs).
    rounding_key: an int64, new in each step, with which 16-bit tables are rounded stochastically
    (not on "cuda"); None: to nearest. row_offset: the row of the whole table that row 0 is, which
    goes into the random bits.
    Raises ValueError, TypeError or IndexError for inputs that do not fit each other; on a GPU rows
    out of range are a device assertion and repeated ones are not looked for. Memory: none on
    "cpu" and "cuda", a block of rows on "bounded". Time O(K D).
    """
    states = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    _check(weight, rows, grad, states)
    _at_least_0(momentum=momentum, weight_decay=weight_decay)
    if (momentum != 0) != (momentum_buffer is not None):
        wanted = "None with momentum=0" if momentum == 0 else "a tensor with momentum"
        raise ValueError(f"momentum_buffer: expected {wanted}")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError("nesterov: expected a momentum, and dampening=0")
    _op("sgd", weight, backend, rounding_key)(
        *Sgd(
            weight,
            rows,
            grad,
            momentum_buffer,
            *_rate("lr", lr, weight),
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize,
            rounding_key,
            row_offset,
        )
    )


@torch.no_grad()
def adamw_rows_(
    weight: Tensor,  # [C, D], changed
    rows: Tensor,  # [K] int64, distinct
    grad: Tensor,  # [K, D]
    exp_avg: Tensor,  # [C, D], changed
    exp_avg_sq: Tensor,  # [C, D], changed
    *,
    step: int | Tensor,
    lr: Number = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    rounding_key: int | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> None:
    """One step of torch.optim.AdamW on weight[rows].

        m += (1 - beta1) (grad - m);   v = beta2 v + (1 - beta2) grad^2
        w = (1 - lr weight_decay) w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    exp_avg, exp_avg_sq: float32 or of the weight's dtype, zeros before the first step.
    step: t, which step this is, from 1; it and lr may be tensors of one element, which are read
    on their device (CUDA graphs). Errors, memory and time as of `sgd_rows_`.
    """
    _check(weight, rows, grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})
    _at_least_0(eps=eps, weight_decay=weight_decay)
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two values in [0, 1), got {betas}")
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"step: expected a count from 1 on, got {step}")
    _op("adamw", weight, backend, rounding_key)(
        *Adamw(
            weight,
            rows,
            grad,
            exp_avg,
            exp_avg_sq,
            *_rate("lr", lr, weight),
            *_rate("step", step, weight),
            *betas,
            eps,
            weight_decay,
            maximize,
            rounding_key,
            row_offset,
        )
    )


@torch.no_grad()
def adagrad_rows_(
    weight: Tensor,  # [C, D], changed
    rows: Tensor,  # [K] int64, distinct
    grad: Tensor,  # [K, D]
    sum: Tensor,  # [C, D], changed
    *,
    lr: float = 1e-2,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    maximize: bool = False,
    rounding_key: int | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> None:
    """One step of torch.optim.Adagrad on weight[rows], its weight decay decoupled as AdamW's.

        s += grad^2;   w = (1 - lr weight_decay) w - lr grad / (sqrt(s + initial) + eps)

    sum: s, float32, bfloat16 or of the weight's dtype, zeros before the first step: the initial
    value is added where s is read, so that no row need be written for it. lr: after its decay.
    The rest as of `sgd_rows_`; there is no CUDA kernel.
    """
    _check(weight, rows, grad, {"sum": sum})
    _at_least_0(
        lr=lr,
        eps=eps,
        weight_decay=weight_decay,
        initial_accumulator_value=initial_accumulator_value,
    )
    _op("adagrad", weight, backend, rounding_key)(
        weight,
        rows,
        grad,
        sum,
        lr,
        eps,
        weight_decay,
        initial_accumulator_value,
        maximize,
        rounding_key,
        row_offset,
    )


@torch.no_grad()
def catch_up_rows_(
    weight: Tensor,  # [C, D], changed
    rows: Tensor,  # [K] int64, distinct
    factors: Tensor,  # [K, 4] float64
    momentum_buffer: Tensor | None = None,  # [C, D], changed
    *,
    rounding_key: int | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> None:
    """A linear map of each row's weight and momentum, for the steps that it missed.

        w, v = w + a w + b v, c w + d v        (a, b, c, d): the row's factors

    A factor of 0 leaves out what it multiplies, were it infinite. Without a buffer only a counts.
    The rest as of `sgd_rows_`; there is no CUDA kernel.
    """
    states = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    _check_tables(weight, states)
    if factors.dtype != torch.float64 or factors.shape != (rows.shape[0], FACTORS):
        raise ValueError(
            f"factors: expected [{rows.shape[0]}, {FACTORS}] float64, got {describe(factors)}"
        )
    validation.check_device("weight", weight, "factors", factors)
    check_rows(rows, factors.shape[0], weight)
    _op("catch_up", weight, backend, rounding_key)(
        weight, rows, factors, momentum_buffer, rounding_key, row_offset
    )


# ---- at the door --------------------------------------------------------------------------------


def _check(weight: Tensor, rows: Tensor, grad: Tensor, states: dict[str, Tensor]) -> None:
    validation.check_matrix("grad", grad, "[K, D]")
    _check_tables(weight, states)
    if grad.shape[1] != weight.shape[1]:
        raise ValueError(f"grad: expected [K, {weight.shape[1]}], got {describe(grad)}")
    validation.check_device("weight", weight, "grad", grad)
    if (grad.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"grad: expected float64 where weight is, and only there, got {grad.dtype}")
    check_rows(rows, grad.shape[0], weight)


def _check_tables(weight: Tensor, states: dict[str, Tensor]) -> None:
    validation.check_matrix("weight", weight, "[C, D]")
    for name, state in states.items():
        validation.check_matrix(name, state, "[C, D]")
        if state.shape != weight.shape:
            raise ValueError(f"{name}: expected {tuple(weight.shape)}, got {describe(state)}")
        wanted = state_dtypes(weight.dtype)
        if state.dtype not in wanted:
            told = " or ".join(map(str, wanted))
            raise TypeError(f"{name}: expected {told}, got {state.dtype}")
        validation.check_device("weight", weight, name, state)
    for name, table in {"weight": weight, **states}.items():
        c, d = table.shape
        if (d > 1 and table.stride(1) != 1) or (c > 1 and table.stride(0) < d):
            raise ValueError(
                f"{name}: expected rows that lie contiguous and apart, got strides {table.stride()}"
            )


def state_dtypes(weight: torch.dtype) -> tuple[torch.dtype, ...]:
    """What the state of such a weight may be, the widest first."""
    wide = accumulate_dtype(weight)
    narrow = () if weight == torch.float64 else (weight, torch.bfloat16)
    return tuple(dict.fromkeys((wide, *narrow)))


def check_rows(rows: Tensor, count: int, weight: Tensor) -> None:
    """Raises for what is not `count` distinct rows of weight, int64."""
    validation.check_index_vector("rows", rows, count, weight)
    if rows.dtype != torch.int64:
        raise TypeError(f"rows: expected int64, got {describe(rows)}")
    if not torch.compiler.is_compiling():
        _check_values(rows, weight.shape[0])


def _check_values(rows: Tensor, count: int) -> None:
    """Rows in [0, count), each once: on a GPU without waiting, and the range only."""
    if rows.numel() == 0:
        return
    message = f"rows: expected values in [0, {count})"
    if rows.is_cuda and os.environ.get("FUSED_LOSSES_VALIDATE") != "1":
        torch._assert_async(((rows >= 0) & (rows < count)).all(), message)
        return
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= count:
        raise IndexError(f"{message}, got values from {low} to {high}")
    increasing = bool((rows[1:] > rows[:-1]).all())
    if not increasing and rows.unique().numel() != rows.numel():
        raise ValueError("rows: expected distinct ones, got repeated ones; add up their gradients")


def _at_least_0(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name}: expected a value >= 0, got {value}")


def _rate(name: str, value: Number, weight: Tensor) -> tuple[Tensor | None, float]:
    """As the ops take it: a tensor on the weight's device, or a number."""
    if not isinstance(value, Tensor):
        _at_least_0(**{name: value})
        return None, float(value)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a number or one element, got {describe(value)}")
    if value.device.type == "cpu" and weight.device.type != "cpu":
        return None, float(value)
    validation.check_device("weight", weight, name, value)
    return value.detach().reshape(()), 0.0


def _op(rule: str, weight: Tensor, backend: str | None, rounding_key: int | None) -> Any:
    name = backends.requested(backend)
    if name == "triton":
        raise RuntimeError(
            "backend='triton' cannot run this call: rows are updated on cuda, cpu and bounded"
        )
    if rule not in ON_CUDA or rounding_key is not None:
        if name == "cuda":
            what = f"{rule}_rows_" if rule not in ON_CUDA else "stochastic rounding"
            raise RuntimeError(f"backend='cuda' cannot run this call: no CUDA kernel has {what}")
        if name == "auto" and weight.device.type != "cpu":
            name = "bounded"
    name, _ = backends.choose(
        name, weight.device, weight.dtype, "fp32", "row_update", weight.shape[1]
    )
    return getattr(torch.ops.fused_losses, f"{rule}_rows_{name}").default


# ---- in PyTorch ---------------------------------------------------------------------------------


def _on_blocks(
    name: str, p: Call, tables: list[Tensor], step: Callable[..., tuple[Tensor, ...]]
) -> None:
    """step(grad, rows of the tables) gives their new values."""
    dtype = accumulate_dtype(p.weight.dtype)
    height = p.rows.shape[0]
    if name == "bounded":
        height = BLOCK_BYTES // max(1, p.weight.shape[1] * dtype.itemsize)
    height = max(1, height)
    for at, g in zip(p.rows.split(height), p.grad.split(height), strict=True):
        old = [t.index_select(0, at).to(dtype) for t in tables]
        for slot, new in enumerate(step(g.to(dtype), *old)):
            tables[slot].index_copy_(0, at, _narrowed(p, new, tables[slot].dtype, at, slot))


def _narrowed(p: Call, new: Tensor, dtype: torch.dtype, at: Tensor, slot: int) -> Tensor:
    if p.rounding_key is None or dtype.itemsize != 2:
        return new.to(dtype)
    bits = random_bits(p.rounding_key, at + p.row_offset, slot, new.shape[1])
    return stochastic(new, dtype, bits)


def _sgd_in_blocks(name: str, p: Sgd) -> None:
    lr = p.lr if p.lr_tensor is None else p.lr_tensor.to(accumulate_dtype(p.weight.dtype))

    def step(g: Tensor, w: Tensor, v: Tensor | None = None) -> tuple[Tensor, ...]:
        g = -g if p.maximize else g
        if p.weight_decay != 0:  # 0 times an infinite weight is NaN
            g = g + p.weight_decay * w
        if v is None:
            return (w - lr * g,)
        v = p.momentum * v + (1 - p.dampening) * g
        return w - lr * (g + p.momentum * v if p.nesterov else v), v

    tables = [p.weight] if p.momentum_buffer is None else [p.weight, p.momentum_buffer]
    _on_blocks(name, p, tables, step)


def _adamw_in_blocks(name: str, p: Adamw) -> None:
    lr = p.lr if p.lr_tensor is None else p.lr_tensor.to(accumulate_dtype(p.weight.dtype))
    first, second = _debias(p, p.beta1), _debias(p, p.beta2)

    def step(g: Tensor, w: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        g = -g if p.maximize else g
        m = m + (1 - p.beta1) * (g - m)
        v = p.beta2 * v + (1 - p.beta2) * g * g
        change = lr / first * m / (v.sqrt() / second**0.5 + p.eps)
        return w - (change + _decay(lr, p.weight_decay, w)), m, v

    _on_blocks(name, p, [p.weight, p.exp_avg, p.exp_avg_sq], step)


def _adagrad_in_blocks(name: str, p: Adagrad) -> None:
    def step(g: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        g = -g if p.maximize else g
        s = s + g * g
        change = p.lr * g / ((s + p.initial).sqrt() + p.eps)
        return w - (change + _decay(p.lr, p.weight_decay, w)), s

    _on_blocks(name, p, [p.weight, p.sum], step)


def _decay(lr: Number, weight_decay: float, w: Tensor) -> Tensor | float:
    """Part of one change: 1 - lr weight_decay would round a small decay alike in every step."""
    return lr * weight_decay * w if weight_decay != 0 else 0.0


def _catch_up_in_blocks(name: str, p: CatchUp) -> None:
    def product(factor: Tensor, t: Tensor) -> Tensor:
        return torch.where(factor == 0, 0, factor * t)  # 0 times an infinite weight is NaN

    def step(f: Tensor, w: Tensor, v: Tensor | None = None) -> tuple[Tensor, ...]:
        a, b, c, d = f[:, :, None].unbind(1)
        if v is None:
            return (w + product(a, w),)
        return w + (product(a, w) + product(b, v)), product(c, w) + product(d, v)

    tables = [p.weight] if p.momentum_buffer is None else [p.weight, p.momentum_buffer]
    _on_blocks(name, p, tables, step)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _debias(p: Adamw, beta: float) -> Number:
    """1 - beta^step, without its cancellation."""
    if p.step_tensor is None:
        return -math.expm1(p.step * _log(beta))
    step = p.step_tensor.to(row_dtype(p.step_tensor.device))
    return (-torch.expm1(step * _log(beta))).to(accumulate_dtype(p.weight.dtype))


# ---- on the CUDA kernels ------------------------------------------------------------------------


def _sgd_on_kernel(p: Sgd) -> None:
    numbers = dict(momentum=p.momentum, share=1 - p.dampening, nesterov=p.nesterov)
    _launch("sgd_rows", p, {"weight": p.weight, "buffer": p.momentum_buffer}, numbers)


def _adamw_on_kernel(p: Adamw) -> None:
    numbers = dict(
        step_at=_float32(p.step_tensor),
        step=p.step,
        share1=1 - p.beta1,
        share2=1 - p.beta2,
        beta2=p.beta2,
        log_beta1=_log(p.beta1),
        log_beta2=_log(p.beta2),
        eps=p.eps,
    )
    tables = {"weight": p.weight, "first": p.exp_avg, "second": p.exp_avg_sq}
    _launch("adamw_rows", p, tables, numbers)


def _float32(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(torch.float32)


def _launch(
    kernel: str, p: Sgd | Adamw, tables: dict[str, Tensor | None], numbers: dict[str, Any]
) -> None:
    narrow = p.grad.shape[1] <= 1 or p.grad.stride(1) == 1
    matrices = {**tables, "grad": p.grad if narrow else p.grad.contiguous()}
    described = {}
    for name, t in matrices.items():
        described[f"{name}_stride"] = 0 if t is None else t.stride(0)
        described[f"{name}_type"] = 0 if t is None else cuda_launch.ELEMENTS[t.dtype]
    cuda_launch.launch(
        kernel,
        **matrices,
        **described,
        **numbers,
        rows=p.rows.contiguous(),
        lr_at=_float32(p.lr_tensor),
        lr=p.lr,
        table=p.weight.shape[0],
        count=p.rows.shape[0],
        width=p.weight.shape[1],
        weight_decay=p.weight_decay,
        maximize=p.maximize,
    )
    for t in tables.values():
        # what autograd keeps of it is stale now
        if t is not None and not t.is_inference():
            torch.autograd.graph.increment_version(t)


# ---- the ops ------------------------------------------------------------------------------------


def _define(
    rule: str,
    schema: str,
    inputs: type[Call],
    in_blocks: Callable[..., None],
    on_kernel: Callable[..., None] | None = None,
) -> None:
    def run(name: str) -> Callable[..., None]:
        if name == "cuda":
            return lambda *arguments: on_kernel(inputs(*arguments))
        return lambda *arguments: in_blocks(name, inputs(*arguments))

    for name in NAMES:
        missing = name == "cpu" and backends.unavailable("cpu")
        if missing or (name == "cuda" and on_kernel is None):
            continue
        op = f"{rule}_rows_{name}"
        LIBRARY.define(op + schema)
        if name != "cpu":  # which csrc/bind_row_update.cpp implements
            LIBRARY.impl(op, run(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fused_losses::{op}", lambda *arguments: None)


_define("sgd", SGD, Sgd, _sgd_in_blocks, _sgd_on_kernel)
_define("adamw", ADAMW, Adamw, _adamw_in_blocks, _adamw_on_kernel)
_define("adagrad", ADAGRAD, Adagrad, _adagrad_in_blocks)
_define("catch_up", CATCH_UP, CatchUp, _catch_up_in_blocks)

"""Steps of an optimiser on some rows of a table, in place: for a gradient that only they have.

    weight[rows], state[rows] = step(weight[rows], state[rows], grad)

Everything else stays as it is: a row that takes no part sees neither momentum nor weight decay.
The formulas are those of torch.optim.SGD, AdamW and Adagrad; `catch_up_rows_` does what missed
steps would have done (fused_losses.centers.optimizers). On "cpu" and "cuda" one kernel reads the
gradient once and reads and writes each row of the weight and of its state once; "bounded" goes by
blocks of rows. docs/row_update.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.base.validation import assert_async, describe
from fused_losses.primitives.library import LIBRARY
from fused_losses.primitives.row_update import bounded, cuda, reference
from fused_losses.primitives.row_update.inputs import (
    FACTORS,
    Adagrad,
    Adamw,
    CatchUp,
    RowStep,
    Sgd,
)

IN_PYTHON = {"reference": reference.run, "bounded": bounded.run, "cuda": cuda.run}

Number = float | Tensor


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
    _run(
        Sgd(
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
        ),
        backend,
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
    _run(
        Adamw(
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
        ),
        backend,
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
    _run(
        Adagrad(
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
        ),
        backend,
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
    check_distinct_rows(rows, factors.shape[0], weight)
    _run(CatchUp(weight, rows, factors, momentum_buffer, rounding_key, row_offset), backend)


# ---- at the door --------------------------------------------------------------------------------


def _check(weight: Tensor, rows: Tensor, grad: Tensor, states: dict[str, Tensor]) -> None:
    validation.check_matrix("grad", grad, "[K, D]")
    _check_tables(weight, states)
    if grad.shape[1] != weight.shape[1]:
        raise ValueError(f"grad: expected [K, {weight.shape[1]}], got {describe(grad)}")
    validation.check_device("weight", weight, "grad", grad)
    if (grad.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"grad: expected float64 where weight is, and only there, got {grad.dtype}")
    check_distinct_rows(rows, grad.shape[0], weight)


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


def check_distinct_rows(rows: Tensor, count: int, weight: Tensor) -> None:
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
        assert_async(((rows >= 0) & (rows < count)).all(), message)
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


# ---- the ops ------------------------------------------------------------------------------------


def _run(p: RowStep, backend: str | None) -> None:
    name = backends.requested(backend)
    if name == "triton":
        raise RuntimeError(
            "backend='triton' cannot run this call: rows are updated on cuda, cpu and bounded"
        )
    if p.rule not in cuda.KERNELS or p.rounding_key is not None:
        if name == "cuda":
            what = f"{p.rule}_rows_" if p.rule not in cuda.KERNELS else "stochastic rounding"
            raise RuntimeError(f"backend='cuda' cannot run this call: no CUDA kernel has {what}")
        if name == "auto" and p.weight.device.type != "cpu":
            name = "bounded"
    name, _ = backends.choose(
        name, p.weight.device, p.weight.dtype, "fp32", "row_update", p.weight.shape[1]
    )
    getattr(torch.ops.fused_losses, f"{p.rule}_rows_{name}").default(*p)


def _define(rule: type[RowStep], backend: str) -> None:
    op = f"{rule.rule}_rows_{backend}"
    LIBRARY.define(op + rule.schema)
    if backend in IN_PYTHON:  # csrc/bind_row_update.cpp implements the others
        run: Callable[[RowStep], None] = IN_PYTHON[backend]
        LIBRARY.impl(op, lambda *given: run(rule(*given)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_losses::{op}", lambda *given: None)


for _rule in (Sgd, Adamw, Adagrad, CatchUp):
    _define(_rule, "reference")
    _define(_rule, "bounded")
    if not backends.unavailable("cpu"):
        _define(_rule, "cpu")
    if _rule.rule in cuda.KERNELS:
        _define(_rule, "cuda")

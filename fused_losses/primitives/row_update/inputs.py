"""One call of each rule, in the order of its op's schema."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

FACTORS = 4  # of a row that catches up

_ROWS = "(Tensor(a!) weight, Tensor rows, Tensor grad, "
_RATE = "Tensor? lr_tensor, float lr, "
_ROUNDING = "int? rounding_key=None, int row_offset=0) -> ()"


class Sgd(NamedTuple):
    """A step of torch.optim.SGD."""

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

    rule = "sgd"
    schema = (
        f"{_ROWS}Tensor(b!)? momentum_buffer, {_RATE}float momentum, float dampening, "
        f"float weight_decay, bool nesterov, bool maximize, {_ROUNDING}"
    )


class Adamw(NamedTuple):
    """A step of torch.optim.AdamW."""

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

    rule = "adamw"
    schema = (
        f"{_ROWS}Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, {_RATE}Tensor? step_tensor, "
        "float step, float beta1, float beta2, float eps, float weight_decay, bool maximize, "
        + _ROUNDING
    )


class Adagrad(NamedTuple):
    """A step of torch.optim.Adagrad."""

    weight: Tensor
    rows: Tensor
    grad: Tensor
    sum: Tensor
    lr: float
    eps: float
    weight_decay: float
    initial_accumulator_value: float
    maximize: bool
    rounding_key: int | None = None
    row_offset: int = 0

    rule = "adagrad"
    schema = (
        f"{_ROWS}Tensor(b!) sum, float lr, float eps, float weight_decay, "
        f"float initial_accumulator_value, bool maximize, {_ROUNDING}"
    )


class CatchUp(NamedTuple):
    """What missed steps would have done."""

    weight: Tensor
    rows: Tensor
    grad: Tensor  # the factors, which take its place
    momentum_buffer: Tensor | None
    rounding_key: int | None = None
    row_offset: int = 0

    rule = "catch_up"
    schema = (
        "(Tensor(a!) weight, Tensor rows, Tensor factors, Tensor(b!)? momentum_buffer, " + _ROUNDING
    )


RowStep = Sgd | Adamw | Adagrad | CatchUp

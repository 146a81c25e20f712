"""Optimisers over the rows of a table, lazy: a step costs what the rows that take part cost.

A row that took no part gets what it missed in closed form when it is next read (`catch_up`) or
when the table is saved (`settle`): fused_losses.centers.history.

"sgd" is torch.optim.SGD on a dense gradient with zeros, step for step. "adamw" is
torch.optim.SparseAdam (moments change only where the row takes part, bias is corrected by the
global step) with AdamW's eps and decoupled weight decay; "adagrad" is torch.optim.Adagrad with
decoupled weight decay. docs/row_update.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.rounding import rounding_key
from fused_losses.base.validation import check_choice, describe
from fused_losses.centers.history import Factors, History
from fused_losses.primitives.row_update.op import (
    adagrad_rows_,
    adamw_rows_,
    catch_up_rows_,
    check_distinct_rows,
    sgd_rows_,
    state_dtypes,
)

Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
ParamGroup = dict[str, Any]

HISTORY = 4096  # steps that are remembered; then every row catches up
ROWS = 1 << 16  # that catch up at once
CHOOSING = ("cpu",)  # devices on which rows that are behind are picked; elsewhere that would wait


class RowOptimizer:
    """An optimiser over the rows of weight [C, ...], in place; see the subclasses for the rules.

        begin(group); update(rows, grad) for each row at most once, caught up before; end()

    A row must have caught up to be read. Rows are an int64 vector of distinct ones or a slice.
    state_dtype: of the states, float32 (float64 of a float64 weight) unless given; bfloat16 or
    the weight's own, too. stochastic_rounding: of 16-bit weights and states; None: where there
    are any. allocate(name, shape, dtype) makes the zeros of a state; rows that are not asked for
    are never touched, so that weight and states may be memory-mapped.
    Memory: the states, 8 bytes a row, and a block of rows. Raises ValueError, TypeError or
    IndexError for what does not fit, RuntimeError for calls out of order.
    """

    options: ClassVar[ParamGroup] = {}  # hyper-parameters and their defaults

    def __init__(
        self,
        weight: Tensor,
        *,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        allocate: Allocate | None = None,
        **defaults: Any,
    ) -> None:
        if weight.dim() < 2 or not weight.is_contiguous():
            raise ValueError(
                f"weight: expected a contiguous table [C, ...], got {describe(weight)}"
            )
        allowed = state_dtypes(weight.dtype)
        self._state_dtype = allowed[0] if state_dtype is None else state_dtype
        if self._state_dtype not in allowed:
            told = " or ".join(map(str, allowed))
            raise TypeError(f"state_dtype: expected {told}, got {state_dtype}")
        self.defaults = self._checked(defaults)
        self.row_offset = 0  # the row of the whole table that row 0 is
        self.steps = 0
        self.states: dict[str, Tensor] = {}  # by name, shaped as the weight
        self._weight = weight.detach()
        self.last = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        self._allocate = allocate or self._zeros
        self._history = History()
        self._open: ParamGroup | None = None
        self._seed = seed
        narrow = 2 in (weight.dtype.itemsize, self._state_dtype.itemsize)
        self._stochastic = narrow if stochastic_rounding is None else stochastic_rounding

    # ---- what a rule is ----

    def _missed(self, group: ParamGroup) -> Factors:
        """What the open step does to a row with gradient 0."""
        raise NotImplementedError

    def _step(self, rows: Tensor, grad: Tensor, group: ParamGroup, options: ParamGroup) -> None:
        """The open step of some rows."""
        raise NotImplementedError

    def _check(self, group: ParamGroup) -> None:
        """Raises for hyper-parameters out of range."""
        _at_least_0(group, "lr", "weight_decay")

    # ---- steps ----

    def begin(self, group: ParamGroup) -> None:
        """Opens step steps + 1; hyper-parameters that group does not have are the defaults."""
        if self._open is not None:
            raise RuntimeError("begin: the step before has not ended")
        known = {name: value for name, value in group.items() if name in self.options}
        self._open = self._checked(known)

    @torch.no_grad()
    def update(self, rows: Tensor | slice, grad: Tensor) -> None:
        """The open step for rows [K] with gradient [K, ...]; time O(K D)."""
        if self._open is None:
            raise RuntimeError("update: expected begin() before")
        at, grad = self._indices(rows), _flat(grad)
        check_distinct_rows(at, grad.shape[0], self._weight)
        self._check_turn(at)
        self._step(at, grad, self._open, self._options(self.steps + 1, 1))
        self.last.index_fill_(0, at, self.steps + 1)

    def end(self) -> None:
        """Closes the step."""
        if self._open is None:
            raise RuntimeError("end: expected begin() before")
        self._history.push(self._missed(self._open))
        self._open = None
        self.steps += 1
        if len(self._history) >= HISTORY:
            if not self._history.idle:
                self.settle()
            self._history.clear(self.steps)

    @torch.no_grad()
    def catch_up(self, rows: Tensor | slice) -> None:
        """Brings rows to step `steps`, once; time O(D) for each row that had missed a step."""
        for at in self._indices(rows).split(ROWS):
            last = self.last[at]
            if at.device.type in CHOOSING:
                behind = last < self.steps
                at, last = at[behind], last[behind]
            if at.numel() == 0:
                continue
            if not self._history.idle:
                self._catch_up(at, self._history.since(last))
            self.last.index_copy_(0, at, last.clamp_min(self.steps))

    def settle(self, block_rows: int = ROWS) -> None:
        """Every row catches up, so many at a time."""
        for start in range(0, len(self.last), block_rows):
            self.catch_up(slice(start, start + block_rows))

    def load(self, steps: int) -> None:
        """All rows stand at this step: after weight and states were loaded in place."""
        if steps < 0:
            raise ValueError(f"steps: expected a count >= 0, got {steps}")
        self._open = None
        self.steps = steps
        self.last.fill_(steps)
        self._history.clear(steps)

    def _check_turn(self, rows: Tensor) -> None:
        """Raises for rows that are behind or have had the open step; a GPU is not waited for."""
        if rows.is_cuda or rows.numel() == 0:
            return
        low, high = map(int, self.last[rows].aminmax())
        if high > self.steps:
            raise RuntimeError(f"update: a row had its part in step {high} already")
        if low < self.steps and not self._history.idle:
            raise RuntimeError(
                f"update: expected catch_up() before; a row stands at step {low} of {self.steps}"
            )

    # ---- shared by the rules ----

    def _catch_up(self, rows: Tensor, factors: Tensor) -> None:
        momentum = self.states.get("momentum_buffer")
        catch_up_rows_(
            _flat(self._weight),
            rows,
            factors,
            None if momentum is None else _flat(momentum),
            **self._options(self.steps, 0),
        )

    def _state(self, name: str) -> Tensor:
        """[C, D], made when first asked for."""
        if name not in self.states:
            shape = tuple(self._weight.shape)
            state = self._allocate(name, shape, self._state_dtype)
            right = state.shape == shape and state.dtype == self._state_dtype
            if not right or not state.is_contiguous():
                raise ValueError(
                    f"allocate: expected a contiguous {shape}, {self._state_dtype}, got "
                    f"{describe(state)}"
                )
            self.states[name] = state
        return _flat(self.states[name])

    def _zeros(self, _: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._weight.device)

    def _options(self, step: int, phase: int) -> ParamGroup:
        """What every function of row_update takes."""
        key = rounding_key(self._seed, step, phase) if self._stochastic else None
        # a forced "triton" or "cuda" is meant for the loss: not every rule has such a kernel
        forced = backends.requested(None)
        backend = forced if forced in ("reference", "bounded") else "auto"
        return {"rounding_key": key, "row_offset": self.row_offset, "backend": backend}

    def _indices(self, rows: Tensor | slice) -> Tensor:
        if not isinstance(rows, slice):
            return rows
        return torch.arange(*rows.indices(len(self.last)), device=self.last.device)

    def _checked(self, group: ParamGroup) -> ParamGroup:
        unknown = [name for name in group if name not in self.options]
        if unknown:
            raise TypeError(
                f"{unknown[0]}: expected one of {', '.join(self.options)} for this optimiser"
            )
        whole = {**getattr(self, "defaults", self.options), **group}
        whole["lr"] = float(whole["lr"])
        self._check(whole)
        return whole


class RowSgd(RowOptimizer):
    """torch.optim.SGD on a dense gradient that is zero where a row takes no part, exactly.

        v = momentum v + (1 - dampening) (grad + weight_decay w);   w -= lr v
        nesterov: w -= lr (grad + weight_decay w + momentum v);   dampening not in the first step

    State: momentum_buffer, once a step has momentum.
    """

    options: ClassVar[ParamGroup] = dict(
        lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False
    )

    def __init__(self, weight: Tensor, **settings: Any) -> None:
        super().__init__(weight, **settings)
        self._moving = False  # a step with momentum has ended: dampening counts
        if self.defaults["momentum"]:
            self._state("momentum_buffer")
        elif self.defaults["nesterov"]:
            raise ValueError("nesterov: expected a momentum, got 0")

    def load(self, steps: int) -> None:
        super().load(steps)
        self._moving = steps > 0 and "momentum_buffer" in self.states

    def end(self) -> None:
        moving = self._moving or (self._open is not None and self._open["momentum"] != 0)
        super().end()
        self._moving = moving

    def _check(self, group: ParamGroup) -> None:
        super()._check(group)
        _at_least_0(group, "momentum")
        if group["nesterov"] and group["dampening"] != 0:
            raise ValueError(f"dampening: expected 0 with nesterov, got {group['dampening']}")

    def _share(self, group: ParamGroup) -> float:
        return 1 - group["dampening"] if self._moving else 1.0

    def _missed(self, group: ParamGroup) -> Factors:
        lr, mu, decay = group["lr"], group["momentum"], group["weight_decay"]
        if mu == 0:  # the buffer, if there is one, rests
            return (-lr * decay, 0.0, 0.0, 1.0)
        into = self._share(group) * decay
        if group["nesterov"]:
            return (-lr * (decay + mu * into), -lr * mu * mu, into, mu)
        return (-lr * into, -lr * mu, into, mu)

    def _step(self, rows: Tensor, grad: Tensor, group: ParamGroup, options: ParamGroup) -> None:
        moving = group["momentum"] != 0
        buffer = self._state("momentum_buffer") if moving else None
        nesterov = group["nesterov"] and moving
        given = {**group, "dampening": 1 - self._share(group), "nesterov": nesterov}
        sgd_rows_(_flat(self._weight), rows, grad, buffer, **given, **options)


class RowAdamw(RowOptimizer):
    """AdamW whose moments rest while a row takes no part (torch.optim.SparseAdam's meaning).

        m += (1 - beta1) (grad - m);   v = beta2 v + (1 - beta2) grad^2       where it takes part
        w = (1 - lr weight_decay) w                                           in every step
        w -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)           where it takes part

    t counts all steps. With every row in each step it is torch.optim.AdamW.
    """

    options: ClassVar[ParamGroup] = dict(
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, maximize=False
    )

    def __init__(self, weight: Tensor, **settings: Any) -> None:
        super().__init__(weight, **settings)
        for name in ("exp_avg", "exp_avg_sq"):
            self._state(name)

    def _check(self, group: ParamGroup) -> None:
        super()._check(group)
        _at_least_0(group, "eps")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas: expected two values in [0, 1), got {group['betas']}")

    def _missed(self, group: ParamGroup) -> Factors:
        return (-group["lr"] * group["weight_decay"], 0.0, 0.0, 1.0)

    def _step(self, rows: Tensor, grad: Tensor, group: ParamGroup, options: ParamGroup) -> None:
        moments = self._state("exp_avg"), self._state("exp_avg_sq")
        adamw_rows_(
            _flat(self._weight), rows, grad, *moments, step=self.steps + 1, **group, **options
        )


class RowAdagrad(RowOptimizer):
    """torch.optim.Adagrad on the rows that take part, with decoupled weight decay in every step.

        lr_t = lr / (1 + (t - 1) lr_decay);   s += grad^2
        w = (1 - lr_t weight_decay) w - lr_t grad / (sqrt(s + initial_accumulator_value) + eps)

    State: sum, which is s and starts at 0.
    """

    options: ClassVar[ParamGroup] = dict(
        lr=1e-2,
        lr_decay=0.0,
        weight_decay=0.0,
        initial_accumulator_value=0.0,
        eps=1e-10,
        maximize=False,
    )

    def __init__(self, weight: Tensor, **settings: Any) -> None:
        super().__init__(weight, **settings)
        self._state("sum")

    def _check(self, group: ParamGroup) -> None:
        super()._check(group)
        _at_least_0(group, "lr_decay", "initial_accumulator_value", "eps")

    def _rate(self, group: ParamGroup) -> float:
        return group["lr"] / (1 + self.steps * group["lr_decay"])

    def _missed(self, group: ParamGroup) -> Factors:
        return (-self._rate(group) * group["weight_decay"], 0.0, 0.0, 1.0)

    def _step(self, rows: Tensor, grad: Tensor, group: ParamGroup, options: ParamGroup) -> None:
        given = {name: value for name, value in group.items() if name != "lr_decay"}
        given["lr"] = self._rate(group)
        adagrad_rows_(_flat(self._weight), rows, grad, self._state("sum"), **given, **options)


OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    "sgd": RowSgd,
    "adamw": RowAdamw,
    "adagrad": RowAdagrad,
}


def make_row_optimizer(
    name: str,
    weight: Tensor,  # [C, ...], changed
    *,
    state_dtype: torch.dtype | None = None,
    stochastic_rounding: bool | None = None,
    seed: int = 0,
    allocate: Allocate | None = None,
    **defaults: Any,
) -> RowOptimizer:
    """The optimiser "sgd", "adamw" or "adagrad" over the rows of a table; see `RowOptimizer`."""
    check_choice("optimizer", name, tuple(OPTIMIZERS))
    return OPTIMIZERS[name](
        weight,
        state_dtype=state_dtype,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        allocate=allocate,
        **defaults,
    )


def _flat(table: Tensor) -> Tensor:
    """[C, ...] as [C, D]."""
    return table.flatten(1)


def _at_least_0(group: ParamGroup, *names: str) -> None:
    for name in names:
        if not group[name] >= 0:
            raise ValueError(f"{name}: expected a value >= 0, got {group[name]}")

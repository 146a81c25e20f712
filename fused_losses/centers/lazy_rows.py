"""Optimisers over the rows of a table, lazy: a step costs what the rows that take part cost.

A row that took no part gets what it missed in closed form when it is next read (`catch_up`) or
when the table is saved (`settle`): fused_losses.centers.history.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.rounding import rounding_key
from fused_losses.base.validation import FLOATS, describe
from fused_losses.centers.history import Factors, History
from fused_losses.primitives.row_update.op import (
    catch_up_rows_,
    check_distinct_rows,
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

    It owns the table `weight`, the states, the step and what rows have missed. A row must have
    caught up to be read, and every row (`settle`) before another writes the table.
    Rows are an int64 vector of distinct ones or a slice.
    state_dtype: of the states, float32 (float64 of a float64 weight) unless given; bfloat16 or
    the weight's own, too. stochastic_rounding: of 16-bit weights and states; None: where there
    are any. allocate(name, shape, dtype) makes the zeros of a state; rows that are not asked for
    are never touched, so that weight and states may be memory-mapped.
    Memory: the states, 8 bytes a row, and a block of rows. Raises ValueError, TypeError or
    IndexError for what does not fit, RuntimeError for calls out of order.
    """

    options: ClassVar[ParamGroup] = {}  # hyper-parameters and their defaults
    state_names: ClassVar[tuple[str, ...]] = ()

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
        _check_table(weight)
        allowed = state_dtypes(weight.dtype)
        if state_dtype not in (None, *allowed):
            told = " or ".join(map(str, allowed))
            raise TypeError(f"state_dtype: expected {told}, got {state_dtype}")
        if stochastic_rounding is not None and not isinstance(stochastic_rounding, bool):
            raise TypeError(
                f"stochastic_rounding: expected None, True or False, got {stochastic_rounding!r}"
            )
        self._asked_dtype, self._asked_stochastic = state_dtype, stochastic_rounding
        self.defaults = self._checked(defaults)
        self.row_offset = 0  # the row of the whole table that row 0 is
        self.steps = 0
        self.states: dict[str, Tensor] = {}  # by name, shaped as the weight
        self._weight, self._version = weight, weight._version
        self._shape = tuple(weight.shape)
        self.last = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        self._settled = 0  # the step at which every row has caught up
        self.generation = 0  # changes with every step and whenever another writes the table
        self._allocate = allocate or self._zeros
        self._history = History()
        self._open: ParamGroup | None = None
        self._seed = seed

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._version = self._weight._version  # a copy's count of writes starts anew

    # ---- the table ----

    @property
    def weight(self) -> Tensor:
        """The table. One that is set has this shape, any dtype and device: the states follow it."""
        return self._weight

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        _check_table(weight)
        if tuple(weight.shape) != self._shape:
            raise ValueError(f"weight: expected shape {self._shape}, got {describe(weight)}")
        self._version = self._weight._version  # what was written into the old one is gone
        self.settle()  # momentum too
        self._weight = weight
        self._follow()
        self.generation += 1

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the states: what was asked for where a weight of this dtype may have it."""
        allowed = state_dtypes(self._weight.dtype)
        return self._asked_dtype if self._asked_dtype in allowed else allowed[0]

    @property
    def _stochastic(self) -> bool:
        narrow = 2 in (self._weight.dtype.itemsize, self.state_dtype.itemsize)
        return narrow if self._asked_stochastic is None else self._asked_stochastic

    def _follow(self) -> None:
        """States stand beside the table, wherever it was moved and whatever it was cast to."""
        weight = self._weight
        if tuple(weight.shape) != self._shape or not weight.is_contiguous():
            raise ValueError(
                f"weight: expected a contiguous table {self._shape}, got {describe(weight)}"
            )
        self.last = self.last.to(weight.device)
        for name, state in self.states.items():
            self.states[name] = state.to(weight.device, self.state_dtype)
        self._version = weight._version

    def check_written(self) -> None:
        """Notices what others have done to the table; RuntimeError: it is too late for that."""
        weight = self._weight
        here, dtype = weight.device == self.last.device, self.state_dtype
        shaped = tuple(weight.shape) == self._shape
        if not (here and shaped and all(s.dtype == dtype for s in self.states.values())):
            self._follow()
            self.generation += 1
        if weight._version == self._version:
            return
        if not self._history.idle and bool((self.last < self.steps).any()):
            raise RuntimeError(
                "weight: written while rows had not caught up with the steps that they took no "
                "part in; expected settle() before (reading head.weight does it), or set the "
                "whole table anew: head.weight = ..."
            )
        self._version = weight._version
        self.generation += 1

    # ---- what a rule is ----

    def _missed(self, group: ParamGroup) -> Factors:
        """What the open step does to a row with gradient 0."""
        raise NotImplementedError

    def _step(self, rows: Tensor, grad: Tensor, group: ParamGroup, options: ParamGroup) -> None:
        """The open step of some rows."""
        raise NotImplementedError

    def _check(self, group: ParamGroup) -> None:
        """Raises for hyper-parameters out of range."""
        at_least_0(group, "lr", "weight_decay")

    # ---- steps ----

    def begin(self, group: ParamGroup) -> None:
        """Opens step steps + 1; hyper-parameters that group does not have are the defaults."""
        if self._open is not None:
            raise RuntimeError("begin: the step before has not ended")
        self.check_written()
        known = {name: value for name, value in group.items() if name in self.options}
        self._open = self._checked(known)

    @torch.no_grad()
    def update(self, rows: Tensor | slice, grad: Tensor) -> None:
        """The open step for rows [K] with gradient [K, ...]; time O(K D)."""
        if self._open is None:
            raise RuntimeError("update: expected begin() before")
        at, grad = self._indices(rows), flat(grad)
        check_distinct_rows(at, grad.shape[0], self._weight)
        self._check_turn(at)
        self.last.index_fill_(0, at, self.steps + 1)  # first: an interrupt must not step it twice
        try:
            self._step(at, grad, self._open, self._options(self.steps + 1, 1))
        except Exception:
            self.last.index_fill_(0, at, self.steps)
            raise
        finally:
            self._version = self._weight._version

    def end(self) -> None:
        """Closes the step."""
        if self._open is None:
            raise RuntimeError("end: expected begin() before")
        self._history.push(self._missed(self._open))
        self._open = None
        self.steps += 1
        self.generation += 1
        if len(self._history) >= HISTORY:
            if not self._history.idle:
                self.settle()
            self._history.clear(self.steps)

    def abort(self, *, counts: bool = False) -> None:
        """Closes a step that something broke: it counts if any row has had its part in it.

        counts: it does, whatever this shard's rows have had: of others', other ranks know.
        """
        if self._open is None:
            return
        if counts or bool((self.last > self.steps).any()):
            self.end()
        self._open = None

    @torch.no_grad()
    def catch_up(self, rows: Tensor | slice) -> None:
        """Brings rows to step `steps`, once; time O(D) for each row that had missed a step."""
        self.check_written()
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
            self._version = self._weight._version

    def settle(self, block_rows: int = ROWS) -> None:
        """Every row catches up, so many at a time."""
        self.check_written()
        if self._settled == self.steps:
            return
        for start in range(0, len(self.last), block_rows):
            self.catch_up(slice(start, start + block_rows))
        self._settled = self.steps

    @property
    def begun(self) -> bool | None:
        """Whether a momentum that is kept has begun, of the whole table; None: none is kept."""
        return None

    def load(self, steps: int, begun: bool | None = None) -> None:  # noqa: ARG002 (RowSgd's)
        """All rows stand at this step: after weight and states were loaded in place.

        begun: what `begun` was there; None: of older checkpoints, which do not say.
        """
        if steps < 0:
            raise ValueError(f"steps: expected a count >= 0, got {steps}")
        self._open = None
        self.steps = self._settled = steps
        self.last.fill_(steps)
        self._history.clear(steps)
        self._follow()
        self.generation += 1

    def unfit(self, states: Mapping[str, Tensor]) -> str | None:
        """Why these are no states of this table, or None."""
        kinds = set(self.states) <= set(states) <= set(self.state_names)
        if not kinds:
            return f"optimizer: expected the states {sorted(self.states)}, got {sorted(states)}"
        for name, state in states.items():
            if tuple(state.shape) != self._shape:
                return f"{name}: expected shape {self._shape}, got {describe(state)}"
        return None

    def make_state(self, name: str) -> None:
        """One of the rule's states, zeros where it is not there yet."""
        if name not in self.state_names:
            raise ValueError(f"optimizer: expected states {sorted(self.state_names)}, got {name!r}")
        self._state(name)

    @torch.no_grad()
    def fill(self, states: Mapping[str, Tensor], steps: int, begun: bool | None = None) -> None:
        """Goes on from this step with copies of such states, which `unfit` has nothing against."""
        for name, state in states.items():
            self._state(name).copy_(flat(state))
        self.load(steps, begun)

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
            flat(self._weight),
            rows,
            factors,
            None if momentum is None else flat(momentum),
            **self._options(self.steps, 0),
        )

    def _state(self, name: str) -> Tensor:
        """[C, D], made when first asked for."""
        if name not in self.states:
            shape = tuple(self._weight.shape)
            state = self._allocate(name, shape, self.state_dtype)
            right = state.shape == shape and state.dtype == self.state_dtype
            if not right or not state.is_contiguous():
                raise ValueError(
                    f"allocate: expected a contiguous {shape}, {self.state_dtype}, got "
                    f"{describe(state)}"
                )
            self.states[name] = state
        return flat(self.states[name])

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
        given = {**getattr(self, "defaults", self.options), **group}
        whole = {name: _option(name, given[name], usual) for name, usual in self.options.items()}
        self._check(whole)
        return whole


def _option(name: str, value: Any, usual: Any) -> Any:
    """A hyper-parameter of the kind that its usual value has."""
    if isinstance(usual, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
        return value
    if isinstance(usual, tuple):
        if not isinstance(value, tuple | list) or len(value) != len(usual):
            raise TypeError(f"{name}: expected {len(usual)} numbers, got {value!r}")
        return tuple(_option(name, one, 0.0) for one in value)
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def flat(table: Tensor) -> Tensor:
    """[C, ...] as [C, D]."""
    return table.flatten(1)


def _check_table(weight: Tensor) -> None:
    if weight.dim() < 2 or not weight.is_contiguous() or weight.dtype not in FLOATS:
        raise ValueError(
            f"weight: expected a contiguous table [C, ...] of floats, got {describe(weight)}"
        )


def at_least_0(group: ParamGroup, *names: str) -> None:
    for name in names:
        if not group[name] >= 0:
            raise ValueError(f"{name}: expected a value >= 0, got {group[name]}")

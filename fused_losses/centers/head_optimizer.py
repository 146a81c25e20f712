"""The head's updates behind torch's interface of an optimiser."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fused_losses.base.validation import describe
from fused_losses.centers.state import BEGUN
from fused_losses.centers.tableless import SWITCH, SwitchedTable


class Table(Protocol):
    """What is stepped: `lazy_rows.RowOptimizer`, `spherical.SphericalTable`."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def defaults(self) -> Mapping[str, Any]: ...

    @property
    def states(self) -> Mapping[str, Tensor]: ...

    @property
    def steps(self) -> int: ...

    def unfit(self, states: Mapping[str, Tensor]) -> str | None: ...


class Updates(Protocol):
    """What owns all that is seen here: fused_losses.centers.update."""

    @property
    def rows(self) -> Table: ...

    @property
    def probe(self) -> Tensor: ...

    @property
    def steps(self) -> int: ...

    @property
    def states(self) -> dict[str, Tensor]: ...

    @property
    def begun(self) -> bool | None: ...

    def take_pending(self) -> None: ...

    def forget(self) -> None: ...

    def fill(self, states: Mapping[str, Tensor], steps: int, begun: bool | None) -> None: ...


class HeadOptimizer(torch.optim.Optimizer):
    """Hyper-parameters of the rows' updates, for schedules, and their states, for checkpoints.

    With update="backward" a step has been taken when backward returns, with the hyper-parameters
    that stood then, and `step` takes none; with update="step" it is taken here. Its one group
    has the table, a number whose gradient is the factor of the gradient that waits: GradScaler
    unscales it, or finds that it is not finite (update="backward": that the step was left out);
    and the parameter whose flag freezes the head.
    `state` and `state_dict` read the rows' own states, which catch up for it; `load_state_dict`
    copies into them, all or none.
    """

    _module: weakref.ref[nn.Module] | None = None  # the head

    def __init__(self, updates: Updates) -> None:
        self._updates = updates
        self._groups: list[dict[str, Any]] = []
        super().__init__([updates.rows.weight, updates.probe], dict(updates.rows.defaults))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        if self._groups:  # the table may be another by now
            head = None if self._module is None else self._module()
            table, probe = self._updates.rows.weight, self._updates.probe
            if head is None:
                self._groups[0]["params"] = [table, probe]
            else:  # FSDP may have put another switch in its place
                shown = self._shown(table, head)
                self._groups[0]["params"] = [shown, probe, getattr(head, SWITCH)]
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    def belongs_to(self, head: nn.Module) -> None:
        """The table's flag is this head's from now on."""
        self._module = weakref.ref(head)

    def _shown(self, table: Tensor, head: nn.Module) -> Tensor:
        """The table in others' hands, one object as long as it is that table."""
        former = next(iter(self._groups[0]["params"]), None)
        if isinstance(former, SwitchedTable) and former.shows(table, head):
            return former
        return SwitchedTable.of(table, head)

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        if not self._groups:
            return {}
        counts = {"step": self._updates.steps, BEGUN: self._updates.begun}
        told = {k: torch.tensor(int(v), device="cpu") for k, v in counts.items() if v is not None}
        return {self.param_groups[0]["params"][0]: {**told, **self._updates.states}}

    @state.setter
    def state(self, state: dict[Tensor, Any]) -> None:
        if state:
            raise ValueError("state: expected load_state_dict(...) to fill the rows' states")

    def __getattr__(self, name: str) -> Tensor:
        # distributed checkpoints follow the names of a state dict: "head.optimizer.exp_avg"
        updates = self.__dict__.get("_updates")
        if updates is None or name not in updates.rows.states:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return updates.states[name]

    def __getstate__(self) -> dict[str, Any]:
        groups = [{**group, "params": []} for group in self._groups]  # the rows have the table
        return {"_updates": self._updates, "_groups": groups, "defaults": self.defaults}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._updates.take_pending()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002 (torch's signature)
        """Forgets the backwards since the last step, and their factor (update="step")."""
        self._updates.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._groups:
            raise ValueError(
                "add_param_group: the head's optimiser steps the class centres alone; expected "
                "another torch optimiser for other parameters"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """torch's form, of one parameter: hyper-parameters, "step" and the states, which share
        the memory of the head's own."""
        packed = super().state_dict()
        packed["param_groups"][0]["params"] = [0]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hyper-parameters, and states where there are some; what waits is forgotten.

        Raises ValueError before anything is written: another optimiser's, or other shapes.
        """
        rows, own = self._updates.rows, set(self._updates.rows.defaults)
        groups = state_dict["param_groups"]
        given = set(groups[0]) - {"params"}
        if len(groups) != 1 or not own <= given:
            raise ValueError(
                f"state_dict: expected one group with {', '.join(sorted(own))}, got "
                f"{len(groups)} with {', '.join(sorted(given))}"
            )
        kept = next(iter(state_dict["state"].values()), {})
        states = {k: v for k, v in kept.items() if v is not None}  # torch has such a buffer
        step = states.pop("step", None)
        # torch's SGD has no step, and a buffer once momentum has begun
        begun = states.pop(BEGUN, True if step is None else None)
        trouble = rows.unfit(states) if states or step is not None else None
        if step is not None and not float(step) >= 0:
            trouble = f"step: expected a count >= 0, got {describe(step)}"
        if trouble is not None:
            raise ValueError(f"state_dict: {trouble}")
        self._groups[0].update({k: v for k, v in groups[0].items() if k != "params"})
        if states or step is not None:
            steps = rows.steps if step is None else int(step)
            self._updates.fill(states, steps, None if begun is None else bool(begun))

"""The table of a head in the life of a module: cast, moved, assigned, copied, saved and loaded.

With an optimiser of its own the table is neither a parameter nor a buffer: what averages or
broadcasts those over ranks (DistributedDataParallel, FSDP) must not see rows that differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_losses.base.numerics import unit_rows
from fused_losses.centers import arguments, class_margins
from fused_losses.centers.collectives import Ranks
from fused_losses.centers.held import Held, held_by
from fused_losses.centers.objective import loss_of
from fused_losses.centers.state import BEGUN, TableState, anothers, misshapen, named_tensors, read
from fused_losses.centers.tableless import (
    PARAMETRIZED,
    SWITCH,
    WEIGHT,
    SwitchedTable,
    TablelessParameters,
)
from fused_losses.centers.update import AutogradUpdates, RowUpdates

FIXED = ("num_classes", "embedding_dim", "sub_centers", "class_start", "num_local", "ranks")
SMOOTHED = ("label_smoothing", "batch_negatives")
EXTRA, STATES = "_extra_state", "optimizer."


class TableModule(nn.Module):
    """A module whose table belongs to its updates, or is a parameter where there are none."""

    ranks: Ranks
    margin: Any
    margin_parts: Held | None
    batch_negatives: Any
    scale: Any
    label_smoothing: float
    sub_centers: int
    num_classes: int
    class_start: int
    num_local: int
    embedding_dim: int
    normalize: bool
    sample_rate: float
    _strict = False  # within the head's own load_state_dict(..., strict=True)

    def _own(self, table: Tensor, updates: AutogradUpdates | RowUpdates) -> None:
        """Takes the table, once, in the constructor."""
        self._updates = updates
        self._steps: Tensor | None = None
        self._begun: Tensor | None = None
        if isinstance(updates, RowUpdates):
            self.__dict__["_parameters"] = TablelessParameters(self._parameters)
            self.register_parameter(SWITCH, nn.Parameter(table.new_empty(0)))
        else:
            self._parameters[WEIGHT] = nn.Parameter(table)  # beside the property of that name

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The rows' own optimiser; None: `weight` is a parameter for another one."""
        if isinstance(self._updates, RowUpdates):
            self._updates.optimizer.belongs_to(self)
        return self._updates.optimizer

    @property
    def weight(self) -> Tensor:
        """This shard's rows [c, D] or [c, K, D], with a bias [c, D + 1], which all catch up for it.

        Another table of this shape may be assigned, of any dtype and device. With an optimizer it
        is no leaf of autograd, and its `requires_grad` is the head's own: either freezes both.
        """
        self._updates.settle()
        parameter = not isinstance(self._updates, RowUpdates)
        if parameter or torch.compiler.is_compiling():  # whose graphs take plain tensors alone
            return self._table
        return SwitchedTable.of(self._table, self)

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        if not isinstance(self._updates, RowUpdates):
            if WEIGHT not in self._parameters:  # torch.nn.utils.weight_norm has removed it
                raise RuntimeError(PARAMETRIZED)
            super().__setattr__(WEIGHT, weight)
            return
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
        if weight.requires_grad and not isinstance(weight, nn.Parameter | SwitchedTable):
            raise RuntimeError(
                "weight: expected a tensor without gradient, which none would reach: the head's "
                "own optimizer steps the table; torch.func.functional_call differentiates a head "
                "with optimizer=None"
            )
        self._updates.rows.weight = weight.detach()
        self._updates.forget()

    @property
    def _table(self) -> Tensor:
        """The same, with rows that may be behind."""
        if isinstance(self._updates, RowUpdates):
            return self._updates.rows.weight
        table = self._parameters[WEIGHT]
        assert table is not None
        return table

    @property
    def bias(self) -> Tensor | None:
        """[c], a number of each of this shard's classes: the last column of `weight`."""
        return self.weight[..., -1] if self.has_bias else None

    @property
    def has_bias(self) -> bool:
        """Whether the table has a column more than the embeddings."""
        return self._table.shape[-1] > self.embedding_dim

    @property
    def plain_scale(self) -> float:
        """The scale as a number, whether it learns or not."""
        return float(self.scale.detach() if isinstance(self.scale, Tensor) else self.scale)

    def multiplied(self, rows: Tensor) -> Tensor:
        """Embeddings [B, D] as the table's rows meet them: units, or with a bias' own unit."""
        if self.normalize:
            return unit_rows(rows)
        if not self.has_bias:
            return rows
        # logits are scale times the product, and a bias comes after that
        return torch.cat([rows, rows.new_full((len(rows), 1), 1 / self.plain_scale)], dim=1)

    @property
    def _leaf(self) -> Tensor:
        """What autograd takes for the table."""
        return getattr(self, SWITCH) if isinstance(self._updates, RowUpdates) else self._table

    def __setattr__(self, name: str, value: Any) -> None:
        arguments.check_set(name, value)
        if "_updates" in self.__dict__:
            self._check_later(name, value)
        if name == WEIGHT:  # nn.Module would register a parameter before it asks the property
            TableModule.weight.__set__(self, value)
        elif name == "margin":
            self._set_margin(value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == WEIGHT:  # torch.nn.utils.parametrize does, before it changes anything
            raise RuntimeError(PARAMETRIZED)
        super().__delattr__(name)

    def _check_later(self, name: str, value: Any) -> None:
        """Raises for what a head that stands cannot become."""
        if name in FIXED:
            raise AttributeError(
                f"{name}: stands since the construction; expected another head, which "
                "centers.carry_over fills from this one"
            )
        if name in ("margin", "normalize"):
            given = {"margin": self.margin, "normalize": self.normalize, name: value}
            arguments.check_bias(self.has_bias, sub_centers=self.sub_centers, **given)
        if name in SMOOTHED:
            checked = ({**{each: getattr(self, each) for each in SMOOTHED}, name: value}).values()
            arguments.check_smoothing(*checked)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As nn.Module's; what waits for `optimizer.step()` is forgotten, too."""
        super().zero_grad(set_to_none)
        if isinstance(self._updates, RowUpdates):
            self._updates.forget()

    def _set_margin(self, margin: Any) -> None:
        """Another margin, whose modules and parameters become the head's; the former's leave."""
        loss = loss_of(
            margin, self.scale, "exact", smoothing=self.label_smoothing
        )  # its own checks, before anything changes
        class_margins.check_numbers(margin, self.num_classes)
        margin = class_margins.of_shard(
            margin, self.num_classes, self.class_start, self.num_local, self.ranks
        )
        fixed = loss.rule == "softmax" and not isinstance(self.scale, Tensor)
        if self.batch_negatives is not None and not fixed:
            raise ValueError("batch_negatives: expected a softmax loss of a fixed scale beside it")
        self._modules.pop("margin", None)  # or nn.Module refuses one that is no module
        self._parameters.pop("margin", None)
        super().__setattr__("margin", margin)
        self.margin_parts = held_by(margin)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TableModule:
        super()._apply(fn, recurse)
        if isinstance(self._updates, RowUpdates):
            rows = self._updates.rows
            moved = fn(rows.weight)
            if moved is not rows.weight:
                rows.weight = moved
        return self

    def _check_wrapped(self) -> None:
        """Raises where each rank would train a table of its own, or DDP would mix their rows."""
        alone = self.ranks.group is None and self.training and torch.is_grad_enabled()
        if alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "process_group: expected a head that is made after torch.distributed is "
                "initialised, got one made before, of which every rank would train a copy of its "
                "own; Lightning has configure_model for it. A head of one rank alone takes a "
                "process_group of it"
            )
        around = DistributedDataParallel._get_active_ddp_module()
        if around is None or self.optimizer is not None or self.ranks.world == 1:
            return
        if any(each is self._table for each in around._module_parameters):
            raise RuntimeError(
                "weight: expected an optimizer beside a head inside DistributedDataParallel, which "
                "overwrites and averages parameters: its rows differ between ranks; got "
                "optimizer=None, for which the head stays outside"
            )

    # ---- state ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Every row catches up with the steps that it took no part in; reading `weight` does it."""
        self._updates.settle()

    def row_states(self) -> dict[str, Tensor]:
        """The optimiser's states of this shard, [c, ...] each, in place."""
        return self._updates.states

    def state(self) -> TableState:
        """What torch.distributed.checkpoint saves, and loads in place: call `load` after that.

        weight and each "optimizer.<name>" as a DTensor over the shards (a plain tensor without
        process group), "margin.<name>" of the averages that a margin keeps, "steps", and beside a
        momentum's buffer "momentum_begun". They share the head's memory; every row has caught up.
        What waits for `optimizer.step()` and the hyper-parameters are not in it: the latter are in
        `optimizer.state_dict()`. A scale that learns is "scale".
        """
        self._steps = torch.tensor(self._updates.steps, device="cpu")

        def named() -> dict[str, Tensor]:
            averages = self.margin_parts or self.margin
            tensors = named_tensors(
                self.weight, self.row_states(), averages, self.ranks, self.num_classes
            )
            begun = self._updates.begun
            self._begun = None if begun is None else torch.tensor(int(begun), device="cpu")
            return tensors if self._begun is None else {**tensors, BEGUN: self._begun}

        found = TableState({**named(), "steps": self._steps})
        if isinstance(self.scale, Tensor):
            found["scale"] = self.scale.detach()
        if isinstance(self._updates, RowUpdates):
            found.make, found.named = self._updates.rows.make_state, named
        return found

    def load(self) -> None:
        """After the tensors of `state()` were loaded in place: goes on from there."""
        if self._steps is None:
            raise RuntimeError("load: expected state() before, whose tensors are loaded in place")
        self._updates.load(int(self._steps), self._begun is not None and bool(self._begun))

    def get_extra_state(self) -> Tensor:
        """[3] int64: the steps, whether momentum has begun, and the first class of this shard."""
        begun = bool(self._updates.begun)
        return torch.tensor([self._updates.steps, begun, self.class_start], device="cpu")

    def set_extra_state(self, state: Tensor | dict[str, Any]) -> None:
        """The same; of older checkpoints the steps alone, or a dict of them and the states."""
        states, steps, begun = read(state, {})
        trouble = anothers(state, self.ranks, self.class_start, self.num_local)
        if trouble is None and isinstance(state, dict):
            trouble = self._unfit(states)
        if trouble is not None:
            raise ValueError(trouble)
        self._updates.fill(states, steps, begun)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch has it; with strict=True all of it is loaded or nothing is."""
        self._strict = strict
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._strict = False

    def _unfit(self, states: Mapping[str, Tensor]) -> str | None:
        if isinstance(self._updates, RowUpdates):
            return self._updates.rows.unfit(states)
        return f"optimizer: expected no states, got {sorted(states)}" if states else None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        table = self.weight
        destination[prefix + WEIGHT] = table if keep_vars else table.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + SWITCH, None)
        for name, state in self.row_states().items():
            destination[prefix + STATES + name] = state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """All of the table's state; or the rows alone, and a word on what is left out.

        Nothing is written where the table's shape is wrong, or the head's own load is strict and
        anything is. Inside a model torch does not tell who is strict, and raises afterwards.
        """
        own = {k: v for k, v in state_dict.items() if _is_own(k.removeprefix(prefix))}
        others = {k: v for k, v in state_dict.items() if k not in own}
        absent: list[str] = []
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs
        )
        mine = {prefix + name for name in (WEIGHT, EXTRA, SWITCH)}
        missing_keys += [key for key in absent if key not in mine]

        extra = own.get(prefix + EXTRA)
        named = {k.removeprefix(prefix + STATES): v for k, v in own.items() if STATES in k}
        states, steps, begun = read(extra, named)
        lost = bool(self._updates.states) or self.sample_rate < 1
        trouble = self._unfit(states) if states or extra is not None else None
        missing = [prefix + WEIGHT] if prefix + WEIGHT not in own else []
        if extra is None and (lost or states):
            missing.append(prefix + EXTRA)
            missing += [prefix + STATES + name for name in self._updates.states if not states]
        given = own.get(prefix + WEIGHT, self._table)
        of_another = anothers(extra, self.ranks, self.class_start, self.num_local)
        if given.shape != self._table.shape or of_another is not None:
            missing_keys += missing
            told = of_another or misshapen(given, self._table, self.ranks, self.num_classes)
            error_msgs.append(f"{prefix}weight: {told}")
            return
        if trouble is not None:
            rows = self._updates.states
            lacking = [prefix + STATES + name for name in rows if name not in states]
            odd = [prefix + STATES + name for name in named if not lacking or name not in rows]
            missing += lacking
            unexpected_keys += odd if odd or lacking else [prefix + EXTRA]
            error_msgs += [trouble] if self._strict else []
        missing_keys += missing
        if self._strict and (trouble is not None or missing):
            return
        if prefix + WEIGHT in own:
            self._write(given, assign=local_metadata.get("assign_to_params_buffers", False))
        if trouble is not None:
            warnings.warn(f"{prefix}{trouble}; left out", stacklevel=2)
        elif extra is not None:
            self._updates.fill(states, steps, begun)

    @torch.no_grad()
    def _write(self, given: Tensor, *, assign: bool) -> None:
        if not assign:
            self.weight.copy_(given)
        elif isinstance(self._updates, RowUpdates):
            self.weight = given
        else:
            self.weight = nn.Parameter(given, requires_grad=self._table.requires_grad)


def _is_own(name: str) -> bool:
    return name in (WEIGHT, EXTRA, SWITCH) or name.startswith(STATES)

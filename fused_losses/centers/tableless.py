"""A module whose table is none of its parameters: what its names and its flag mean to others."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT = "weight"
SWITCH = "trains"  # the parameter without elements that `requires_grad_` freezes the table by
PARAMETRIZED = (
    "weight: expected the table to stay the head's own; its rows are read in parts, which a "
    "parametrization (weight_norm, spectral_norm) does not know: margin_softmax takes such a weight"
)


class TablelessParameters(dict):
    """Of a head whose table is none of them: who takes it from here (torch.nn.utils) is told."""

    def __missing__(self, name: str) -> Tensor:
        raise RuntimeError(PARAMETRIZED) if name == WEIGHT else KeyError(name)

    def __delitem__(self, name: str) -> None:
        if name == WEIGHT:
            raise RuntimeError(PARAMETRIZED)
        super().__delitem__(name)


class SwitchedTable(Tensor):
    """A module's table in other hands: the same memory, and one `requires_grad` with its switch.

    To autograd it is a plain tensor, and so is all that is made of it, copies and pickles too.
    """

    # as nn.Parameter has it
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    _module: weakref.ref[nn.Module]  # a cycle would keep the table's memory
    _table: weakref.ref[Tensor]

    @staticmethod
    def of(table: Tensor, module: nn.Module) -> SwitchedTable:
        shown = torch.Tensor._make_subclass(SwitchedTable, table)
        shown._module, shown._table = weakref.ref(module), weakref.ref(table)
        return shown

    def shows(self, table: Tensor, module: nn.Module) -> bool:
        """Whether it is this table, with the memory that it has now."""
        same = self._table() is table and self._module() is module
        return same and self.data_ptr() == table.data_ptr() and self.dtype == table.dtype

    @property
    def requires_grad(self) -> bool:
        """Whether the module trains it."""
        module = self._module()
        return module is not None and getattr(module, SWITCH).requires_grad

    @requires_grad.setter
    def requires_grad(self, trains: bool) -> None:
        if (module := self._module()) is not None:
            getattr(module, SWITCH).requires_grad = trains

    def requires_grad_(self, requires_grad: bool = True) -> SwitchedTable:
        self.requires_grad = requires_grad
        return self

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, data: Tensor) -> None:
        if (table := self._table()) is not None:
            table.data = data
        vars(torch._C.TensorBase)["data"].__set__(self, data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = made = copy.deepcopy(self.detach(), memo)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)

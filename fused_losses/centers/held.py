"""Modules and parameters inside a margin or a loss that is a plain value, for a head to own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Held(nn.Module):
    """The state of a value by its fields' names: `Softmax(AdaFace())` has "margin.mean".

    What is held stays the value's own: modes, moves and loads change it in place.
    """

    def __init__(self, value: object) -> None:
        super().__init__()
        self._value = value
        for name, part in _fields(value).items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            elif isinstance(part, nn.Module):
                self.add_module(name, part)
            elif (inner := held_by(part)) is not None:
                self.add_module(name, inner)

    def _give_back(self) -> None:
        """A parameter that torch has put in another's place is the value's, too."""
        for name, part in self._parameters.items():
            object.__setattr__(self._value, name, part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Held:
        super()._apply(fn, recurse)
        self._give_back()
        return self

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self._give_back()


def held_by(value: object) -> Held | None:
    """None where the value is a module itself, or holds nothing that trains or is saved."""
    if isinstance(value, nn.Module):
        return None
    held = Held(value)
    return held if held.state_dict() else None


def _fields(value: object) -> dict[str, object]:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {}
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

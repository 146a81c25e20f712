"""Public names that are imported when they are first asked for (PEP 562).

A module whose imports stand under `if TYPE_CHECKING:` says by them where its names are: to type
checkers and linters as ever, and to `late`, which reads them in its code. What a program does not
use is neither imported nor registered with PyTorch.
"""

from __future__ import annotations

import dis
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def late(module: str, *further: ModuleType) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a module, whose `__all__` may name what `further` have."""
    owner = sys.modules[module]
    origins: dict[str, str] = {}

    def find(name: str) -> Any:
        if not origins:
            origins.update(_origins(owner))
        origin = origins.get(name)
        if origin == module:
            return importlib.import_module(f"{module}.{name}")
        if origin is not None:
            return getattr(importlib.import_module(origin), name)
        for other in further:
            if name in owner.__all__ and name in other.__all__:
                return getattr(other, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name, obj=owner)

    def __getattr__(name: str) -> Any:
        value = find(name)
        setattr(owner, name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(owner), *owner.__all__})

    return __getattr__, __dir__


def everything(module: ModuleType) -> None:
    """Imports whatever a module names, as `from module import *` does."""
    for name in module.__all__:
        getattr(module, name)


def _origins(owner: ModuleType) -> dict[str, str]:
    """The names that a module's top level imports from others, and from which."""
    loader = owner.__spec__.loader if owner.__spec__ else None
    code = loader.get_code(owner.__name__)  # pyright: ignore (every loader of code has it)
    found, origin = {}, ""
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            origin = step.argval
        elif step.opname == "IMPORT_FROM":
            found[step.argval] = origin
    return found

"""What `explain` and the code that it runs on shapes alone say to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_told: ContextVar[Callable[[int], None] | None] = ContextVar("told", default=None)
_handed_out: set[Callable[..., Any]] = set()


def explaining() -> bool:
    """Whether tensors have shapes and no values: what depends on values says `needs` instead."""
    # Dynamo knows no context variables, and nobody explains compiled code
    return not torch.compiler.is_compiling() and _told.get() is not None


def needs(workspace_bytes: int) -> None:
    """So much is allocated here, at most, and given back."""
    if explaining():
        told = _told.get()
        assert told is not None
        told(workspace_bytes)


@contextmanager
def heard_by(told: Callable[[int], None]) -> Iterator[None]:
    """Within the block `needs` is heard."""
    token = _told.set(told)
    try:
        yield
    finally:
        _told.reset(token)


def hands_out(fn: Function) -> Function:
    """Marks a function whose result (a matrix, neighbours, a list) is the caller's, not a cost."""
    _handed_out.add(fn)
    return fn


def is_handed_out(fn: Callable[..., Any]) -> bool:
    return fn in _handed_out

"""Which backend runs: `auto` takes the best that can; a forced one that cannot says why.

A backend is a folder here, whose `capability` has `unavailable()` (why it cannot run here at all,
or None) and `reasons_against(device, dtype, precision)` (why it cannot take this call; empty: it
can). What it computes stands with each primitive: `primitives/<primitive>/<backend>.py`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from fused_losses.backends import table

NAMES = ("reference", "cpu", "triton", "cuda", "bounded")

Choice = tuple[str, dict[str, list[str]]]  # who runs, and the reasons against those passed over

_forced_here: ContextVar[str | None] = ContextVar("fused_losses_backend", default=None)
# what `os.environ` looks into, and by what: both as it stores them
_variables: Any = getattr(os.environ, "_data", os.environ)
_VARIABLE: Any = os.environ.encodekey("FUSED_LOSSES_BACKEND")
_forced: list[str] = []  # the same of all threads, which Dynamo can guard on
_warned: set[str] = set()
_watchers: list[list[Choice]] = []


@lru_cache
def capability(name: str) -> ModuleType:
    """What says whether a backend can run."""
    return importlib.import_module(f"{__name__}.{name}.capability")


def module(primitive: str, backend: str) -> ModuleType:
    """A backend's form of a primitive."""
    return importlib.import_module(f"fused_losses.primitives.{primitive}.{backend}")


@lru_cache
def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine at all, or None. Asked once per process."""
    return capability(name).unavailable()


def available() -> dict[str, str]:
    """Each backend's name -> "ok", or the reason why it cannot run here."""
    return {name: unavailable(name) or "ok" for name in NAMES}


def check_name(name: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend: expected auto, {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, and its thread or task, functions without `backend=` run on this backend.

    `torch.compile` sees the block entered last in any thread.
    """
    token = _forced_here.set(check_name(name))
    _forced.append(name)
    try:
        yield
    finally:
        _forced.remove(name)
        _forced_here.reset(token)


@contextmanager
def watched() -> Iterator[list[Choice]]:
    """The choices that are made within the block; nobody is warned of them."""
    _watchers.append([])
    try:
        yield _watchers[-1]
    finally:
        _watchers.pop()


def requested(backend: str | None) -> str:
    """The caller's `backend=`, else `use_backend`, else FUSED_LOSSES_BACKEND, else auto."""
    if backend is None:
        # Dynamo knows no context variables, and of the environment what `os.environ` says
        traced = torch.compiler.is_dynamo_compiling()
        forced = (_forced[-1] if _forced else None) if traced else _forced_here.get()
        # a name that is not set costs `os.environ.get` two exceptions
        if forced is None and not traced and _VARIABLE not in _variables:
            return "auto"
        backend = forced or os.environ.get("FUSED_LOSSES_BACKEND", "auto")
    return check_name(backend)


def unasked(backend: str | None) -> bool:
    """Whether nobody names a backend for a call outside of compiled code, or watches the choice."""
    named = backend is not None or _forced_here.get() is not None or _VARIABLE in _variables
    return not (named or _watchers)


def reasons_against(
    name: str, device: torch.device, dtype: torch.dtype, precision: str
) -> list[str]:
    """Every reason why this backend cannot take such a call; empty when it can."""
    why = unavailable(name)
    return [why] if why else capability(name).reasons_against(device, dtype, precision)


# what torch.compiler.assume_constant_result sets, without its import of torch._dynamo (seconds):
# Dynamo then asks once while it traces, and does not trace into importlib
reasons_against._dynamo_marked_constant = True


def choose(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    operation: str = "row_statistics",
    width: int = 0,
) -> Choice:
    """The backend that runs, and the reasons against those that were passed over.

    operation: of `table.OPERATIONS`; width: D, the size of a row.
    """
    name = requested(backend)
    candidates: tuple[str, ...] = (name,)
    if name == "auto":
        candidates = table.order(operation, device.type, width, dtype.itemsize == 2)
    refused: dict[str, list[str]] = {}
    for candidate in candidates:
        reasons = reasons_against(candidate, device, dtype, precision)
        if not reasons:
            if _watchers:
                _watchers[-1].append((candidate, refused))
            elif name == "auto" and refused:
                _warn_once(candidate, refused)
            return candidate, refused
        refused[candidate] = reasons
    told = "; ".join(f"{who}: {', '.join(why)}" for who, why in refused.items())
    raise RuntimeError(
        f"backend={name!r} cannot run this call (device {device}, {dtype}, "
        f"precision={precision!r}): {told}. fused_losses.backends.available() lists what can "
        f"run here."
    )


def _warn_once(chosen: str, refused: dict[str, list[str]]) -> None:
    key = f"{chosen}:{sorted(refused)}"
    if torch.compiler.is_compiling() or key in _warned:
        return
    _warned.add(key)
    told = "; ".join(f"{who}: {', '.join(why)}" for who, why in refused.items())
    warnings.warn(f"fused_losses runs on its {chosen} path ({told})", stacklevel=4)

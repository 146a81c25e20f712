"""`memory_budget`: bytes of scores that a call may keep from its forward for its backward."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

MemoryBudget = int | Literal["auto"]

SHARE = 8  # "auto" is this part of what is free
MEMORY, GROUP, GROUPS = "/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup"


class Room:
    """What is left of a call's budget, for one sweep after the other."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, size: int) -> None:
        self.left = self.left - size


def budget_of(memory_budget: MemoryBudget, like: Tensor) -> int:
    """The bytes of a `memory_budget`; "auto": an eighth of the memory that is free for the taking.

    That is 0 where nothing will be kept: on other devices than the CPU, without gradients, where
    saved tensors go through hooks (a checkpoint computes them again, others move them away), and
    where the system does not tell. Compiled code takes what was free when it was compiled.
    Raises TypeError or ValueError for what is neither bytes nor "auto".
    """
    if memory_budget == "auto":
        on_cpu = isinstance(like, Tensor) and like.device.type == "cpu"
        return _free_share() if on_cpu and torch.is_grad_enabled() else 0
    check_budget(memory_budget)
    return int(memory_budget)


def check_budget(memory_budget: MemoryBudget) -> None:
    """TypeError or ValueError for what is neither bytes nor "auto"."""
    if memory_budget == "auto":
        return
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, Integral):
        raise TypeError(f"memory_budget: expected bytes or 'auto', got {memory_budget!r}")
    if memory_budget < 0:
        raise ValueError(f"memory_budget: expected bytes >= 0, got {memory_budget}")


def half_of(memory_budget: MemoryBudget, like: Tensor) -> int:
    """Of each of two calls that are one loss together."""
    return budget_of(memory_budget, like) // 2


def room_of(memory_budget: MemoryBudget, like: Tensor) -> Room | None:
    """Room for what a call's sweeps keep, None: nothing."""
    if type(memory_budget) is int and memory_budget == 0:
        return None  # what most calls say
    budget = budget_of(memory_budget, like)
    return Room(budget) if budget else None


def less_of(left: int, wanted: int) -> int:
    """What is kept where there is room for so many: a number, or of a symbol a symbol."""
    if isinstance(left, int) and isinstance(wanted, int):
        return min(left, wanted)  # torch 2.11 compiles no sym_min of two numbers
    kept: Any = torch.sym_min(left, wanted)
    return kept


def _free_share() -> int:
    return 0 if _hooked() else free_bytes() // SHARE


# torch.compiler.assume_constant_result, whose import of Dynamo takes seconds
_free_share._dynamo_marked_constant = True


def _hooked() -> bool:
    """Whether hooks see what autograd saves here."""
    private: Any = torch._C  # no stub knows of it
    look = getattr(private._autograd, "_top_saved_tensors_default_hooks", None)
    return look is not None and look(True) is not None


def free_bytes() -> int:
    """What the system and this process's control group have free for the taking; 0: not told."""
    found = [*_of_system(), *_of_group()]
    return max(0, min(found)) if found else 0


def _of_system() -> list[int]:
    with suppress(OSError, ValueError):
        return [1024 * _named(MEMORY, b"MemAvailable:")]
    return []


def _of_group() -> list[int]:
    """What a limit leaves, files that can be dropped not counted; [] without a limit."""
    group = _group()
    if group is None:
        return []
    with suppress(OSError, ValueError):
        limit, used = (int(_read(f"{group}/memory.{name}")) for name in ("max", "current"))
        return [limit - used + _named(f"{group}/memory.stat", b"inactive_file")]
    return []


@lru_cache
def _group() -> str | None:
    """This process's control group if it has a limit, or the root that a container sees for it."""
    with suppress(OSError):
        own = [line[3:] for line in _read(GROUP).splitlines() if line.startswith(b"0::/")]
        for group in [f"{GROUPS}{path.decode().rstrip('/')}" for path in own] + [GROUPS]:
            with suppress(OSError):
                if _read(f"{group}/memory.max").strip() != b"max":
                    return group
    return None


def _named(path: str, name: bytes) -> int:
    """The number behind a name."""
    told = _read(path)
    at = told.index(name) + len(name)
    return int(told[at : told.index(b"\n", at)].split()[0])


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(1 << 16)

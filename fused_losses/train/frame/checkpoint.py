"""Checkpoints that a crash can't spoil: written beside the former one, then put in its place."""

from __future__ import annotations

import random
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_losses.base.files import write_atomically
from fused_losses.base.saved import check_all_owned, check_saved
from fused_losses.train.frame.files import RunFileError

SMALL_STATE = 64 * 2**20  # bytes up to which every step is written
LARGE_STATE_SECONDS = 60.0


def save(path: Path, state: Any) -> None:
    """Write a tree of dicts, lists, tensors and plain values."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path) -> Any:
    """What `save` wrote, on the CPU; runs no code from the file.

    RunFileError for a damaged file: each of its parts must have the checksum that was written.
    """
    try:
        check_saved(path)
        with zipfile.ZipFile(path) as parts:
            bad = parts.testzip()
        if bad is None:
            state = torch.load(path, map_location="cpu", weights_only=True)
            check_all_owned(state, "the state")
            return state
        told = f"{bad} is not as it was written"
    except FileNotFoundError:
        raise
    # a damaged file can fail in any way
    except Exception as error:
        told = str(error).partition("\n")[0].removeprefix(f"{path}: ")
    raise RunFileError(f"{path}: damaged ({told}); without it this part of the run is done again")


def state_bytes(node: Any) -> int:
    """Bytes of the tensors of a tree."""
    if isinstance(node, Tensor):
        return node.numel() * node.element_size()
    if isinstance(node, dict):
        return sum(state_bytes(value) for value in node.values())
    if isinstance(node, (list, tuple)):
        return sum(state_bytes(value) for value in node)
    return 0


OPTIMIZERS: dict[type[Optimizer], set[str]] = {
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


def load_optimizer(optimizer: Optimizer, saved: Any) -> None:
    """`optimizer.load_state_dict`; ValueError for what a later step would trip over."""
    former = optimizer.state_dict()
    before = [_options(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
        _check_optimizer(optimizer, before)
    except Exception:
        optimizer.load_state_dict(former)
        raise


def _check_optimizer(optimizer: Optimizer, before: list[dict[str, Any]]) -> None:
    for options, group in zip(before, optimizer.param_groups, strict=True):
        for name, value in _options(group).items():
            had = options.get(name, value)
            if type(value) is not type(had) or value != had:
                raise ValueError(f"{name}: expected {had!r}, got {str(value)[:40]}")
    for parameter, state in optimizer.state.items():
        if state.keys() != OPTIMIZERS[type(optimizer)]:
            names = ", ".join(sorted(OPTIMIZERS[type(optimizer)]))
            raise ValueError(f"expected states {names}, got {', '.join(map(str, state))[:80]}")
        for name, value in state.items():
            if value is None and name == "momentum_buffer":
                continue  # before the first step
            shape = torch.Size(()) if name == "step" else parameter.shape
            if not isinstance(value, Tensor) or value.shape != shape:
                raise ValueError(f"{name}: expected a tensor of shape {tuple(shape)}")


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What the configuration says, and no schedule changes."""
    return {name: value for name, value in group.items() if name not in ("params", "lr")}


def random_state() -> dict[str, Any]:
    """The generators that a backbone or a margin may draw from."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [str(kind), [int(key) for key in keys], *rest]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(state["numpy"]))


class Schedule:
    """When to write: every `every` steps, or for 0 every step while small, else by the clock."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.last = time.monotonic()

    def due(self, step: int, size: int) -> bool:
        """Whether to write after `step` steps are done, the state being `size` bytes."""
        if self.every:
            return step % self.every == 0
        return size <= SMALL_STATE or time.monotonic() - self.last >= LARGE_STATE_SECONDS

    def written(self) -> None:
        self.last = time.monotonic()

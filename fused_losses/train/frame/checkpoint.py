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

from fused_losses.base.files import write_atomically
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
        with zipfile.ZipFile(path) as parts:
            bad = parts.testzip()
        if bad is None:
            return torch.load(path, map_location="cpu", weights_only=True)
        told = f"{bad} is not as it was written"
    except FileNotFoundError:
        raise
    # a damaged file can fail in any way
    except Exception as error:
        told = str(error).partition("\n")[0]
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

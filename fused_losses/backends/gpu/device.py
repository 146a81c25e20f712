"""What a launcher asks of a device: its row in the tile tables, its processors."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def architecture(device: torch.device) -> str:
    """Which row of the tile tables a device uses."""
    if device.type == "cpu":
        return "interpret"
    if torch.version.hip:
        return "gfx942"
    return table_row(torch.cuda.get_device_capability(device))


def table_row(capability: tuple[int, int]) -> str:
    """The row of the tile tables of an NVIDIA GPU."""
    # 8.6, 8.9 and 12 (which has not the instructions of sm_100) compile to tighter code than 8.0
    other = "sm_80" if capability == (8, 0) else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], other)


def processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


# of a matrix that is stored for library products, a chunk at a time: few chunks, whose launches
# cost less than a tenth of their work (roofline.md), and more bytes than stay in L2
STORED_BYTES = 256 << 20
STORED_SHARE = 256  # of the device's memory: 96 MiB of 24 GiB
FEW_BYTES, CHUNKS = 32 << 20, 16  # of a small matrix; of a larger one there are so many chunks


def stored_bytes(device: torch.device, whole: int) -> int:
    """What a chunk of a stored matrix of `whole` bytes takes on a device, at most.

    Of the memory that it has, not of what is free: a chunk's sums are the same bits in every run.
    """
    most = min(STORED_BYTES, max(FEW_BYTES, ceil_div(whole, CHUNKS)))
    if device.type != "cuda" or not torch.cuda.is_available():
        return most
    return min(most, torch.cuda.get_device_properties(device).total_memory // STORED_SHARE)


def first(arguments: Iterable[Any]) -> Tensor | None:
    """The first tensor of a launch's arguments, of groups too."""
    for argument in arguments:
        found = first(argument) if isinstance(argument, tuple) else argument
        if isinstance(found, Tensor):
            return found
    return None


def current(arguments: Iterable[Any]) -> AbstractContextManager:
    """Makes the device of a launch's first tensor the current one: what is launched runs there."""
    tensor = first(arguments)
    return torch.cuda.device(-1 if tensor is None else tensor.device)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def from_column(tensor: Tensor | None, first: int) -> Tensor | None:
    return None if tensor is None else tensor[first:]

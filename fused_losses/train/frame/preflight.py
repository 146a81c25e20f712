"""What can be known to fail before a run has a folder: each names the option that asks for it."""

from __future__ import annotations

import importlib.util
import os

import torch

from fused_losses import backends
from fused_losses.train.frame.options import OptionError


def check_machine(name: str, tensorboard: bool) -> None:
    """OptionError for a device that does not work here, or TensorBoard that is not installed."""
    try:
        # a device without values ("meta") has none to read either
        torch.zeros(1, device=torch.device(name)).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        told = str(error).partition("\n")[0]
        text = f"expected a device that works here, got {name!r} ({told})"
        raise OptionError("device", text) from error
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        text = "the package tensorboard is not installed: pip install tensorboard"
        raise OptionError("tensorboard", text)


def check_backend(backend: str, device: str, precision: str, dtype: torch.dtype) -> str:
    """The backend that will run; OptionError where none can."""
    asked = None if backend == "auto" else backend
    try:
        return backends.choose(asked, torch.device(device), dtype, precision)[0]
    except (ValueError, RuntimeError) as error:
        raise OptionError("backend", str(error)) from error


def check_room(option: str, rows: int, width: int, dtype: torch.dtype, room: int) -> None:
    """OptionError for a table that `room` bytes have no place for."""
    size = rows * width * dtype.itemsize
    if size > room:
        text = (
            f"{rows} rows of {width} take {size / 2**30:.4g} GiB, where {room / 2**30:.4g} GiB is "
            "all there is"
        )
        raise OptionError(option, text)


def memory_of(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

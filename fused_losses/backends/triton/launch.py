"""What the Triton launchers share: where kernels come from, and the one launch.

Every launch goes through `launch`, so that a test can compile or execute exactly what a GPU gets.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu import rehearsal
from fused_losses.backends.gpu.tiles import Tile


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def kernel(place: str) -> Any:
    """The kernel `primitive.module.name`, imported when first asked for: triton is optional."""
    module, _, name = place.rpartition(".")
    return getattr(import_module(f"fused_losses.primitives.{module}"), name)


@cache
def shared_kernel(place: str) -> Any:
    """The kernel `module.name` of this folder, of no primitive's own."""
    module, _, name = place.rpartition(".")
    return getattr(import_module(f"fused_losses.backends.triton.{module}"), name)


def changed(arguments: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments, those of groups (NamedTuples) too, each changed."""
    if not isinstance(arguments, tuple):
        return change(arguments)
    values = [changed(a, change) for a in arguments]
    return type(arguments)(*values) if hasattr(arguments, "_fields") else tuple(values)


def by_name(kernel: Any, args: tuple, constants: dict[str, Any]) -> dict[str, Any]:
    """A launch's arguments by name, those of groups too: `x` and `x.bias`."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    for name, group in list(values.items()):
        if hasattr(group, "_fields"):
            values |= {f"{name}.{field}": value for field, value in group._asdict().items()}
    return values


def options(tile: Tile) -> dict[str, Any]:
    """What decides the machine code beside a kernel's arguments.

    Products and the sums that they go into are fused, as Triton's default is before 3.10.
    """
    return dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)


def launch(kernel: Any, programs: int, args: tuple, constants: dict[str, Any], tile: Tile) -> None:
    """Runs a kernel on the device of its tensors, on that device's current stream."""
    if (hears := rehearsal.heard()) is not None:
        hears(kernel, args, constants, options(tile))
        return
    if interpreted():
        import triton  # an optional package

        # the interpreter of Triton 3.6 cannot use its own integers as loop bounds under numpy 2.4;
        # later ones can, and that of 3.9 stores no sum that begins with a constant
        if triton.__version__.startswith("3.6."):
            constexpr = triton.language.constexpr
            args = changed(args, lambda a: constexpr(a) if isinstance(a, int) else a)
        kernel[(programs,)](*args, **constants, **options(tile))
        return
    # Triton itself launches on the current device, wherever its tensors are
    with gpu_device.current(args):
        kernel[(programs,)](*args, **constants, **options(tile))

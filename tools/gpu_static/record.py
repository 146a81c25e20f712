"""What the Triton launchers would give a GPU: their launches, recorded for one architecture.

The host code runs as it is, on tensors without data or on CPU tensors;
`fused_losses.backends.triton.launch.launch` alone is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.bench.roofline.trace import pretended

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942",)
SIZES = ("BM", "BN", "BK", "BD", "BT")  # constants that are a tile's


def table_row(arch: str) -> str:
    """The row of the tile tables that a device of this architecture uses."""
    if not arch.startswith("sm_"):
        return arch
    return gpu_device.table_row(divmod(int(arch[3:]), 10))


def on(arch: str, launch: Callable[..., None], processors: int = 132) -> AbstractContextManager:
    """The host code believes in a GPU of this architecture and launches through `launch`."""
    return pretended(table_row(arch), processors, launch)


@dataclass(frozen=True)
class Compilation:
    """One specialisation of one kernel: what decides the machine code."""

    kernel: str  # module.function
    signature: tuple
    constants: tuple  # by name, or by such a place
    attributes: tuple  # places of the arguments that 16 divides, paths into groups of them
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return self.kernel.rsplit(".", 1)[1]


def specialise(kernel: Any, args: tuple, constants: dict, tile: Any) -> Compilation:
    """The specialisation that Triton's own launcher makes of these arguments."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    signature, const, attributes = {}, {}, []

    def kind(value: Any, place: tuple[int, ...], varies: bool = False) -> Any:
        """The type of an argument, or of each in a group, where nothing is exempt."""
        if isinstance(value, tuple):
            return type(value)(*(kind(v, (*place, i)) for i, v in enumerate(value)))
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes.append(place)
            return TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value is None or (value == 1 and not varies):
            const[place] = value
            return "constexpr"
        if value % 16 == 0 and not varies:
            attributes.append(place)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for index, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr:
            signature[param.name], const[param.name] = "constexpr", value
        else:
            signature[param.name] = kind(value, (index,), param.do_not_specialize)
    name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
    items = tuple(signature.items()), tuple(const.items()), tuple(attributes)
    return Compilation(name, *items, tile.warps, tile.stages)


def launches(arch: str, run: Callable[[], Any], processors: int = 132) -> list[Compilation]:
    """The distinct kernels that `run` launches, in their order."""
    found: dict[Compilation, None] = {}

    def launch(kernel: Any, programs: int, args: tuple, constants: dict, tile: Any) -> None:
        assert 0 < programs < 2**31
        found[specialise(kernel, args, constants, tile)] = None

    with on(arch, launch, processors):
        run()
    return list(found)

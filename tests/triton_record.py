"""What the Triton launchers would give a GPU: recorded launches, compiled ahead of time.

The host code runs as it is, on tensors without data or on CPU tensors, for an architecture of
choice; `fused_losses.backends.triton_launch.launch` alone is replaced.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fused_losses import validation
from fused_losses.backends import triton as backend
from fused_losses.backends import triton_launch
from fused_losses.inputs import Inputs, Needs, RowGradients

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@contextmanager
def on(arch: str, launch: Callable, processors: int = 132) -> Iterator[None]:
    """The host code believes in a GPU of this architecture and launches through `launch`."""
    saved = triton_launch.launch, triton_launch.architecture, triton_launch.processors
    checks = validation.check_labels, validation.check_classes, validation.check_labels_in_classes
    triton_launch.launch = launch
    triton_launch.architecture = lambda device: arch
    triton_launch.processors = lambda device: processors
    validation.check_labels = validation.check_classes = lambda *a, **k: None
    validation.check_labels_in_classes = lambda *a, **k: None
    try:
        yield
    finally:
        triton_launch.launch, triton_launch.architecture, triton_launch.processors = saved
        validation.check_labels, validation.check_classes = checks[:2]
        validation.check_labels_in_classes = checks[2]


@dataclass(frozen=True)
class Compilation:
    """One specialisation of one kernel: what decides the machine code."""

    kernel: str
    signature: tuple
    constants: tuple
    attributes: tuple
    warps: int
    stages: int


def specialise(kernel: Any, args: tuple, constants: dict, tile: Any) -> Compilation:
    """The specialisation that Triton's own launcher makes of these arguments."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    signature, const, attributes = {}, {}, []
    for index, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr or value is None:
            signature[param.name], const[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes.append(index)
        elif value == 1 and not param.do_not_specialize:
            signature[param.name], const[param.name] = "constexpr", 1
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes.append(index)
    name = f"{kernel.fn.__module__.rsplit('.', 1)[1]}.{kernel.fn.__name__}"
    items = tuple(signature.items()), tuple(const.items()), tuple(attributes)
    return Compilation(name, *items, tile.warps, tile.stages)


@cache
def compiled(arch: str, key: Compilation) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    modules = {m.__name__.rsplit(".", 1)[1]: m for m in triton_launch.kernels()}
    module, name = key.kernel.split(".")
    attrs = {(i,): [["tt.divisibility", 16]] for i in key.attributes}
    source = ASTSource(
        getattr(modules[module], name), dict(key.signature), dict(key.constants), attrs
    )
    options = dict(num_warps=key.warps, num_stages=key.stages)
    return triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=options)


def record(arch: str, run: Callable[[], Any], processors: int = 132) -> dict[Compilation, int]:
    """The distinct kernels that `run` launches, with how many programs in all."""
    found: dict[Compilation, int] = {}

    def launch(kernel: Any, programs: int, args: tuple, constants: dict, tile: Any) -> None:
        key = specialise(kernel, args, constants, tile)
        found[key] = found.get(key, 0) + programs

    with on(arch, launch, processors):
        run()
    return found


def steps(
    n: int,
    c: int,
    d: int,
    dtype: torch.dtype,
    precision: str = "fp32",
    normalize: bool = True,
    extra: bool = False,
    classes: int = 0,
) -> Callable[[], Any]:
    """A forward and a backward on tensors without data."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def run() -> None:
        x, weight = empty(n, d, dtype=dtype), empty(c, d, dtype=dtype)
        labels = empty(n, dtype=torch.int64)
        ids = empty(classes, dtype=torch.int64) if classes else None
        bias = empty(c, dtype=dtype) if extra else None
        v = empty(c) if extra else None
        shared = (x, weight, labels, ids, bias, v)
        inputs = Inputs(*shared, normalize, extra, precision)
        backend.forward(inputs)
        grads = empty(n), empty(n), empty(n) if extra else None
        needs = Needs(True, True, extra)
        backend.backward(inputs, empty(n), RowGradients(*grads), needs)

    return run


@dataclass(frozen=True)
class Resources:
    """What the machine code takes, read from the binary."""

    registers: int
    spills: int
    shared: int
    tensor_memory: int
    products: int
    locks: int


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


PRODUCTS = {
    "sm_80": r"\bHMMA",
    "sm_90": r"\bHGMMA",
    "sm_100": r"\bUTC\w*MMA",
    "gfx942": r"\bv_mfma",
}


@cache
def resources(arch: str, key: Compilation) -> Resources:
    binary = compiled(arch, key)
    shared = binary.metadata.shared
    if arch == "gfx942":
        text = binary.asm["amdgcn"]
        spills = sum(int(m) for m in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text))
        # scalar registers spill into lanes of vector registers, not to memory
        return Resources(
            int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
            spills + int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1]),
            shared,
            0,
            len(re.findall(PRODUCTS[arch], text)),
            len(re.findall(r"_atomic_|_cmpswap", text)),
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        cuobjdump = [tool("cuobjdump"), file.name]
        usage, sass = (
            subprocess.run([*cuobjdump, flag], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage)
    return Resources(
        int(found[1]),
        int(found[2]) + int(found[3]) + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared,
        getattr(binary.metadata, "tmem_size", 0) or 0,
        len(re.findall(PRODUCTS[arch], sass)),
        len(re.findall(r"\b(?:ATOM|ATOMG|RED|REDG)\b", sass)),
    )

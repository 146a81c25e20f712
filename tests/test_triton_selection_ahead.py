"""Compiles what a GPU would be given for distances and the top-k: no spills, it fits, no locks.

As `test_triton_ahead.py`: the host code runs on tensors without data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_selection_record as record

from fused_losses.backends import triton_launch

pytest.importorskip("triton")
if triton_launch.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

KIB = 1024
# what one block may ask for; a block of gfx942 has its 64 KiB of LDS
SHARED = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
TENSOR_MEMORY = 512  # columns of an sm_100
NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MULTIPLY = ("distance_tiles", "product_gradients", "best_columns", "key_tiles")
EVERYTHING = dict(everything=True, match="different", center=True)
ODD = dict(n=4095, m=8191)  # rows of the output that are not whole vectors
Call = tuple[tuple[str, ...], Callable[..., Any], dict[str, Any]]
CALLS: dict[str, Call] = {
    "euclidean": (NVIDIA + AMD, record.distances, dict(kind="euclidean", d=128, dtype=BF16)),
    "fp32": (NVIDIA + AMD, record.distances, dict(kind="euclidean", d=100, dtype=FP32)),
    "odd": (("sm_90",), record.distances, dict(kind="euclidean", d=128, dtype=FP32, **ODD)),
    "fp16": (("sm_80",), record.distances, dict(kind="sqeuclidean", d=100, dtype=FP16)),
    "tf32": (
        ("sm_90",),
        record.distances,
        dict(kind="euclidean", d=128, dtype=FP32, precision="tf32"),
    ),
    "bf16": (
        ("sm_100",),
        record.distances,
        dict(kind="euclidean", d=128, dtype=FP32, precision="bf16"),
    ),
    "dot": (("sm_80", "gfx942"), record.distances, dict(kind="dot", d=128, dtype=BF16)),
    "topk": (NVIDIA + AMD, record.screens, dict(keep=128, d=128, dtype=BF16, everything=True)),
    "topk-few": (("sm_90",), record.screens, dict(keep=17, d=512, dtype=BF16, match="same")),
    "topk-uneven": (NVIDIA, record.screens, dict(keep=128, d=100, dtype=BF16, **EVERYTHING)),
    "topk-fp32": (NVIDIA + AMD, record.screens, dict(keep=128, d=128, dtype=FP32, **EVERYTHING)),
    "topk-fp32-uneven": (
        ("sm_80", "sm_90"),
        record.screens,
        dict(keep=128, d=100, dtype=FP32, **EVERYTHING),
    ),
    "topk-bf16": (
        NVIDIA,
        record.screens,
        dict(keep=128, d=100, dtype=FP32, precision="bf16", **EVERYTHING),
    ),
    "topk-int8": (
        ("sm_80", "sm_90"),
        record.screens,
        dict(keep=26, d=128, dtype=BF16, y_dtype=torch.int8, everything=True),
    ),
    "topk-stored": (NVIDIA + AMD, record.screens, dict(keep=200, d=100, dtype=FP32, **EVERYTHING)),
    "topk-stored-bf16": (("sm_100",), record.screens, dict(keep=200, d=128, dtype=BF16)),
}
RUNS = [(name, arch) for name, (archs, _, _) in CALLS.items() for arch in archs]


def keys(name: str, arch: str, **changes: Any) -> list[record.Compilation]:
    _, steps, options = CALLS[name]
    return record.launches(arch, steps(**(options | changes)))


@pytest.mark.parametrize("name, arch", RUNS)
def test_machine_code(name: str, arch: str) -> None:
    for key in keys(name, arch):
        got = record.resources(arch, key)
        kernel = key.kernel.split(".")[1]
        assert got.spills == 0, (kernel, got)
        assert got.shared <= SHARED[arch], (kernel, got)
        assert got.tensor_memory <= TENSOR_MEMORY, (kernel, got)
        assert got.locks == 0, (kernel, got)
        assert (got.products > 0) == (kernel in MULTIPLY), (kernel, got)


@pytest.mark.parametrize("arch", NVIDIA + AMD)
@pytest.mark.parametrize("name", ("euclidean", "topk"))
def test_width_decides_nothing_that_is_compiled(name: str, arch: str) -> None:
    """So that the machine code of D = 128 stands for every wider one."""
    want = keys(name, arch)
    assert all(keys(name, arch, d=d) == want for d in (256, 768, 1024))


def test_sizes_decide_nothing_that_is_compiled() -> None:
    """Another batch, another k and another list of exclusions do not compile anew."""
    want = keys("topk", "sm_90")
    assert keys("topk", "sm_90", n=1000, m=70001, keep=100) == want
    want = keys("euclidean", "sm_90")
    assert keys("euclidean", "sm_90", n=1024, m=512) == want


@pytest.mark.parametrize("name", ("euclidean", "topk", "topk-stored"))
def test_offsets_are_64_bit(name: str) -> None:
    """No offset of a row is a 32-bit product: those of tensors multiply in 64 bits only."""
    for key in keys(name, "sm_90"):
        text = record.compiled("sm_90", key).asm["ttir"]
        products = re.findall(r"arith\.muli .*?: (\S+)", text)
        assert not [p for p in products if p.startswith("tensor") and p.endswith("xi32>")], key

"""Compiles what a GPU would be given, without one: no spills, it fits, tensor cores, no locks.

The host code runs on tensors without data at 1024 x 1,000,000 classes; each distinct kernel that it
launches is compiled and its machine code read with cuobjdump (NVIDIA) or as assembly (AMD).
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton_record as record

from fused_losses.backends import triton as backend

pytest.importorskip("triton")
if backend.base.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

KIB = 1024
# what one block may ask for; a block of gfx942 has its 64 KiB of LDS
SHARED = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
TENSOR_MEMORY = 512  # columns of an sm_100
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CALLS: dict[str, dict[str, Any]] = {
    "D512": dict(d=512, dtype=BF16),
    "D512-classes": dict(d=512, dtype=BF16, classes=100_000),
    "D512-everything": dict(d=512, dtype=BF16, extra=True, classes=100_000),
    "D500-linear": dict(d=500, dtype=FP16, normalize=False),
    "D512-fp32": dict(d=512, dtype=FP32, extra=True),
    "D512-mixed": dict(d=512, dtype=FP32, precision="mixed"),
    "D512-bf16": dict(d=512, dtype=FP32, precision="bf16"),
    "D256-everything": dict(d=256, dtype=BF16, extra=True),
    "D128": dict(d=128, dtype=BF16),
    "D128-bf16-everything": dict(d=128, dtype=FP32, precision="bf16", extra=True),
}
WITH_PRODUCTS = ("forward_tiles", "gradient_tiles", "owner_rows", "owner_classes")


def keys(name: str, arch: str) -> list[record.Compilation]:
    return list(record.record(arch, record.steps(1024, 1_000_000, **CALLS[name])))


@pytest.mark.parametrize("arch", record.TARGETS)
@pytest.mark.parametrize("name", CALLS)
def test_machine_code(name: str, arch: str) -> None:
    for key in keys(name, arch):
        got = record.resources(arch, key)
        kernel = key.kernel.split(".")[1]
        assert got.spills == 0, (kernel, got)
        assert got.shared <= SHARED[arch], (kernel, got)
        assert got.tensor_memory <= TENSOR_MEMORY, (kernel, got)
        assert got.locks == 0, (kernel, got)
        assert (got.products > 0) == (kernel in WITH_PRODUCTS), (kernel, got)


@pytest.mark.parametrize("name", ("D512-everything", "D128-bf16-everything"))
def test_offsets_are_64_bit(name: str) -> None:
    """No offset of a row is a 32-bit product: those of tensors multiply in 64 bits only."""
    for key in keys(name, "sm_90"):
        text = record.compiled("sm_90", key).asm["ttir"]
        products = re.findall(r"arith\.muli .*?: (\S+)", text)
        assert not [p for p in products if p.startswith("tensor") and p.endswith("xi32>")], key


def test_tiles_of_one_batch_fit_another() -> None:
    """The number of rows decides nothing that is compiled."""
    small, large = (
        {key for key in record.record("sm_90", record.steps(n, 1_000_000, d=512, dtype=BF16))}
        for n in (1000, 1024)
    )
    assert small == large

"""Compiles what a GPU would be given for pairs: no spills, it fits, tensor cores, no locks.

As `test_triton_ahead.py`: the host code runs on tensors without data, 4096 x 8192 pairs.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton_pair_record as record

from fused_losses.backends import triton_pairs as backend

pytest.importorskip("triton")
if backend.base.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

KIB = 1024
# what one block may ask for; a block of gfx942 has its 64 KiB of LDS
SHARED = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
TENSOR_MEMORY = 512  # columns of an sm_100
NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MANY = dict(biases=True, ids=True, groups=True, windows=True, root=True, reach=1.0)
EVERYTHING = dict(**MANY, cols=True, exclude=3, skip_self=True)
CALLS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "rows": (NVIDIA[1:], dict(d=512, dtype=BF16, biases=True)),
    "both": (NVIDIA, dict(d=512, dtype=BF16, biases=True, cols=True)),
    "everything": (NVIDIA + AMD, dict(d=512, dtype=BF16, **EVERYTHING)),
    "triangle": (NVIDIA + AMD, dict(d=512, dtype=BF16, triangle=True, **MANY)),
    "attention": (
        NVIDIA + AMD,
        dict(d=512, dtype=BF16, attention=512, exclude=3, skip_self=True, **MANY),
    ),
    "softplus-uneven": (("sm_90",), dict(d=500, dtype=FP16, reduction="softplus", **EVERYTHING)),
    "fp32": (("sm_80", "gfx942"), dict(d=512, dtype=FP32, **EVERYTHING)),
    "fp32-attention": (("sm_90",), dict(d=512, dtype=FP32, attention=512, biases=True)),
    "mixed": (("sm_100",), dict(d=512, dtype=FP32, precision="mixed", **EVERYTHING)),
    "tf32": (("sm_90",), dict(d=512, dtype=FP32, precision="tf32", triangle=True, **MANY)),
    "bf16": (("sm_80",), dict(d=512, dtype=FP32, precision="bf16", cols=True)),
}
RUNS = [(name, arch) for name, (archs, _) in CALLS.items() for arch in archs]


def keys(name: str, arch: str, **changes: Any) -> list[record.Compilation]:
    return record.launches(arch, record.steps(4096, 8192, **(CALLS[name][1] | changes)))


@pytest.mark.parametrize("name, arch", RUNS)
def test_machine_code(name: str, arch: str) -> None:
    for key in keys(name, arch):
        got = record.resources(arch, key)
        kernel = key.kernel.split(".")[1]
        assert got.spills == 0, (kernel, got)
        assert got.shared <= SHARED[arch], (kernel, got)
        assert got.tensor_memory <= TENSOR_MEMORY, (kernel, got)
        assert got.locks == 0, (kernel, got)
        assert (got.products > 0) == (kernel != "merge_tiles"), (kernel, got)


@pytest.mark.parametrize("arch", NVIDIA + AMD)
@pytest.mark.parametrize("name", ("everything", "attention", "fp32"))
def test_width_decides_nothing_that_is_compiled(name: str, arch: str) -> None:
    """So that the machine code of D = 512 stands for every width."""
    widths = (64, 128, 768, 1024)
    want = keys(name, arch)
    assert all(keys(name, arch, d=d) == want for d in widths)


def test_values_decide_nothing_that_is_compiled() -> None:
    """A margin schedule, another batch or another list of exclusions does not compile anew."""
    want = keys("everything", "sm_90")
    assert keys("everything", "sm_90", exclude=16) == want
    other = CALLS["everything"][1] | dict(reach=3.0)
    assert record.launches("sm_90", record.steps(4100, 9000, **other)) == want


@pytest.mark.parametrize("name", ("everything", "triangle", "attention"))
def test_offsets_are_64_bit(name: str) -> None:
    """No offset of a row is a 32-bit product: those of tensors multiply in 64 bits only."""
    for key in keys(name, "sm_90"):
        text = record.compiled("sm_90", key).asm["ttir"]
        products = re.findall(r"arith\.muli .*?: (\S+)", text)
        assert not [p for p in products if p.startswith("tensor") and p.endswith("xi32>")], key

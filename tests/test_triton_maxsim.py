"""MaxSim on Triton without a GPU: interpreted, compiled ahead, and its very PTX executed.

The cases are in `triton_maxsim_cases.py`, which runs in its own process: Triton reads
TRITON_INTERPRET when imported. The PTX emulator lies beside the project (../shared/ptxsim).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreted

pytest.importorskip("triton")

import triton_maxsim_record as record  # noqa: E402
import triton_record  # noqa: E402
from triton_maxsim_cases import (  # noqa: E402
    BACKWARD,
    Case,
    backward_truth,
    check_forward,
    close,
    inputs,
)

from fused_losses.backends import triton_maxsim as backend  # noqa: E402

if backend.base.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

HERE = Path(__file__).parent
PTXSIM = HERE.parents[1] / "shared" / "ptxsim"
KIB = 1024
# what one block may ask for; a block of gfx942 has its 64 KiB of LDS
SHARED = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ONE_QUERY = (1, 32, 1000, 256)
CALLS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "128": (tuple(SHARED), dict(d=128, dtype=BF16)),
    "96": (tuple(SHARED), dict(d=96, dtype=BF16)),
    "768": (tuple(SHARED), dict(d=768, dtype=BF16)),
    "one-query": (("sm_90",), dict(d=128, dtype=BF16, shape=ONE_QUERY)),
    "uneven": (("sm_80",), dict(d=770, dtype=FP16)),
    "fp32": (("sm_80", "gfx942"), dict(d=128, dtype=FP32)),
}
RUNS = [(name, arch) for name, (archs, _) in CALLS.items() for arch in archs]


def test_interpreted() -> None:
    triton_interpreted.passes("triton_maxsim_cases.py")


@pytest.mark.parametrize("name, arch", RUNS)
def test_machine_code(name: str, arch: str) -> None:
    """No spills, it fits, tensor cores, no locks and no atomics."""
    kernels = set()
    for key in record.launches(arch, record.steps(**CALLS[name][1])):
        got = record.with_kernels(triton_record.resources, arch, key)
        kernel = key.kernel.split(".")[1]
        kernels.add(kernel)
        assert got.spills == 0, (kernel, got)
        assert got.shared <= SHARED[arch], (kernel, got)
        assert got.tensor_memory <= 512, (kernel, got)
        assert got.locks == 0, (kernel, got)
        multiplies = kernel in ("token_maxima", "document_gradients")
        assert (got.products > 0) == multiplies, (kernel, got)
    assert len(kernels) == 4


def test_sizes_decide_nothing_that_is_compiled() -> None:
    """Another batch does not compile anew."""
    want = record.launches("sm_90", record.steps(128, BF16))
    assert record.launches("sm_90", record.steps(128, BF16, shape=(33, 17, 29, 301))) == want


@pytest.mark.parametrize("d", (128, 768))
def test_offsets_are_64_bit(d: int) -> None:
    """No offset of a row is a 32-bit product: those of tensors multiply in 64 bits only."""
    for key in record.launches("sm_90", record.steps(d, BF16)):
        text = record.with_kernels(triton_record.compiled, "sm_90", key).asm["ttir"]
        products = re.findall(r"arith\.muli .*?: (\S+)", text)
        assert not [p for p in products if p.startswith("tensor") and p.endswith("xi32>")], key


# more than one tile of tokens each way, ragged; whole tokens and pieces, with and without a tail
PTX = [
    ("sm_80", Case((3, 0, 70), (5, 0, 70, 1, 2), 40, BF16)),
    ("sm_80", Case((30,), (3, 40, 1, 2, 1), 144)),
    ("sm_90", Case((3, 0, 70), (5, 0, 70, 1, 2), 64, BF16)),
    ("sm_90", Case((30,), (70, 1, 0, 2, 3), 130, FP16)),
    ("sm_90", Case((30,), (70, 1, 0, 2, 3), 32, precision="tf32")),
]


@pytest.mark.skipif(not PTXSIM.is_dir(), reason="ptxsim is absent: no PTX is executed here")
@pytest.mark.parametrize("arch, case", PTX, ids=lambda v: v if isinstance(v, str) else str(v.d))
def test_ptx(arch: str, case: Case) -> None:
    from test_triton_ptx import simulate

    before, reports = list(sys.path), []
    texts = inputs(case)
    try:
        with triton_record.on(arch, simulate(int(arch[3:]), reports)):
            scores, index = backend.forward(*texts, case.precision)
            grad = torch.randn(scores.shape)
            found = backend.backward(grad, index, *texts, True, True)
    finally:
        sys.path[:] = before
    check_forward(case, scores, index, *texts)
    for got, want in zip(found, backward_truth(case, grad, index, *texts[:2]), strict=True):
        close(got, want, BACKWARD[case.dtype], "gradient")
    products = ("wgmma", "mma.sync") if arch == "sm_90" else ("mma.sync",)
    assert len(reports) == 4
    for name, report in reports:
        assert report.coverage() > 0.8, (name, report.coverage())
        if name in ("token_maxima", "document_gradients"):
            assert any(op.startswith(products) for op in report.opcodes()), name

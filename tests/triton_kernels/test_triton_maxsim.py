"""MaxSim on Triton without a GPU: its very PTX executed, on cases of `triton_maxsim_cases.py`.

The PTX emulator lies beside the project (../shared/ptxsim).
"""

from __future__ import annotations

import sys

import pytest
import torch
from places import SHARED

pytest.importorskip("triton")

from triton_maxsim_cases import (
    BACKWARD,
    Case,
    backward_truth,
    check_forward,
    close,
    inputs,
)

from fused_losses.backends.triton import launch as triton_launch
from fused_losses.primitives.maxsim import triton as backend
from fused_losses.primitives.maxsim.inputs import MaxsimInputs, MaxsimNeeds
from tools.gpu_static import record

if triton_launch.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

PTXSIM = SHARED / "ptxsim"
BF16, FP16 = torch.bfloat16, torch.float16


# more than one tile of tokens each way, ragged; whole tokens and pieces, with and without a tail
PTX = [
    ("sm_80", Case((3, 0, 70), (5, 0, 70, 1, 2), 40, BF16)),
    ("sm_80", Case((30,), (3, 40, 1, 2, 1), 144)),
    ("sm_90", Case((3, 0, 70), (5, 0, 70, 1, 2), 64, BF16)),
    ("sm_90", Case((30,), (70, 1, 0, 2, 3), 130, FP16)),
    ("sm_90", Case((30,), (70, 1, 0, 2, 3), 32, precision="tf32")),
]


@pytest.mark.ptx
@pytest.mark.skipif(not PTXSIM.is_dir(), reason="ptxsim is absent: no PTX is executed here")
@pytest.mark.parametrize("arch, case", PTX, ids=lambda v: v if isinstance(v, str) else str(v.d))
def test_ptx(arch: str, case: Case) -> None:
    from simulated import simulate

    before, reports = list(sys.path), []
    texts = inputs(case)
    try:
        with record.on(arch, simulate(int(arch[3:]), reports)):
            scores, index = backend.forward(MaxsimInputs(*texts, case.precision))
            grad = torch.randn(scores.shape)
            found = backend.backward(grad, index, MaxsimInputs(*texts), MaxsimNeeds(True, True))
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

"""Executes the very PTX of the kernels of `divergence`, for sm_80 and sm_90, against float64."""

from __future__ import annotations

import pytest
import torch
from simulated import _on_the_path, simulate  # noqa: F401
from triton_divergence_oracle import Case, call, forward_and_gradients, truth

from tools.gpu_static import record

pytestmark = pytest.mark.ptx

BF16, FP16 = torch.bfloat16, torch.float16
EVERYTHING = dict(normalize=True, extra=True, classes=60)
# more than one tile each way, both ragged; D even and uneven for the tile, aligned and not
CASES = [
    Case("forward", n=140, c=90, d=64, teacher_d=64, dtype=BF16, name="plain"),
    Case("jensen_shannon", n=40, c=90, d=40, dtype=FP16, **EVERYTHING, name="everything"),
    Case("reverse", n=20, c=70, d=27, teacher_d=13, dtype=FP16, name="unaligned"),
    Case("bernoulli", n=70, c=48, d=32, teacher_d=32, near=20, name="float32"),
    Case("power", n=33, c=70, d=32, dtype=BF16, dense=True, extra=True, name="dense"),
]


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_ptx(case: Case, arch: str) -> None:
    p, reports = call(case), []
    want, grads, of_inputs = truth(p)
    with record.on(arch, simulate(int(arch[3:]), reports), 2):
        out, got = forward_and_gradients(p, grads)
    for index, (g, w) in enumerate(zip((*out[:4], *out[4]), want, strict=False)):
        assert (g - w).abs().max() <= 2**-19 * w.abs().max(), index
    step = {BF16: 2**-8, FP16: 2**-11}.get(case.dtype, 2**-20)
    for name, g in got.items():
        w = of_inputs[name]
        assert (g.double() - w).abs().max() <= 8 * step * w.abs().max(), name
    ran = {name for name, _ in reports}
    assert {"divergence_runs", "side_gradient"} <= ran
    assert ("share_runs" in ran) == (case.kind == "jensen_shannon")
    products = ("wgmma", "mma.sync") if arch == "sm_90" else ("mma.sync",)
    for name, report in reports:
        if name in ("divergence_runs", "share_runs", "side_gradient"):
            assert any(op.startswith(products) for op in report.opcodes()), name
            assert report.coverage() > 0.8, (name, report.coverage())

"""Executes the very PTX that a GPU would get, for sm_80 and sm_90, on the CPU, against float64.

The emulator lies beside the project (../shared/ptxsim) and is not part of it. Out-of-bounds and
misaligned accesses, shared and global races, and waits that are too weak are faults.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_oracle as oracle
from simulated import _on_the_path, simulate  # noqa: F401
from triton_oracle import DTYPE_STEP, Case, call

from fused_losses.primitives.row_statistics import triton as backend
from fused_losses.primitives.row_statistics.inputs import Inputs, Needs, RowGradients
from tools.gpu_static import record

pytestmark = pytest.mark.ptx

EVERYTHING = dict(weighted=True, bias=True, column_weight=True, no_target=0.1, bend="jump")
# more than one tile each way, both ragged; D even and uneven for the tile, aligned and not
CASES = [
    Case(n=137, c=300, d=64, dtype=torch.bfloat16, name="plain", scale=16.0),
    Case(n=70, c=150, d=40, dtype=torch.float16, classes=90, **EVERYTHING, name="everything"),
    Case(n=40, c=130, d=27, dtype=torch.float16, normalize=False, name="unaligned"),
    Case(n=40, c=90, d=40, scale=64.0, name="float32"),
    Case(n=33, c=70, d=32, precision="tf32", name="tf32"),
    Case(n=33, c=70, d=32, precision="bf16", bias=True, name="rounded"),
    Case(n=33, c=70, d=32, bend="jump", name="bent"),
]


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_ptx(case: Case, arch: str) -> None:
    data, reports = call(case), []
    args, grads = data["args"], data["grads"]
    launch = simulate(int(arch[3:]), reports)
    with record.on(arch, launch):
        out = backend.forward(Inputs(**args))
    step = {"tf32": 2**-10, "bf16": 2**-8}.get(case.precision, 2**-22)
    names = ("lse", "target", "weighted_sum", "hardest", "hardest_score")
    want = oracle.truth(args)
    for name, g, w in zip(names, out, want, strict=True):
        if name == "hardest":
            assert case.precision != "fp32" or torch.equal(g, w)
        elif name != "weighted_sum" or case.weighted:
            assert (g - w).abs().max() <= 4 * step * w.abs().max(), name
    want, eager = (oracle.gradients(args, grads, t) for t in (torch.float64, args["x"].dtype))
    if case.classes:
        want[1], eager[1] = want[1][args["classes"]], eager[1][args["classes"]]
    step = max(step, DTYPE_STEP[args["x"].dtype])
    for processors in (10**6, 0):
        with record.on(arch, launch, processors):
            needs = Needs(True, True, case.bias, compact=True)
            got = backend.backward(Inputs(**args), out[0], RowGradients(*grads), needs)
        for g, w, e in zip(got, want, eager, strict=True):
            if w is not None:
                allowed = 6 * step * w.abs().max() + (e.double() - w).abs().max()
                assert (g.double() - w).abs().max() <= allowed
    ran = {name for name, _ in reports}
    assert {"forward_tiles", "forward_rows", "gradient_tiles"} <= ran
    # G over a short row's length is none in float16: normalised rows take the stored form
    if case.dtype == torch.bfloat16 or (case.dtype == torch.float16 and not case.normalize):
        assert {"owner_rows", "owner_classes"} <= ran
    products = ("wgmma", "mma.sync") if arch == "sm_90" else ("mma.sync",)
    for name, report in reports:
        if name in ("forward_tiles", "gradient_tiles", "owner_rows", "owner_classes"):
            assert any(op.startswith(products) for op in report.opcodes()), name
            assert report.coverage() > 0.8, (name, report.coverage())


RESIDENT = [
    Case(n=240, c=150, d=512, dtype=torch.bfloat16, scale=16.0, name="D512"),
    Case(n=256, c=100, d=384, dtype=torch.float16, classes=70, no_target=0.1, name="D384"),
    Case(n=256, c=75, d=128, dtype=torch.bfloat16, normalize=False, name="D128"),
]


@pytest.mark.parametrize("case", RESIDENT, ids=lambda c: c.name)
def test_resident_rows(case: Case) -> None:
    args, reports = call(case)["args"], []
    with record.on("sm_90", simulate(90, reports), 2):
        out = backend.forward(Inputs(**args))
    for index, (g, w) in enumerate(zip(out, oracle.truth(args), strict=True)):
        if index != 2:
            assert (g - w).abs().max() <= 2**-20 * w.abs().max().clamp_min(1)
    (report,) = (r for name, r in reports if name == "forward_resident")
    assert any(op.startswith("wgmma.mma_async") for op in report.opcodes())
    assert report.coverage() > 0.9


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_merged_segments(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES[1], n=20, c=600, classes=0)
    monkeypatch.setattr(backend, "PARTIAL_BYTES", 4 * 4 * 20 * 2)
    args, reports = call(case)["args"], []
    with record.on(arch, simulate(int(arch[3:]), reports)):
        out = backend.forward(Inputs(**args))
    assert "merge_tiles" in {name for name, _ in reports}
    for g, w in zip(out, oracle.truth(args), strict=True):
        assert (g - w).abs().max() <= 2**-20 * w.abs().max().clamp_min(1)

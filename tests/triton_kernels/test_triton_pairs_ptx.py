"""Executes the very PTX of the kernels over pairs, sm_80 and sm_90, on the CPU, against float64.

The emulator lies beside the project (../shared/ptxsim) and is not part of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_losses.backends.triton import launch as triton_launch
from fused_losses.primitives.pairs import reference as truth
from fused_losses.primitives.pairs import triton as backend
from fused_losses.primitives.pairs.inputs import NEGATIVE, PairNeeds, Rule
from tools.gpu_static import record

pytest.importorskip("triton")
if triton_launch.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import apart_cases
from apart_cases import Apart

# both skip, saying why, where ptxsim is absent
from simulated import _on_the_path, simulate  # noqa: F401
from triton_pair_checks import Case, close, gradients, inputs, leaves_of

pytestmark = pytest.mark.ptx

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MANY = dict(labels=5, biases=True, ids=30, groups=3, windows=True)
# more than one tile each way, ragged, and D even and uneven for the tile
CASES = [
    Case(n=137, m=200, d=64, dtype=BF16, labels=9, cols=True, name="both-sides"),
    Case(n=70, m=90, d=40, dtype=FP16, cols=True, exclude=2, **MANY, name="everything"),
    Case(n=150, d=64, dtype=BF16, triangle=True, labels=7, biases=True, name="triangle"),
    Case(
        n=70,
        m=50,
        d=27,
        root=True,
        labels=4,
        reduction="softplus",
        positive=Rule(-1.0, 0.5, 9.0),
        name="float32-distance",
    ),
    Case(n=66, m=70, d=32, precision="bf16", reduction="relu", skip_self=True, name="rounded"),
    Case(n=70, m=90, d=64, dtype=BF16, values=64, biases=True, name="attention"),
]


# every case on one of the two; the last on both
RUNS = [(case, ("sm_90", "sm_80")[i % 2]) for i, case in enumerate(CASES)] + [(CASES[-1], "sm_90")]


@pytest.mark.parametrize("case, arch", RUNS, ids=lambda v: getattr(v, "name", v))
def test_ptx(case: Case, arch: str) -> None:
    p, values = inputs(case)
    reports: list[tuple[str, Any]] = []
    launch = simulate(int(arch[3:]), reports)
    exact = leaves_of(p, torch.float64)[0]
    needs = PairNeeds(True, not case.triangle, True, p.x_bias is not None, p.y_bias is not None)
    low = BF16 if case.precision == "bf16" else case.dtype
    step = {FP32: 2**-21, BF16: 2**-8, FP16: 2**-11}[low]
    with record.on(arch, launch):
        if case.values:
            got = backend.attention(values, p, case.positives)
            want = truth.attention(values.double(), exact, case.positives)
            steps = step, 2**-20
        else:
            got = backend.statistics(p, case.reduction, case.cols)
            want = truth.statistics(exact, case.reduction, case.cols)
            steps = (step if case.precision == "bf16" else 2**-20,) * 2
        want = [t.detach() for t in want]
        for a, b, allowed in zip(got, want, steps, strict=True):
            close(a, b, None, allowed, "forward")
        g = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=g, dtype=torch.float64).float() for t in want]
        if case.values:
            options = (*grads, *got, values, p, case.positives, True, needs)
            found = backend.attention_backward(*options)
        else:
            grads = [t[:2].double() for t in grads]
            options = (*grads, *got, p, case.reduction, case.cols, needs)
            found = backend.statistics_backward(*options)
    grads = [t.double() for t in grads]
    _, want = gradients(case, p, values, grads, torch.float64)
    _, eager = gradients(case, p, values, grads, low)
    for a, b, e in zip(found, want, eager, strict=True):
        if b is not None:
            close(a, b, e, step, "gradient")
    products = ("wgmma", "mma.sync") if arch == "sm_90" else ("mma.sync",)
    for name, report in reports:
        assert report.coverage() > 0.6, (name, report.coverage())
        if name not in ("merge_tiles", "finish_vectors", "gradient_vectors"):
            assert any(op.startswith(products) for op in report.opcodes()), name


# squared distances, G without its near pairs, and their sums
APART = [
    (Apart(n=70, m=90, d=40, dtype=BF16, cols=True, labels=4), "sm_90"),
    (Apart(data="partners", n=70, d=27, triangle=True, labels=4, root=True), "sm_80"),
    (Apart(data="partners", n=70, m=66, d=32, values=32), "sm_90"),
]


@pytest.mark.parametrize("case, arch", APART, ids=lambda v: getattr(v, "name", v))
def test_apart_ptx(case: Apart, arch: str) -> None:
    reports: list[tuple[str, Any]] = []
    with record.on(arch, simulate(int(arch[3:]), reports)):
        apart_cases.check(case, backend)
    for name, report in reports:
        # where no tile has near pairs a kernel leaves at once
        assert report.coverage() > 0.6 or name.startswith("near"), (name, report.coverage())
    assert {"split_tiles", "near_sums", "near_distances"} <= {name for name, _ in reports}


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_several_blocks(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A triangle in several blocks: the tiles that are skipped are not merged either."""
    monkeypatch.setattr(backend, "SWEEP_ROWS", 128)
    monkeypatch.setattr(backend, "PARTIAL_BYTES", 1)
    case = Case(n=300, d=16, dtype=BF16, triangle=True)
    p, _ = inputs(case)
    reports: list[tuple[str, Any]] = []
    with record.on(arch, simulate(int(arch[3:]), reports)):
        rows, _ = backend.statistics(p, "lse", False)
    assert "merge_tiles" in {name for name, _ in reports}
    want, _ = truth.statistics(leaves_of(p, torch.float64)[0], "lse", False)
    close(rows[:, NEGATIVE], want[:, NEGATIVE].detach(), None, 2**-20, "rows")

"""Executes the PTX of `class_rules` on Triton, for sm_80 and sm_90, on the CPU, against float64."""

from __future__ import annotations

import pytest
import torch
from simulated import _on_the_path, simulate  # noqa: F401
from triton_class_oracle import BEST, SFACE, SOFT, SPHERE, SUMMED, Case, answer, call
from triton_oracle import DTYPE_STEP

from fused_losses.primitives.class_rules import triton as form
from fused_losses.primitives.class_rules.inputs import ClassInputs
from tools.gpu_static import record

pytestmark = pytest.mark.ptx

# more than one tile each way, both ragged; D even and uneven for the tile, aligned and not
CASES = [
    Case(n=70, c=150, d=64, dtype=torch.bfloat16, many=3, name="several labels"),
    Case(n=70, c=90, d=64, dtype=torch.bfloat16, classes=70, name="best", **BEST, **SPHERE),
    Case(n=70, c=70, d=40, dtype=torch.float16, many=2, name="soft", **SOFT, **SUMMED),
    Case(n=40, c=70, d=27, dtype=torch.float16, normalize=False, name="unaligned", **SPHERE),
    Case(n=33, c=70, d=32, name="float32", **BEST, **SFACE),
    Case(n=33, c=70, d=32, precision="bf16", name="rounded", **SFACE),
]


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_ptx(case: Case, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, reports = call(case), []
    p, launch = ClassInputs(**made.args), simulate(int(arch[3:]), reports)
    # two segments
    monkeypatch.setattr(form, "PARTIAL_BYTES", 4 * 5 * case.n)
    with record.on(arch, launch):
        out = form.forward(p)
        given = made.of_statistics, made.of_targets, out.statistics, p
        got = *out, *form.backward(*given, True, True, True)
    want, eager = answer(made, torch.float64), answer(made, p.weight.dtype)
    if p.classes is not None:
        rows = (p.classes[:, None] * p.centers + torch.arange(p.centers)).flatten()
        want, eager = (*want[:5], want[5][rows]), (*eager[:5], eager[5][rows])
    low = 2**-8 if case.precision == "bf16" else 2**-22
    for i, (g, w, e) in enumerate(zip(got, want, eager, strict=True)):
        if i == 2:
            assert low > 2**-22 or torch.equal(g, w)
            continue
        step = low if i < 4 else max(low, DTYPE_STEP[p.weight.dtype])
        if case.rule == "sface":  # sigmoid' <= 1/4 of k times an angle's error, here a cosine's
            step += case.params[0] / 4 * max(3e-7, low if low > 2**-22 else 0) / 6
        allowed = 6 * step * w.abs().max() + (0 if i < 4 else (e.double() - w).abs().max())
        assert (g.double() - w).abs().max() <= allowed, form.__name__ + str(i)
    ran = {name for name, _ in reports}
    assert {"forward_classes", "merge_classes", "gradient_classes"} <= ran
    products = ("wgmma", "mma.sync") if arch == "sm_90" else ("mma.sync",)
    for name, report in reports:
        if name in ("forward_classes", "gradient_classes"):
            assert any(op.startswith(products) for op in report.opcodes()), name
            assert report.coverage() > 0.8, (name, report.coverage())

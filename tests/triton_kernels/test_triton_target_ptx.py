"""The kernels of labels and ends of margin softmaxes as PTX, executed in the emulator."""

from __future__ import annotations

import pytest
import torch
from simulated import _on_the_path, simulate  # noqa: F401

from fused_losses.backends.triton import target_loss as kernels
from fused_losses.base.checked_labels import no_target
from fused_losses.base.target_loss import TargetEnd
from fused_losses.functions import target_end
from fused_losses.margins import ArcFace, CosFace
from tools.gpu_static import record

pytestmark = pytest.mark.ptx


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100"))
@pytest.mark.parametrize("margin", (None, CosFace(0.35), ArcFace(0.5)))
def test_ptx(arch: str, margin: ArcFace | CosFace | None) -> None:
    n, scale, reports = 37, 30.0, []
    lse = torch.randn(n, dtype=torch.float64) * scale
    target = (torch.rand(n, dtype=torch.float64) * 2 - 1) * scale
    labels = torch.randint(0, 9, (n,)).index_fill(0, torch.tensor([0, 5]), -100)
    with record.on(arch, simulate(int(arch[3:]), reports)):
        named, fine = kernels.label_names(labels, 9, -100, torch.int64)
        _, wrong = kernels.label_names(labels, 8 if (labels == 8).any() else 1, -100, torch.int32)
        end = TargetEnd(scale, target_end._moved(margin), True)
        loss, slopes = kernels.losses(lse, target, named, end)
    assert torch.equal(named, no_target(labels, -100)) and fine.item() and not wrong.item()
    lse.requires_grad_()
    target.requires_grad_()
    want = target_end._formula(
        lse, target, labels=named, margin=margin, scale=scale, reduction="mean"
    )
    along = torch.stack(torch.autograd.grad(want, (lse, target)))
    assert torch.allclose(loss.double(), want.double(), rtol=1e-6)
    assert torch.allclose(slopes, along, rtol=1e-9, atol=1e-12)
    assert [name for name, _ in reports] == ["target_labels", "target_labels", "target_losses"]

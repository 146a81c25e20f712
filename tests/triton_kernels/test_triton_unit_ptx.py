"""The kernels of unit rows as PTX, executed in the emulator, against PyTorch's form in float64."""

from __future__ import annotations

import pytest
import torch
from simulated import _on_the_path, simulate  # noqa: F401

from fused_losses.backends.triton import unit_rows
from fused_losses.base import unit_norm
from tools.gpu_static import record

pytestmark = pytest.mark.ptx

# a sum of D terms, a root and a quotient in float32, and a rounding of the result
ROUNDED = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-8 + 2.0**-19}


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100"))
@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    ((37, 72, torch.float32), (19, 64, torch.bfloat16), (5, 600, torch.bfloat16)),
)
def test_ptx(arch: str, n: int, d: int, dtype: torch.dtype) -> None:
    scale = torch.tensor([1.0, 1e20, 1e-20, 0.0]).repeat(n)[:n, None]
    x, grad, reports = (torch.randn(n, d) * scale).to(dtype), torch.randn(n, d).to(dtype), []
    with record.on(arch, simulate(int(arch[3:]), reports)):
        u, dx = unit_rows.forward(x), unit_rows.backward(x, grad)
    wide = x.double()
    want, slope = unit_norm._forward(wide), unit_norm._backward(wide, grad.double())
    assert ((u.double() - want).abs() <= ROUNDED[dtype] * want.abs() + 1e-38).all()
    norm = wide.norm(dim=1, keepdim=True)
    along = grad.double().norm(dim=1, keepdim=True) * want.abs() + grad.double().abs()
    size = (along / norm).nan_to_num(0)
    assert ((dx.double() - slope).abs() <= ROUNDED[dtype] * 2 * size + 1e-38).all()
    assert [name for name, _ in reports] == ["unit_forward", "unit_backward"]

"""Products by PyTorch, whatever CPU it runs on."""

from __future__ import annotations

import pytest
import torch

from fused_losses.base.products import product


@pytest.mark.parametrize("d", [1, 5, 34, 75, 128])
def test_a_row_of_nan_spoils_no_other(d: int) -> None:
    """Nor a gradient: there N and M are the inner dimension."""
    x, y = torch.randn(301, d).bfloat16(), torch.randn(11, d).bfloat16()
    x[3] = torch.nan
    x.requires_grad_(), y.requires_grad_()
    found = product(x, y)
    assert found.isnan().any(dim=1).nonzero().flatten().tolist() == [3]
    up = torch.ones_like(found)
    up[7] = torch.nan
    (dx,) = torch.autograd.grad(found, x, up)
    assert dx.isnan().any(dim=1).nonzero().flatten().tolist() == [7]

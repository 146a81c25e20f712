"""What the compiled kernels of `row_statistics` need."""

from __future__ import annotations

import torch

from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.row_statistics.inputs import Inputs, Needs


def workspace_bytes(n: int, d: int, dtype: torch.dtype, precision: str) -> int:
    """Peak memory of forward and backward beyond inputs and gradients."""
    return extension().row_workspace(n, d, dtype.itemsize, precision != "fp32")


def workspace(p: Inputs, needs: Needs | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward, which has fewer."""
    n, d = p.x.shape
    return workspace_bytes(n, d, p.weight.dtype, p.precision)

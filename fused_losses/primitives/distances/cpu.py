"""What the compiled kernels of the distances need, told by the plan that they allocate by."""

from __future__ import annotations

import torch

from fused_losses.backends.cpu.capability import extension


def extra_bytes(
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    kind: str,
    precision: str = "fp32",
    gradient: bool = True,
) -> int:
    """Peak memory beyond inputs, result and their gradients; of the forward alone if so wanted."""
    return extension().distance_workspace(n, m, d, dtype.itemsize, kind, precision, gradient)

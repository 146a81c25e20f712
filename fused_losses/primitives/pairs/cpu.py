"""What the compiled kernels over pairs need, told by the plan that they allocate by."""

from __future__ import annotations

import torch

from fused_losses.backends.cpu.capability import extension


def extra_bytes(
    n: int, m: int, d: int, dtype: torch.dtype, precision: str = "fp32", width: int = 0
) -> int:
    """Peak memory of forward and backward beyond inputs and the gradients of both sides.

    width: of the values, in an attention. With everything asked for.
    """
    return extension().pair_workspace(n, m, d, dtype.itemsize, precision, width)

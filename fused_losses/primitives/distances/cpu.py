"""What the compiled kernels of the distances need, told by the plan that they allocate by."""

from __future__ import annotations

import torch

from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.distances.inputs import DistanceInputs, DistanceNeeds


def workspace_bytes(
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


def workspace(p: DistanceInputs, needs: DistanceNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    (n, d), m = p.x.shape, p.y.shape[0]
    return workspace_bytes(n, m, d, p.x.dtype, p.kind, p.precision, needs is not None)

"""What the compiled kernels of listed pairs need, told by the plan that they allocate by."""

from __future__ import annotations

from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.listed.inputs import ListedInputs


def workspace(p: ListedInputs, backward: bool) -> int:
    """Bytes beyond inputs and outputs, at most."""
    (n, d), m, count = p.x.shape, p.others.shape[0], p.rows.shape[0]
    size = p.x.dtype.itemsize
    return extension().listed_workspace(n, m, d, count, size, p.y is None, backward)

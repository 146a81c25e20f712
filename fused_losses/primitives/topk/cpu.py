"""What the compiled kernels of the selection need, told by the plan that they allocate by."""

from __future__ import annotations

import torch

from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.topk.inputs import TopkInputs


def workspace_bytes(
    n: int,
    d: int,
    k: int,
    dtype: torch.dtype,
    triangle: bool,
    late: bool = False,
    heads: tuple[int, int, int] = (0, 0, 0),
) -> int:
    """Peak memory of `select` beyond its inputs and what it returns.

    triangle: rows against themselves without i == j, of which half the pairs are taken. late:
    codes screen, and candidates wait to be scored. heads: coordinates of the first level, levels
    behind it and axes, where these screen.
    """
    return extension().topk_workspace(n, d, k, dtype.itemsize, triangle, late, *heads)


def workspace(p: TopkInputs) -> int:
    """Bytes beyond inputs and outputs, at most."""
    # of which half the pairs are taken
    triangle = p.symmetric and p.skip_self
    n, d = p.x.shape
    heads = (0, 0, 0)
    if p.heads is not None and p.heads_rest is not None and p.heads_axes is not None:
        heads = (p.heads.shape[1], p.heads_rest.shape[1], p.heads_axes.shape[1])
    return workspace_bytes(n, d, p.k, p.x.dtype, triangle, p.codes is not None, heads)

"""What the compiled kernels of the distances need."""

from __future__ import annotations

import torch

from fused_losses.backends.cpu.blocks import BLOCK_COLUMNS, BLOCK_ROWS, up
from fused_losses.primitives.distances.inputs import PRODUCTS
from fused_losses.primitives.pairs.cpu import extra_bytes as pair_bytes

FACTORS = 2 * 68 * 256  # elements of a thread's tiles, of the gradient of a sum over coordinates


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
    threads, size = torch.get_num_threads(), 8 if dtype == torch.float64 else 4
    panel = 256 // size
    widened = (8 if gradient else 4) * (n + m) * d if dtype.itemsize == 2 else 0
    vectors = (n + up(m, panel)) * size
    if kind not in PRODUCTS:
        forward = threads * 2 * d * panel * size
        backward = (FACTORS + d * panel) * threads * size + n * d * size * (kind == "canberra")
        return max(forward, backward if gradient else 0) + vectors + widened
    narrowed = 2 * n * d if precision == "bf16" else 0
    if not gradient:
        return threads * 2 * d * panel * size + vectors + narrowed + widened
    # near pairs of a block stand apart
    near = min(n, BLOCK_ROWS + 192) * min(m, BLOCK_COLUMNS) * size
    return pair_bytes(n, m, d, dtype, precision) + near + vectors

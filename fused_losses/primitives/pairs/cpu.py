"""What the compiled kernels over pairs need."""

from __future__ import annotations

import torch

from fused_losses.backends.cpu.blocks import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    DEPTH_CHUNK,
    TILE_BYTES,
    TILE_COLUMNS,
    up,
)


def extra_bytes(
    n: int, m: int, d: int, dtype: torch.dtype, precision: str = "fp32", width: int = 0
) -> int:
    """Peak memory of forward and backward beyond inputs and the gradients of both sides.

    width: of the values, in an attention. The backward's plan, with everything asked for; the
    forward's is smaller.
    """
    size = 8 if dtype == torch.float64 else 4
    panel = 256 // size  # of the widest vectors
    score_pair = 2 if precision == "bf16" else 1  # elements in a word
    gradient_pair = 2 if precision in ("bf16", "mixed") else 1
    tile_rows = min(max(TILE_BYTES // (max(d, 1) * 4) // 12 * 12, 24), 192)
    tall = min(BLOCK_ROWS // tile_rows, -(-n // tile_rows)) * tile_rows
    wide = min(BLOCK_COLUMNS, up(m, panel))
    words = -(-n // gradient_pair)
    turned = (-(-words // DEPTH_CHUNK) | 1) * DEPTH_CHUNK

    def operands(features: int) -> int:
        """Elements that a block's products read and write, for rows of so many features."""
        depth = -(-features // score_pair)
        left = n * depth if score_pair == 2 else 0
        right = wide * depth + -(-wide // gradient_pair) * up(features, panel)
        return left + right + features * (turned + wide)

    elements = operands(d) + tall * wide + 8 * (n + m)
    elements += -(-wide // TILE_COLUMNS) * tall + -(-tall // tile_rows) * wide
    if width:
        elements += operands(width) + tall * wide + n * width + 2 * n
    elements += torch.get_num_threads() * (5 * tile_rows * TILE_COLUMNS + tile_rows + 320)
    # 16-bit inputs are widened, and their gradients come in float32
    widened = 8 * ((n + m) * d + (n + m) * width) if dtype.itemsize == 2 else 0
    return elements * size + widened

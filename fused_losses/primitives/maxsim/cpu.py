"""What the compiled kernels of MaxSim need."""

from __future__ import annotations

import torch

from fused_losses.backends.cpu.blocks import QUERY_BYTES


def extra_bytes(
    query_tokens: int, document_tokens: int, d: int, dtype: torch.dtype, precision: str = "fp32"
) -> int:
    """The same of MaxSim, besides the index that its forward keeps."""
    narrowed = 2 * document_tokens * d if precision == "bf16" else 0
    widened = 8 * (query_tokens + document_tokens) * d if dtype.itemsize == 2 else 0
    return torch.get_num_threads() * max(QUERY_BYTES, 256 * d) + narrowed + widened

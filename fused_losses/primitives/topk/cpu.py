"""What the compiled kernels of the selection need."""

from __future__ import annotations

import torch

from fused_losses.backends.cpu.blocks import up

CANDIDATE_BYTES, CANDIDATES_BYTES, MOST_QUERIES = 16, 16 << 20, 8192

BANK_BYTES = 256 << 10  # of the bank in a tile


def extra_bytes(
    n: int, d: int, k: int, dtype: torch.dtype, triangle: bool, late: bool = False
) -> int:
    """Peak memory of `selection.select` beyond its inputs and what it returns.

    triangle: rows against themselves without i == j, of which half the pairs are taken. late:
    codes screen, and candidates wait to be scored.
    """
    panel = 64
    kept = max(2 * k, k + 64) if late else k
    padded = up(max(n, 1), panel)
    queries = max(CANDIDATES_BYTES, 4 * n * d) // (kept * CANDIDATE_BYTES) // panel * panel
    triangle = triangle and padded <= queries
    queries = padded if triangle else min(max(queries, panel), min(padded, MOST_QUERIES))
    tile = min(max(BANK_BYTES // (max(d, 1) * 4), 24), 384)
    shared = queries * (4 * d + kept * CANDIDATE_BYTES + 25) + 4096
    shared += 20 * queries + 4 * n * d if triangle else 0
    each = 4 * queries + 4 * panel * d + 16 * (tile + kept + d + 256)
    rows = 0 if triangle else 4 * tile * d
    widened = 4 * n * d if dtype.itemsize == 2 else 0
    return shared + torch.get_num_threads() * (each + rows) + widened

"""How the compiled kernels cut a matrix of scores into blocks, as csrc/cpu cuts it."""

from __future__ import annotations

TILE_COLUMNS, BLOCK_COLUMNS, BLOCK_ROWS, DEPTH_CHUNK = 192, 1152, 1920, 512

TILE_BYTES = 384 << 10  # of X in a tile

QUERY_BYTES = 256 << 10  # of MaxSim's packed query tokens, a thread


def up(value: int, step: int) -> int:
    return -(-value // step) * step

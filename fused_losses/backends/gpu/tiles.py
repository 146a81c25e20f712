"""A tile and a table of tiles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    depth: int
    warps: int = 8
    stages: int = 3


@dataclass(frozen=True)
class Table:
    """`tiles[kernel, products]`; kernel: forward, forward_extra (bias, weighted, bends), gradient,
    gradient_extra, gradient_bent (where bends and one of the others spill there), and owner_rows,
    owner_classes up to D = 128, owner_*wide up to 256; products: half (16-bit operands), rounded
    (float32 in memory, bfloat16 products), tf32, tf32x3 (ieee where the chip has no split
    products). No owner entry: the form with stored G is used."""

    tiles: dict[tuple[str, str], Tile]
    chunk_bytes: int  # of W that two kernels in a row should find in L2
    # of the stored G: with what its products read and write beside it, it must stay in L2
    # (docs/roofline.md: at twice as much, 1024 x 1,000,000 x 512 moves four times its floor
    # through the DRAM of an A100 or an H100)
    ds_bytes: int

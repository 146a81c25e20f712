"""A tile of a kernel's work, and tables of tiles: by kernel and products, one an architecture."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.product import Product

ALL = ("half", "rounded", "tf32", "tf32x3")


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    depth: int
    warps: int = 8
    stages: int = 3


# by kernel and products: half (16-bit operands), rounded (float32 in memory, bfloat16 products),
# tf32, tf32x3 (ieee where the chip has no split products)
Tiles = dict[tuple[str, str], Tile]


def by_kernel(**kernels: dict[str, Tile]) -> Tiles:
    return {(kernel, p): tile for kernel, row in kernels.items() for p, tile in row.items()}


def same(tile: Tile, *products: str) -> dict[str, Tile]:
    return dict.fromkeys(products, tile)


def wide(half: Tile, tf32: Tile, tf32x3: Tile) -> dict[str, Tile]:
    """float32 in memory takes the tile of tf32, rounded to bfloat16 or not."""
    return dict(half=half, rounded=tf32, tf32=tf32, tf32x3=tf32x3)


def width(d: int) -> int:
    """The power of two, 16 or more, that holds D."""
    return max(16, 1 << (d - 1).bit_length())


def pick(tiles: dict[str, Tiles], p: Product, kernel: str, others: tuple[int, ...] = ()) -> Tile:
    """A tile of the device's table; the narrower of two where rows are not whole vectors and
    slices of D. `others`: further strides and sizes that count.
    """
    row = tiles[gpu_device.architecture(p.x.device)]
    tile = row[kernel, p.products]
    even = p.d % min(tile.depth, width(p.d)) == 0
    plain = p.aligned(p.d, *others)
    return tile if even and plain else row[f"{kernel.partition('_')[0]}_uneven", p.products]


@dataclass(frozen=True)
class TileTable:
    """Tiles of kernels that have a wide and a narrow form, `kernel` and `kernel_extra` (bias,
    weighted, bends); `kernel_bent` where bends and one of the others spill in that."""

    tiles: Tiles
    most_stored: int = gpu_device.STORED_BYTES  # of a chunk that products follow
    norm_rows: int = 1 << 22  # of W whose norms are taken by one launch: 16 MiB of them

    def stored(self, device: torch.device, whole: int) -> int:
        """Bytes of a chunk of a matrix of `whole` bytes that is stored for products, at most."""
        return min(self.most_stored, gpu_device.stored_bytes(device, whole))

    def tile(self, p: Product, kernel: str, extra: bool = False, bent: bool = False) -> Tile:
        """The narrower of two where a kernel has more to hold."""
        tile = self.tiles[kernel, p.products]
        plain = p.even(tile.depth) and p.aligned()
        if extra and bent:
            name = (f"{kernel}_bent", p.products)
            return self.tiles.get(name) or self.tiles[f"{kernel}_extra", p.products]
        narrow = extra or bent or not plain
        return self.tiles[f"{kernel}_extra", p.products] if narrow else tile

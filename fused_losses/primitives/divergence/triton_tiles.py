"""Tile sizes of the Triton kernels, per architecture.

divergence: statistics of both sides, and sums that need nothing else; share: sums that need both
lse; gradient: G of one side; _uneven: rows that are no whole vectors or slices; _near: both sides
may be near each other, where the others' tiles spill: addresses of four rows stay in registers.
Two tiles of scores are alive at once, so that one of 128 x 64 holds what 128 x 128 does in
`row_statistics`; a tile of shares has a dozen values a class more.
"""

from __future__ import annotations

import torch

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.tiles import ALL, Tile, Tiles, by_kernel, same, wide


def stored_bytes(device: torch.device, whole: int) -> int:
    """Bytes of a chunk of a matrix of `whole` bytes that is stored for products, at most."""
    few = gpu_device.architecture(device) == "interpret"
    return 2048 if few else gpu_device.stored_bytes(device, whole)


def _tiles(even: dict[str, Tile], share: dict[str, Tile], uneven: dict[str, Tile]) -> Tiles:
    return by_kernel(
        divergence=even, gradient=even, share=share,
        divergence_uneven=uneven, gradient_uneven=uneven, share_uneven=uneven,
    )  # fmt: skip


def _near(even: Tile, uneven: Tile) -> Tiles:
    """Of the forward, where products are in float32 alone (`near_rows`)."""
    names = ("divergence", "share")
    tiles = {f"{name}_near": same(even, "tf32x3") for name in names}
    return by_kernel(**tiles, **{f"{name}_uneven_near": same(uneven, "tf32x3") for name in names})


NARROW = wide(Tile(64, 32, 64), Tile(64, 32, 32), Tile(64, 32, 32))

TILES: dict[str, Tiles] = {
    "sm_80": _tiles(
        wide(Tile(128, 64, 64), Tile(128, 64, 32), Tile(64, 32, 32)),
        NARROW,
        wide(Tile(64, 32, 64), Tile(64, 32, 32), Tile(64, 16, 32)),
    )
    | _near(Tile(64, 32, 16), Tile(64, 16, 16))
    # of mixed precision, whose scores are tf32 in the backward
    | by_kernel(gradient_near=same(Tile(64, 64, 32), "tf32")),
    "sm_90": _tiles(
        wide(Tile(128, 64, 64), Tile(128, 64, 32), Tile(64, 64, 32)),
        NARROW,
        wide(Tile(64, 32, 64), Tile(64, 32, 32), Tile(64, 16, 32)),
    )
    | _near(Tile(64, 64, 16), Tile(64, 32, 16)),
    "sm_100": _tiles(
        wide(Tile(128, 64, 64), Tile(128, 64, 32), Tile(128, 32, 32)),
        wide(Tile(128, 32, 64), Tile(128, 32, 32), Tile(128, 32, 32)),
        # half with slices of 32 spills 22 bytes
        wide(Tile(64, 16, 16), Tile(64, 16, 32), Tile(64, 16, 32)),
    )
    | _near(Tile(128, 32, 16), Tile(64, 32, 16))
    # 128 x 64 with biases of both sides spills 144 bytes
    | by_kernel(gradient=wide(Tile(128, 32, 64), Tile(128, 32, 32), Tile(128, 32, 32))),
    "gfx942": _tiles(
        same(Tile(128, 64, 32, 8, 2), *ALL),
        same(Tile(64, 16, 32, 8, 2), *ALL),
        same(Tile(64, 16, 32, 8, 2), *ALL),
    ),
    # small and unequal, so that a few dozen rows and classes make several ragged tiles of each
    "interpret": by_kernel(
        divergence=same(Tile(16, 32, 16), *ALL),
        divergence_uneven=same(Tile(32, 16, 16), *ALL),
        share=same(Tile(32, 16, 16), *ALL),
        share_uneven=same(Tile(16, 32, 16), *ALL),
        gradient=same(Tile(16, 32, 16), *ALL),
        gradient_uneven=same(Tile(32, 16, 16), *ALL),
    ),
}
TILES["sm_86"] = TILES["sm_80"]

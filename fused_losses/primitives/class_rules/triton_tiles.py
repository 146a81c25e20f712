"""Tile sizes of the Triton kernels of `class_rules`, per architecture.

kernel: forward, gradient of one centre a class and one sum a row; `_extra` with more of either or a
bend; `_soft` for centres pooled softly, and rows that are no whole slices or vectors. The widest of
those tried that spill with no rule (test_gpu_static.py); no time was measured.
"""

from __future__ import annotations

from fused_losses.backends.gpu.tiles import ALL, Tile, TileTable, by_kernel, same, wide


def _table(**kernels: dict[str, Tile]) -> TileTable:
    return TileTable(by_kernel(**kernels))


ONE = wide(Tile(128, 128, 64), Tile(128, 64, 32), Tile(128, 64, 32))
NVIDIA = dict(
    forward=ONE,
    forward_extra=wide(Tile(128, 64, 64), Tile(64, 64, 32), Tile(64, 64, 32)),
    # split products at 64 x 64 spill 11 on sm_90
    forward_soft=wide(Tile(64, 64, 32), Tile(64, 64, 32), Tile(64, 32, 16)),
    gradient=ONE,
    # half with slices of 64 spills on sm_100
    gradient_extra=same(Tile(64, 64, 32), *ALL),
    gradient_soft=same(Tile(64, 32, 32), *ALL),
)
AMPERE = NVIDIA | dict(
    # split products of best centres at 64 x 64 spill 96, and 66 of the gradient's
    forward_extra=wide(Tile(128, 64, 64), Tile(64, 64, 32), Tile(64, 32, 32)),
    gradient_extra=wide(Tile(64, 64, 64), Tile(64, 64, 32), Tile(64, 32, 32)),
    # slices of 32 spill 12, and rounded at 64 x 32, too
    gradient_soft=wide(Tile(64, 32, 32), Tile(64, 32, 32), Tile(32, 32, 16))
    | same(Tile(64, 64, 32), "rounded"),
)
FEW = wide(Tile(64, 64, 64), Tile(64, 64, 32), Tile(64, 32, 32))
AMD = dict(
    forward=same(Tile(128, 64, 32, 8, 2), *ALL),
    forward_extra=same(Tile(64, 64, 32, 8, 2), *ALL),
    forward_soft=same(Tile(64, 64, 32, 8, 2), *ALL),
    gradient=same(Tile(128, 64, 32, 8, 2), *ALL),
    gradient_extra=same(Tile(64, 64, 32, 8, 2), *ALL),
    gradient_soft=same(Tile(64, 32, 32, 8, 2), *ALL),
)

TABLES = {
    "sm_80": _table(**AMPERE),
    # sm_86, sm_89 and sm_120; 12 bytes of bent scores spill at 128 x 64
    "sm_86": _table(**AMPERE | dict(forward_extra=FEW)),
    "sm_90": _table(**NVIDIA),
    "sm_100": _table(**NVIDIA),
    "gfx942": _table(**AMD),
    # small and unequal, so that a few dozen rows and classes make several ragged tiles of each
    "interpret": TileTable(
        by_kernel(
            forward=same(Tile(16, 32, 16), *ALL),
            forward_extra=same(Tile(32, 16, 16), *ALL),
            forward_soft=same(Tile(16, 16, 16), *ALL),
            gradient=same(Tile(16, 32, 16), *ALL),
            gradient_extra=same(Tile(32, 16, 16), *ALL),
            gradient_soft=same(Tile(16, 16, 16), *ALL),
        ),
        most_stored=2048,
        norm_rows=64,
    ),
}

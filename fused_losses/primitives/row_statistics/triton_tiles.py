"""Tile sizes of the Triton kernels, per architecture, each with the compilation that chose it.

kernel: forward, gradient (`TileTable`), forward_resident, and of owners owner_rows, owner_classes
up to D = 128, owner_*wide up to 256. No owner entry: the form with stored G is used.

Figures: registers a thread with Triton 3.6.0 and its ptxas, at 1024 x 1,000,000; nothing spills
(test_gpu_static.py). "all": classes, bias, weights at once. No time was measured: the
choice is the widest tile that does not spill, since a wider one reads less from L2.
"""

from __future__ import annotations

from dataclasses import replace

from fused_losses.backends.gpu.tiles import ALL, Tile, TileTable, by_kernel, same, wide


def _table(**kernels: dict[str, Tile]) -> TileTable:
    return TileTable(by_kernel(**kernels))


TABLES = {
    "sm_80": _table(
        # half 251 (254 with classes; 96 KiB), tf32 153, rounded 128, tf32x3 167 (128 x 128
        # spills). At 128 x 128 half takes 154: no second block on an SM either
        forward=wide(Tile(128, 256, 64), Tile(128, 128, 32), Tile(128, 64, 32)),
        # all: half 173, rounded 128, tf32x3 167
        forward_extra=wide(Tile(128, 128, 64), Tile(128, 128, 32), Tile(128, 64, 32)),
        # half 251 (253 with classes), tf32 136, tf32x3 168
        gradient=wide(Tile(128, 256, 64), Tile(128, 128, 32), Tile(128, 64, 32)),
        # all: half 184, tf32 (mixed) and rounded 177, tf32x3 168
        gradient_extra=wide(Tile(128, 128, 64), Tile(128, 128, 32), Tile(128, 64, 32)),
        # 214; 128 x 128 spills
        gradient_bent=same(Tile(128, 64, 64), "half"),
        # D=128: rows 128, classes 166 (rounded, all: 128, 244)
        owner_rows={"half": Tile(64, 64, 0, 8, 2), "rounded": Tile(32, 64, 0, 8, 2)},
        owner_classes=same(Tile(64, 64, 0, 8, 2), "half", "rounded"),
        # D=256, all: rows 126, classes 175; classes at 64 x 64 spill
        owner_rows_wide=same(Tile(32, 64, 0, 8, 2), "half"),
        owner_classes_wide=same(Tile(64, 32, 0, 8, 2), "half"),
    ),
    "sm_90": _table(
        # D=512: 255, 384: 180, 256: 128, 128: 127; 224, 208, 160 and 80 KiB
        forward_resident=same(Tile(256, 32, 128, 8, 2), "half"),
        # half 186, tf32 112, rounded 140, tf32x3 203
        forward=wide(Tile(128, 256, 64), Tile(128, 128, 32), Tile(128, 128, 32)),
        # all: half 224, rounded 172, tf32x3 203; half at 128 x 256 spills with a weighted sum
        forward_extra=wide(Tile(128, 128, 64), Tile(128, 128, 32), Tile(128, 128, 32)),
        # half 192, tf32 189, tf32x3 215
        gradient=wide(Tile(128, 256, 64), Tile(128, 128, 32), Tile(128, 128, 32)),
        # all: half 254, tf32 (mixed) 252, rounded 254; tf32x3 at 128 x 128 spills 26 at D=500
        gradient_extra=wide(Tile(128, 128, 64), Tile(128, 128, 32), Tile(128, 64, 32)),
        # half 248, tf32 206, rounded 205; 128 x 128 spills
        gradient_bent=wide(Tile(128, 64, 64), Tile(128, 64, 32), Tile(128, 64, 32)),
        # D=128: rows 107, classes 157 (rounded, all: 211, 225)
        owner_rows=same(Tile(64, 64, 0, 8, 2), "half", "rounded"),
        owner_classes=same(Tile(64, 64, 0, 8, 2), "half", "rounded"),
        # D=256, all: rows 185, classes 233; classes at 64 x 64 spill
        owner_rows_wide=same(Tile(64, 32, 0, 8, 2), "half"),
        owner_classes_wide=same(Tile(32, 64, 0, 8, 2), "half"),
    ),
    "sm_100": _table(
        # half 154 (256 columns of tensor memory), tf32 90, rounded 90, tf32x3 176 (512 columns)
        forward=wide(Tile(128, 256, 64), Tile(128, 128, 32), Tile(128, 128, 32)),
        # all: half 166, rounded 167, tf32x3 212; all spill at 128 x 128
        forward_extra=wide(Tile(128, 64, 64), Tile(128, 64, 32), Tile(128, 64, 32)),
        # half 198; tf32 at 128 x 128 spills 374
        gradient=wide(Tile(128, 256, 64), Tile(128, 64, 32), Tile(128, 64, 32)),
        # all: half 220, tf32 (mixed) 180, rounded 184, tf32x3 170
        gradient_extra=wide(Tile(128, 64, 64), Tile(128, 64, 32), Tile(128, 64, 32)),
        # 184; 128 x 64 spills
        gradient_bent=same(Tile(128, 32, 32), "tf32x3"),
        # D=128: rows 80, classes 113 (rounded, all: 90, 198; rows at 64 x 64 spill 12)
        owner_rows={"half": Tile(64, 64, 0, 8, 2), "rounded": Tile(64, 32, 0, 8, 2)},
        owner_classes=same(Tile(64, 64, 0, 8, 2), "half", "rounded"),
        # D=256, all: rows 158, classes 212
        owner_rows_wide=same(Tile(64, 64, 0, 8, 2), "half"),
        owner_classes_wide=same(Tile(64, 64, 0, 8, 2), "half"),
    ),
    "gfx942": _table(
        # half 93, rounded 117, tf32x3 (float32 products) 106; all: 150, 135, 134; 32 KiB of LDS
        forward=same(Tile(128, 128, 32, 8, 2), *ALL),
        forward_extra=same(Tile(128, 128, 32, 8, 2), *ALL),
        # half 95, tf32x3 106; all: 151, 140. The owner kernels spill to memory at 64 x 64
        gradient=same(Tile(128, 128, 32, 8, 2), *ALL),
        gradient_extra=same(Tile(128, 128, 32, 8, 2), *ALL),
    ),
    # small and unequal, so that a few dozen rows and classes make several ragged tiles of each
    "interpret": TileTable(
        by_kernel(
            forward_resident=same(Tile(32, 16, 16), "half"),
            forward=same(Tile(16, 32, 16), *ALL),
            forward_extra=same(Tile(32, 16, 16), *ALL),
            gradient=same(Tile(16, 32, 16), *ALL),
            gradient_extra=same(Tile(32, 16, 16), *ALL),
            gradient_bent=same(Tile(16, 16, 16), *ALL),
            owner_rows=same(Tile(16, 32, 0), "half", "rounded"),
            owner_classes=same(Tile(32, 16, 0), "half", "rounded"),
            owner_rows_wide=same(Tile(32, 16, 0), "half"),
            owner_classes_wide=same(Tile(16, 32, 0), "half"),
        ),
        most_stored=2048,
        norm_rows=64,
    ),
}
# sm_86, sm_89 and sm_120: 99 KiB of shared memory, which the tiles of sm_80 keep to; but where a
# row is no whole vector, those of half spill 122 bytes
TABLES["sm_86"] = replace(
    TABLES["sm_80"],
    tiles=TABLES["sm_80"].tiles
    | by_kernel(
        forward_extra=same(Tile(128, 64, 64), "half"),
        gradient_extra=same(Tile(128, 64, 64), "half"),
    ),
)

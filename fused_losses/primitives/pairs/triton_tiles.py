"""Tile sizes of the Triton kernels over pairs, per architecture, each with what it compiles to.

`tiles[kernel, products]` as in `gpu.tiles`. kernel: statistics, gradient, attention (weights
alone) or attention_gradient; `_two`: columns have statistics as well as rows; `_extra`: ids,
groups, exclusions, windows, a root or a reach, pairs apart, or rows of an uneven width; `_apart`:
where these spill with pairs apart, which have no products.

Figures: registers a thread with Triton 3.6.0 and its ptxas, labels and biases present, as half /
rounded / tf32 / tf32x3; nothing spills (test_gpu_static.py). No time was measured:
the choice is the widest tile that does not spill. What a pair needs of its column is held for
every column of a thread, 32 of them at 128 columns: two sides take narrow tiles.
"""

from __future__ import annotations

from dataclasses import replace

from fused_losses.backends.gpu.tiles import ALL, Tile, TileTable, by_kernel, same, wide


def _table(**kernels: dict[str, Tile]) -> TileTable:
    return TileTable(by_kernel(**kernels))


def _shallow(half: Tile, tf32: Tile, tf32x3: Tile) -> dict[str, Tile]:
    """float32 in memory takes half the depth."""
    return wide(half, replace(tf32, depth=32), replace(tf32x3, depth=32))


def _amd(tile: Tile) -> dict[str, Tile]:
    return same(replace(tile, depth=32, stages=2), *ALL)


WIDE, TALL, SMALL, SLIM = Tile(128, 128, 64), Tile(128, 64, 64), Tile(64, 64, 64), Tile(64, 32, 64)

TABLES = {
    "sm_80": _table(
        # 146 / 147 / 148 / 178; half at 128 x 128 spills 30 bytes
        statistics=_shallow(TALL, TALL, SMALL),
        # 251 / 151 / 151 / 253
        statistics_extra=_shallow(TALL, SMALL, SMALL),
        # 255 / 152 / 151 / 252
        statistics_two=_shallow(TALL, SMALL, SMALL),
        # 194 / 195 / 194 / 188
        statistics_two_extra=_shallow(SMALL, SMALL, SLIM),
        # 182 / 179 / 128 / 172
        gradient=_shallow(TALL, TALL, SMALL),
        # 164 / 110 / 109 / 167
        gradient_extra=_shallow(SMALL, SMALL, SMALL),
        # 164 / 128 / 142 / 237
        gradient_two=_shallow(TALL, SMALL, SMALL),
        # 249 / 180 / 164 / 255
        gradient_two_extra=_shallow(SMALL, SLIM, SLIM),
        # 100 / 99 / 98 / 168
        attention=_shallow(TALL, TALL, SMALL),
        # 244 / 99 / 96 / 253
        attention_extra=_shallow(TALL, SMALL, SMALL),
        # 150 / 153 / 152 / 172
        attention_gradient=_shallow(SMALL, SMALL, SLIM),
        # 206 / 122 / 120 / 201
        attention_gradient_extra=_shallow(SMALL, SLIM, SLIM),
    ),
    "sm_90": _table(
        # 255 (114 without labels) / 154 / 153 / 152
        statistics=_shallow(WIDE, TALL, TALL),
        # 255 / 150 / 118 / 165
        statistics_extra=_shallow(TALL, SMALL, SMALL),
        # 247 / 155 / 153 / 155; half at 128 x 128 spills 1 KB
        statistics_two=_shallow(TALL, SMALL, SMALL),
        # 196 / 202 / 196 / 208
        statistics_two_extra=_shallow(SMALL, SMALL, SMALL),
        # 126 / 127 / 212 / 167; half at 128 x 128 spills 132 bytes
        gradient=_shallow(TALL, TALL, TALL),
        # 254 / 93 / 80 / 149
        gradient_extra=_shallow(TALL, SMALL, SMALL),
        # 142 / 113 / 126 / 127
        gradient_two=_shallow(TALL, SMALL, SMALL),
        # 255 / 161 / 160 / 168
        gradient_two_extra=_shallow(SMALL, SLIM, SLIM),
        # 204 / 98 / 113 / 128
        attention=_shallow(WIDE, TALL, TALL),
        # 246 / 92 / 80 / 151
        attention_extra=_shallow(TALL, SMALL, SMALL),
        # 118 / 143 / 118 / 182
        attention_gradient=_shallow(SMALL, SMALL, SMALL),
        # 206 / 208 / 190 / 214
        attention_gradient_extra=_shallow(SMALL, SMALL, SMALL),
    ),
    # a thread holds one row and 16 to 32 columns here, so the columns' vectors weigh most
    "sm_100": _table(
        # 176 / 176; half at 128 x 128 spills 80 bytes
        statistics=_shallow(TALL, TALL, SMALL),
        # 126 / 74; 64 x 64 spills 12 bytes
        statistics_extra=_shallow(SLIM, SLIM, SLIM),
        # 161 / 162; half at 128 x 64 spills 130 bytes
        statistics_two=_shallow(SMALL, SMALL, SMALL),
        # 128 / 194; rounded at 64 x 32 spills 10 bytes
        statistics_two_extra=_shallow(SLIM, SMALL, SLIM),
        # 64 x 64 spills 37 bytes
        statistics_two_apart=same(SLIM, "rounded", "tf32"),
        # 144 / 196
        gradient=_shallow(TALL, TALL, SMALL),
        # 96 / 64
        gradient_extra=_shallow(SLIM, SLIM, SLIM),
        # 182 / 194
        gradient_two=_shallow(SMALL, SMALL, SMALL),
        # 192 / 196; half at 64 x 64 spills 82 bytes
        gradient_two_extra=_shallow(SLIM, SLIM, SLIM),
        # 128 / 128
        attention=_shallow(TALL, TALL, SMALL),
        # 156
        attention_extra=_shallow(SMALL, SMALL, SMALL),
        # 180
        attention_gradient=_shallow(TALL, SMALL, SMALL),
        # 190; tf32 at depth 32 spills 10 bytes
        attention_gradient_extra=wide(SMALL, SMALL, replace(SLIM, depth=32)),
    ),
    "gfx942": _table(
        # rows alone 119, two sides 182 to 197
        statistics=_amd(TALL),
        statistics_extra=_amd(TALL),
        statistics_two=_amd(TALL),
        statistics_two_extra=_amd(TALL),
        # rows alone 82, two sides 232
        gradient=_amd(TALL),
        gradient_extra=_amd(TALL),
        gradient_two=_amd(TALL),
        # 100; wider tiles use matrix instructions of 32 columns, and spill 170 to 480
        gradient_two_extra=_amd(Tile(128, 16, 64)),
        # 74 to 107, with gradient 106 to 131
        attention=_amd(TALL),
        attention_extra=_amd(TALL),
        attention_gradient=_amd(TALL),
        attention_gradient_extra=_amd(TALL),
    ),
    # small and unequal, so that a few dozen rows and columns make several ragged tiles of each
    "interpret": TileTable(
        by_kernel(
            **{
                f"{kernel}{kind}": same(tile, *ALL)
                for kernel in ("statistics", "gradient", "attention", "attention_gradient")
                for kind, tile in (
                    ("", Tile(16, 32, 16)),
                    ("_extra", Tile(32, 16, 16)),
                    ("_two", Tile(16, 32, 16)),
                    ("_two_extra", Tile(32, 16, 16)),
                )
            }
        ),
        most_stored=2048,
    ),
}
# sm_86, sm_89 and sm_120; half at 64 x 64 spills 10 bytes on sm_120, and 22 of pairs apart
TABLES["sm_86"] = replace(
    TABLES["sm_80"],
    tiles=TABLES["sm_80"].tiles
    | by_kernel(
        gradient_extra=same(SLIM, "half"),
        statistics_two_apart=same(SLIM, "half", "rounded", "tf32"),
        # 10 bytes
        attention_apart=same(SMALL, "half"),
    ),
)

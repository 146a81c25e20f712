"""The top-k on Triton: a fused screen, whose candidates `certified_topk` scores and certifies.

Up to FUSED candidates a row stay in registers while the columns stream by, split over ranges of
columns where rows are few; beyond that, blocks of keys are stored and the best carried along.
Memory beyond the outputs: 8 bytes a candidate and a range, or BLOCK_BYTES a few times; never N x M.

Tiles by (kernel, products) as in `gpu.tiles`; `_uneven`: rows that are not whole vectors. No
time was measured: the choice is a wide tile that does not spill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.product import Product
from fused_losses.backends.gpu.tiles import ALL, Tile, by_kernel, pick, same, wide
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.backends.triton.launch import kernel
from fused_losses.primitives.topk import certified as certified_topk
from fused_losses.primitives.topk.bounds import BF16, IEEE, TF32X3, Products, on_tensor_cores
from fused_losses.primitives.topk.inputs import TopkInputs

FUSED = 128  # candidates a row that stay in registers
FEW = 32  # that leave room for a wider tile: best_few
PARTIAL_BYTES = 32 << 20  # of the candidates of all ranges
BLOCK_BYTES = 32 << 20  # of stored keys
EMPTY = -0x7F800001 << 32  # the key -inf, at the column past all others


def _few(half: Tile, rounded: Tile | None, tf32x3: Tile | None) -> dict[str, Tile]:
    tiles = dict(half=half, rounded=rounded, tf32x3=tf32x3)
    return {products: tile for products, tile in tiles.items() if tile is not None}


NARROW = Tile(64, 32, 32)
# Registers a thread with Triton 3.6.0; nothing spills (test_gpu_static.py).
# The best of 128 weigh as much as a tile of 64 x 128: sm_80: 180 to 255; sm_90: 142 to 255; sm_100:
# 172 to 222; gfx942: 229 to 240. Keys: 170 / 170 / 74 / 155 at most. FEW, half / rounded / tf32x3:
# at most 255 / 255 / -, 248 / 181 / 226, 194 / - / 180; wider ones spill under masks.
# 1024 x 1,000,000 x 256: 12.3 GB from L2, 8.2 on sm_90, 20.5 on sm_100 (roofline.md)
TILES = {
    "sm_80": by_kernel(
        best=wide(Tile(64, 64, 64), NARROW, Tile(32, 64, 32)),
        best_few=_few(Tile(128, 64, 64), Tile(128, 64, 32), None),
        best_uneven=wide(Tile(64, 32, 64), NARROW, Tile(32, 64, 32)),
        keys=wide(Tile(64, 64, 64), Tile(64, 64, 32), Tile(64, 32, 32)),
    ),
    "sm_90": by_kernel(
        best=wide(Tile(64, 64, 64), NARROW, NARROW),
        best_few=_few(Tile(128, 128, 64), Tile(128, 64, 32), Tile(128, 64, 32)),
        best_uneven=wide(NARROW, NARROW, Tile(64, 16, 32)),
        keys=wide(Tile(64, 64, 64), Tile(64, 64, 32), Tile(64, 64, 32)),
    ),
    "sm_100": by_kernel(
        best=wide(Tile(64, 32, 64), NARROW, NARROW),
        best_few=_few(Tile(128, 32, 64), None, Tile(64, 64, 32)),
        best_uneven=wide(NARROW, NARROW, NARROW),
        keys=wide(Tile(64, 64, 64), Tile(64, 32, 32), Tile(64, 32, 32)),
    ),
    "gfx942": by_kernel(
        best=same(Tile(64, 64, 32, 8, 2), *ALL),
        # a depth of 32 spills 44 bytes, 64 x 64 spills 94
        best_uneven=same(Tile(64, 32, 16, 8, 2), *ALL),
        keys=same(Tile(64, 64, 32, 8, 2), *ALL),
    ),
    # small and unequal, so that a few dozen rows make several ragged tiles of each
    "interpret": by_kernel(
        best=same(Tile(16, 32, 16), *ALL),
        best_few=_few(Tile(32, 32, 16), Tile(32, 32, 16), Tile(32, 32, 16)),
        best_uneven=same(Tile(32, 16, 16), *ALL),
        keys=same(Tile(32, 16, 16), *ALL),
    ),
}
TILES["sm_86"] = TILES["sm_80"]


def select(p: TopkInputs) -> tuple[Tensor, Tensor]:
    """As `fused_losses.primitives.topk.op.select`; a screen's codes are not read: y itself is."""
    with torch.no_grad():
        return certified_topk.certified(p, prepared(p), _candidates)


def prepared(p: TopkInputs) -> certified_topk.Screen:
    """What the kernels need, and the bound on what they round."""
    return certified_topk.prepared(p, _products(p), torch.float32)


def _exact(p: TopkInputs) -> bool:
    """Whether rows are multiplied as they are: 16-bit ones, that no center moves."""
    exact = p.x.dtype.itemsize == 2 and p.y.dtype in (p.x.dtype, torch.int8)
    return exact and p.kind != "sqeuclidean"


def _products(p: TopkInputs) -> Products:
    """How the kernels multiply here."""
    interpreted = gpu_device.architecture(p.x.device) == "interpret"
    if _exact(p):
        return IEEE if interpreted else on_tensor_cores(IEEE)
    if p.screen == "bf16":
        # the interpreter cuts off where a GPU rounds
        return Products(factor=2 * BF16.factor) if interpreted else on_tensor_cores(BF16)
    return IEEE if interpreted else TF32X3


def workspace(p: TopkInputs) -> int:
    """Bytes beyond inputs and outputs, at most."""
    kept = p.k + max(16, p.k // 2)
    lists = max(PARTIAL_BYTES, 8 * p.x.shape[0] * kept)
    narrowed = p.y.numel() * 12 if p.y.dtype == torch.float64 else 0
    return certified_topk.certified_bytes(p) + lists + 3 * BLOCK_BYTES + narrowed


def _candidates(p: TopkInputs, s: certified_topk.Screen) -> tuple[Tensor, Tensor]:
    assert s.offset is not None
    # the sign apart, x is what it was: 16-bit products are exact
    x = s.x.to(p.x.dtype) if _exact(p) else s.x
    # float64 rows are moved before they are rounded, others as they are read
    y, center = (s.rows_of(p.y), None) if p.y.dtype == torch.float64 else (p.y, s.center)
    return screen(
        x,
        y,
        s.offset,
        s.multiplier,
        s.keep,
        p.x_labels,
        p.y_labels,
        p.match,
        p.x_ids,
        p.y_ids,
        p.exclude,
        p.skip_self,
        "bf16" if p.screen == "bf16" and x.dtype == torch.float32 else "fp32",
        center,
    )


def screen(
    x: Tensor,  # [N, D] float32, bfloat16, float16
    y: Tensor,  # [M, D] of these, or int8; float64 rows are rounded
    a: Tensor,  # [M] float32
    m: Tensor | None,  # [M] float32
    keep: int,
    x_labels: Tensor | None,  # [N] int32; so are all that follow
    y_labels: Tensor | None,  # [M]
    match: str,
    x_ids: Tensor | None,  # [N]
    y_ids: Tensor | None,  # [M]
    exclude: Tensor | None,  # [N, E]
    skip_self: bool,
    precision: str,
    center: Tensor | None = None,  # [D] float32
) -> tuple[Tensor, Tensor]:
    """The `keep` largest keys m_j <x_i, y_j - center> + a_j of each row, and their columns.

    keys [N, keep] float32, descending, ties to the lowest column; index [N, keep] int32; -inf and
    -1 where a row has fewer. A key that is NaN counts as inf, one below the finite numbers as the
    least of them: a pair that is left out is alone in having none.
    """
    if y.dtype not in (x.dtype, torch.int8):
        x = x.float()  # y is widened as it is read
        y = y if y.dtype.itemsize <= 4 else y.float()
    p = Product.of(x, y, precision, gradient=False)
    n, columns = p.n, p.m
    if min(n, columns, keep) == 0:
        return (
            torch.full((n, keep), -torch.inf, dtype=torch.float32, device=x.device),
            torch.full((n, keep), -1, dtype=torch.int32, device=x.device),
        )
    labels = (None, None) if match == "any" else (x_labels, y_labels)
    integers = [None if t is None else t.int().contiguous() for t in (*labels, x_ids, y_ids)]
    if exclude is not None:
        exclude = exclude.int().contiguous() if exclude.shape[1] else None
    vectors = [None if t is None else t.float().contiguous() for t in (center, a, m)]
    operands = (p.x, p.y, *vectors, *integers, exclude)
    flags = dict(MATCH=match, SKIP_SELF=skip_self, BF16=p.bf16, DOT=p.dot)
    return certified_topk.unpacked(
        (_streamed if keep <= FUSED else _stored)(p, operands, flags, keep)
    )


def _sizes(p: Product, tile: Tile) -> dict[str, int]:
    return dict(BM=tile.rows, BN=tile.columns, BK=tile.depth, EVEN=p.even(tile.depth))


def _streamed(p: Product, operands: tuple, flags: dict, keep: int) -> Tensor:
    """The best of each row, packed. [N, keep]"""
    few = keep <= FEW and ("best_few", p.products) in TILES[gpu_device.architecture(p.x.device)]
    tile = pick(TILES, p, "best_few" if few else "best")
    row_tiles = ceil_div(p.n, tile.rows)
    splits = min(
        2 * gpu_device.processors(p.x.device) // row_tiles, PARTIAL_BYTES // (8 * p.n * keep)
    )
    span = ceil_div(ceil_div(p.m, max(splits, 1)), tile.columns) * tile.columns
    splits = ceil_div(p.m, span)
    to = torch.empty((p.n, splits, keep), dtype=torch.int64, device=p.x.device)
    exclude = operands[-1]
    triton_launch.launch(
        kernel("topk.triton_kernels.best_columns"),
        row_tiles * splits,
        (*operands, to, p.x.stride(0), p.y.stride(0))
        + (0 if exclude is None else exclude.shape[1], p.n, p.m, p.d)
        + (span, splits, row_tiles, keep),
        dict(K=max(16, 1 << (keep - 1).bit_length()), **flags, **_sizes(p, tile)),
        tile,
    )
    return to.flatten(1).topk(keep, dim=1)[0]


def _stored(p: Product, operands: tuple, flags: dict, keep: int) -> Tensor:
    """The best of each row, packed, by blocks of keys. [N, keep]"""
    tile = TILES[gpu_device.architecture(p.x.device)]["keys", p.products]
    exclude = operands[-1]
    width = ceil_div(min(p.m, max(4 * keep, 8192)), tile.columns) * tile.columns
    height = min(p.n, max(1, BLOCK_BYTES // (8 * width)))
    block = torch.empty((height, width), dtype=torch.int64, device=p.x.device)
    best = torch.full((p.n, keep), EMPTY, dtype=torch.int64, device=p.x.device)
    for top in range(0, p.n, height):
        stop = min(top + height, p.n)
        row_tiles = ceil_div(stop - top, tile.rows)
        for first in range(0, p.m, width):
            end = min(first + width, p.m)
            triton_launch.launch(
                kernel("topk.triton_kernels.key_tiles"),
                row_tiles * ceil_div(end - first, tile.columns),
                (*operands, block, p.x.stride(0), p.y.stride(0), block.stride(0))
                + (0 if exclude is None else exclude.shape[1], top, stop, first, p.m, p.d)
                + (row_tiles,),
                flags | _sizes(p, tile),
                tile,
            )
            found = torch.cat([best[top:stop], block[: stop - top, : end - first]], 1)
            best[top:stop] = found.topk(keep, dim=1)[0]
    return best

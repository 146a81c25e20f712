"""A gradient over classes with a chunk of G stored: dx += G W, dW = G^T x are library products.

A primitive fills the chunk by a kernel of its own; what surrounds that is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div, from_column
from fused_losses.backends.gpu.products import accumulate, add_rows
from fused_losses.backends.gpu.tiles import Tile, TileTable
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.backends.triton.launch import kernel
from fused_losses.primitives.row_statistics import gpu as row_statistics_gpu
from fused_losses.primitives.row_statistics.gpu import Problem
from fused_losses.primitives.row_statistics.triton_arguments import ClassVectors

SPLIT_ROWS = 8192  # of the parts of dx, together: float32 sums that each chunk reads and writes
ROW_BLOCK = 16384  # rows of G stored at a time: dW of fewer rows is one product a chunk
MAX_CHUNK = 1 << 17  # rows of W
MAX_SPLITS = 16
NORM_ROWS = TileTable.norm_rows

# writes G of some rows against rows [first, end) of W: (rows, of W, G, sums of columns, first, end)
Fill = Callable[[slice, ClassVectors, Tensor, Tensor | None, int, int], None]


def column_bytes(n: int, d: int, itemsize: int = 4, more: int = 12) -> int:
    """Of a column of a chunk: G and its sums over row tiles, dW, and copies of the row of W.

    more: bytes a coordinate of the last two; by default as many as there may be.
    """
    block = min(n, ROW_BLOCK)
    return block * itemsize + block // 4 + more * d


def chunk_bytes(n: int, d: int, count: int, device: torch.device, unit: int = 1) -> int:
    """Of a chunk, the norms and the parts of dx, at most; unit: rows of W that stay together."""
    columns = ceil_div(count, unit) * unit
    whole = columns * column_bytes(n, d)
    stored = max(gpu_device.stored_bytes(device, whole), unit * column_bytes(n, d))
    stored = min(stored, whole)
    parts = min(MAX_SPLITS * n, max(SPLIT_ROWS, n))
    return stored + 4 * min(columns, NORM_ROWS + MAX_CHUNK) + 4 * parts * d


def gradients(
    p: Problem,
    fill: Fill,
    tile: Tile,  # of the kernel that fills
    most_stored: Callable[[int], int],  # bytes of a chunk, by those of all columns
    norm_rows: int,
    unscale: Tensor | None,
    need_x: bool,
    dweight: Tensor | None,
    dbias: Tensor | None,
    compact: bool,  # dweight has a row for each of `classes`
    centers: int = 1,  # rows of W that a column of the tile stands for
) -> Tensor | None:
    """dx in float32; dweight and dbias are written.

    A chunk is as large as memory allows and so passes through DRAM: one that stays in L2 spares
    those bytes, but takes launches that cost more (roofline.md). Rows resident as in the forward
    would be read anew for every chunk.
    """
    n, d, low, device = p.n, p.d, p.low, p.x.device
    unit = tile.columns * centers
    block = min(n, ROW_BLOCK)
    # dx has few tiles: its classes are split over as many products as fill the GPU, added at last
    splits = max(1, min(MAX_SPLITS, SPLIT_ROWS // block)) if n == block else 1
    # the product writes straight into dweight where nothing has to be done to it afterwards
    direct = not p.normalize and unscale is None and n == block
    direct = direct and (p.classes is None or compact)
    direct = direct and dweight is not None and dweight.dtype == low
    copied = p.classes is not None or low == torch.float16 or low != p.weight.dtype
    more = 4 * (dweight is not None and not direct) + 8 * (need_x and copied)
    each = column_bytes(n, d, low.itemsize, more)
    most = most_stored(p.count * each) // (each * unit)
    most = max(1, min(most, MAX_CHUNK // unit, ceil_div(p.count, unit)))  # units
    splits = min(splits, most)
    # as many chunks as there have to be, of one size
    chunks = ceil_div(p.count, most // splits * splits * unit) if most * unit < p.count else 1
    piece = ceil_div(p.count, chunks * splits * unit) * unit
    chunk = min(piece * splits, most * unit)
    new: dict[str, Any] = dict(dtype=torch.float32, device=device)
    row_tiles = ceil_div(n, tile.rows)
    ds = torch.empty((block, chunk), dtype=low, device=device)
    bias_sum = torch.empty((row_tiles, chunk), **new) if dbias is not None else None
    # norms of several chunks at once
    several = min(chunks, max(1, norm_rows // chunk)) * chunk
    every = torch.empty(min(several, p.count), **new) if p.normalize else None
    gradient = None if direct or dweight is None else torch.empty((chunk, d), **new)
    x_low = p.x.to(low)
    dx = torch.zeros((splits, n, d), **new) if need_x else None
    for first in range(0, p.count, chunk):
        end = min(first + chunk, p.count)
        length = end - first
        inverse = None
        if every is not None:
            if first % several == 0:
                norms(p, every, first, min(first + several, p.count))
            inverse = every[first % several :][:length]
        w = p.weight[first:end] if p.classes is None else p.weight[p.classes[first:end]]
        rest = shift = None
        if low == torch.float16 and inverse is not None:
            w, rest, shift = row_statistics_gpu.near_one(w, inverse)
        w = w.to(low) if need_x else None
        of_class = ClassVectors.of(p, inverse, rest)
        for top in range(0, n, block):
            part = slice(top, min(top + block, n))
            height = part.stop - top
            fill(part, of_class, ds, from_column(bias_sum, top // tile.rows), first, end)
            g = ds[:height, :length]
            if dx is not None and w is not None:
                add_rows(dx[:, part], g, w, piece)
            if direct and dweight is not None:
                torch.mm(g.T, x_low, out=dweight[first:end])
            elif gradient is not None:
                beta = float(top > 0)
                accumulate(gradient[None, :length], g.T[None], x_low[None, part], beta)
        if gradient is not None and shift is not None:
            gradient[:length] *= shift
        if gradient is not None or dbias is not None:
            out = None if gradient is None else dweight
            _finish(p, gradient, inverse, bias_sum, unscale, out, dbias, compact, first, end)
    return None if dx is None else dx.sum(0)


def _finish(
    p: Problem,
    gradient: Tensor | None,
    inverse: Tensor | None,
    bias_sum: Tensor | None,
    unscale: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    compact: bool,
    first: int,
    end: int,
) -> None:
    # rows of no whole slices take more registers: 32 of them spill
    tile = Tile(0, 32 if p.even(128) else 16, 128, 4, 1)
    height, width = (0, 0) if bias_sum is None else bias_sum.shape
    triton_launch.launch(
        kernel("row_statistics.triton_backward.finish_weight"),
        ceil_div(end - first, tile.columns),
        (gradient, p.weight, inverse, p.classes, bias_sum, unscale, dweight, dbias)
        + (p.weight.stride(0), p.d, width)
        + (first, end, p.d, height),
        dict(BN=tile.columns, BK=tile.depth, EVEN=p.even(tile.depth), COMPACT=compact),
        tile,
    )


def norms(p: Problem, inverse: Tensor, first: int, end: int) -> None:
    """1/|w_j| of columns [first, end)."""
    classes = from_column(p.classes, first)
    weight = p.weight[first:] if classes is None else p.weight
    # rows of no whole slices spill a little in slices of 64 on sm_90
    tile = Tile(0, 16, 64 if p.even(64) else 32, 4, 1)
    triton_launch.launch(
        kernel("row_statistics.triton_forward.inverse_norms"),
        ceil_div(end - first, tile.columns),
        (weight, classes, inverse, weight.stride(0), end - first, p.d),
        dict(BN=tile.columns, BK=tile.depth, EVEN=p.even(tile.depth)),
        tile,
    )

"""`row_statistics` on Triton: NVIDIA from sm_80, AMD gfx942, and CPU tensors in its interpreter.

Memory beyond the outputs: partial statistics (at most PARTIAL_BYTES), N x D accumulators in
float32, and in the backward one chunk of G and of dW. Never N x C.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.products import float16_scale, float32_products
from fused_losses.backends.gpu.tiles import Tile, TileTable, width
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.backends.triton.launch import kernel
from fused_losses.primitives.row_statistics import gpu as row_statistics_gpu
from fused_losses.primitives.row_statistics import triton_chunks
from fused_losses.primitives.row_statistics.gpu import Problem
from fused_losses.primitives.row_statistics.inputs import Inputs, Needs, RowGradients
from fused_losses.primitives.row_statistics.triton_arguments import (
    ClassVectors,
    Partials,
    RowVectors,
)
from fused_losses.primitives.row_statistics.triton_tiles import TABLES

PARTIAL_BYTES = 64 << 20
# of a class tile, on any device: shapes alone say nothing of the architecture
MOST_COLUMNS = max(t.columns for table in TABLES.values() for t in table.tiles.values())
# of the pieces of a row in `forward_resident`, so many of one half are held in registers: 227 KiB
# of shared memory take 128 rows, the rest of the other 128, and two tiles of 32 classes
HELD = {1: 0, 2: 0, 3: 1, 4: 3}
ROWS_IN_TILES = 8  # 256 rows are as many bytes as eight tiles of 32 classes


def workspace(p: Inputs, needs: Needs | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    n, d = p.x.shape
    count = p.weight.shape[0] if p.classes is None else p.classes.shape[0]
    rows = 3 * n * d * 4
    if needs is None:
        return PARTIAL_BYTES + 4 * min(count, triton_chunks.NORM_ROWS) + rows
    device = p.x.device
    return triton_chunks.chunk_bytes(n, d, count, device, MOST_COLUMNS) + rows


def _table(p: Problem) -> TileTable:
    return TABLES[gpu_device.architecture(p.x.device)]


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse, target, weighted_sum, hardest, hardest_score (`row_statistics`)."""
    x, _, _, _, bias, _, normalize, weighted, *_ = inputs
    p = row_statistics_gpu.checked_problem(inputs)
    table = _table(p)
    n, count = p.n, p.count
    new: dict[str, Any] = dict(dtype=torch.float32, device=x.device)
    lse, target, hardest_score = (torch.empty(n, **new) for _ in range(3))
    weighted_sum = torch.empty(n if weighted else 0, **new)
    hardest = torch.empty(n, dtype=torch.int64, device=x.device)
    if n == 0 or count == 0:  # else `forward_rows` writes all of them
        for values, nothing in ((lse, -torch.inf), (hardest_score, -torch.inf), (hardest, -1)):
            values.fill_(nothing)
        return lse, target.zero_(), weighted_sum.zero_(), hardest, hardest_score
    extra = bias is not None or weighted
    resident = _resident(p) if not extra and p.bend is None else None
    tile = resident or table.tile(p, "forward", extra, p.bend is not None)
    row_tiles = ceil_div(n, tile.rows)
    span = tile.columns
    if resident is not None:
        at_once = table.norm_rows if normalize else count
        most = ceil_div(min(count, max(at_once, span)), span)
        span *= ceil_div(most, _splits(most, row_tiles, gpu_device.processors(x.device)))
    parts = 3 if weighted else 2
    # spans whose partials are alive at once; several such segments are merged into one row each
    segment = max(1, PARTIAL_BYTES // (4 * (parts + 1) * n))
    spans = ceil_div(count, span)
    segments = ceil_div(spans, segment)
    segment = ceil_div(spans, segments)
    part, best = _partials(segment, n, parts, x.device)
    top, top_best = _partials(segments, n, parts, x.device)
    chunk = segment * span
    if normalize:
        chunk = min(chunk, max(1, table.norm_rows // span // 4 * 4) * span)
    inverse = torch.empty(chunk, **new) if normalize else None
    of_class, of_row = ClassVectors.of(p, inverse), RowVectors(p.positions, p.bend)
    merge_tile = Tile(16, 64, 64, 4, 2)
    merging = dict(BM=merge_tile.rows, BT=merge_tile.columns)
    for s in range(segments):
        start, stop = s * segment, min((s + 1) * segment, spans)
        for first in range(start * span, min(stop * span, count), chunk):
            end = min(first + chunk, stop * span, count)
            if inverse is not None:
                triton_chunks.norms(p, inverse, first, end)
            at = first // span - start
            partials = Partials.of(part[:, at:], best[at:])
            if resident is not None:
                depth = p.d // tile.depth
                triton_launch.launch(
                    kernel("row_statistics.triton_forward.forward_resident"),
                    row_tiles * ceil_div(end - first, span),
                    (p.x, p.weight, of_class, of_row, partials)
                    + (p.x.stride(0), p.weight.stride(0), n, first, end, row_tiles, span),
                    dict(DEPTH=depth, HELD=HELD[depth], BM=tile.rows // 2, BN=tile.columns)
                    | dict(BK=tile.depth, DOT=p.dot),
                    tile,
                )
                continue
            triton_launch.launch(
                kernel("row_statistics.triton_forward.forward_tiles"),
                row_tiles * ceil_div(end - first, tile.columns),
                (p.x, p.weight, of_class, of_row, partials)
                + (p.x.stride(0), p.weight.stride(0), n, first, end, p.d, row_tiles),
                dict(BM=tile.rows, BN=tile.columns, BK=tile.depth, EVEN=p.even(tile.depth))
                | dict(BF16=p.bf16, DOT=p.dot),
                tile,
            )
        if segments > 1:
            triton_launch.launch(
                kernel("row_statistics.triton_forward.merge_tiles"),
                ceil_div(n, merge_tile.rows),
                (Partials.of(part, best), Partials.of(top[:, s], top_best[s]), n, stop - start),
                merging,
                merge_tile,
            )
    if segments == 1:
        top, top_best = part, best
    triton_launch.launch(
        kernel("row_statistics.triton_forward.forward_rows"),
        ceil_div(n, merge_tile.rows),
        (p.exact, p.weight, p.positions, p.classes, Partials.of(top, top_best))
        + (lse, target, weighted_sum if weighted else None, hardest, hardest_score)
        + (p.exact.stride(0), p.weight.stride(0), n, spans if segments == 1 else segments, p.d),
        merging
        | dict(BK=merge_tile.depth, EVEN=p.even(merge_tile.depth))
        | dict(NORMALIZE=normalize, BF16=p.bf16),
        merge_tile,
    )
    return lse, target, weighted_sum, hardest, hardest_score


def _resident(p: Problem) -> Tile | None:
    """The tile of `forward_resident`, where rows of x fit beside the tiles of W."""
    tile = _table(p).tiles.get(("forward_resident", p.products))
    if tile is None or not p.even(tile.depth) or p.d // tile.depth not in HELD:
        return None
    if not p.aligned():
        return None
    # rows past the last one are multiplied for nothing
    return tile if -p.n % tile.rows <= p.n // 8 else None


def _splits(tiles: int, row_tiles: int, processors: int) -> int:
    """Over how many programs a row tile's class tiles go, so that the last round is full, too."""

    def work(splits: int) -> int:
        # a program is alone on its processor, and reads its rows before the first tile
        rounds = ceil_div(row_tiles * splits, processors)
        return rounds * (ceil_div(tiles, splits) + ROWS_IN_TILES)

    return min(range(1, min(tiles, ceil_div(4 * processors, row_tiles)) + 1), key=work)


def _partials(rows: int, n: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # each begins on a vector of 16 bytes, whatever N is: else Triton compiles its kernel anew
    size = ceil_div(rows * n, 4) * 4
    values = torch.empty((parts, size), dtype=torch.float32, device=device)
    return values[:, : rows * n].view(parts, rows, n), torch.empty(
        (rows, n), dtype=torch.int32, device=device
    )


def backward(
    inputs: Inputs,
    lse: Tensor,  # [N]
    row_gradients: RowGradients,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, each None where it is not needed."""
    x, bias, weighted, precision = inputs.x, inputs.bias, inputs.weighted, inputs.precision
    p = row_statistics_gpu.problem(inputs, gradient=True)
    compact = needs.compact and p.classes is not None
    dweight = row_statistics_gpu.weight_gradient(p, compact) if needs.weight else None
    make = torch.empty_like if p.classes is None and p.n > 0 else torch.zeros_like
    dbias = make(p.bias) if needs.bias and p.bias is not None else None
    if p.n == 0 or p.count == 0:
        return torch.zeros_like(x) if needs.x else None, dweight, dbias
    given = (row_gradients.lse, row_gradients.target, row_gradients.weighted if weighted else None)
    grads = [None if g is None else g.to(torch.float32).contiguous() for g in given]
    unscale = None
    if p.low == torch.float16:
        scale = float16_scale(grads, p.column_weight)
        grads, unscale = [None if g is None else g * scale for g in grads], (1 / scale).reshape(1)
    of_row = RowVectors(p.positions, p.bend, lse.contiguous(), *grads)
    owner = _owner_tiles(p, bias is not None or weighted)
    if p.low == torch.float16 and p.normalize and needs.x:
        # G over a short row's length is none, and rows cannot be multiplied on their way there
        owner = None
    # a class tile a processor at least, else the library products fill the GPU better
    if owner is not None and p.count >= owner[1].columns * gpu_device.processors(x.device):
        dx = _owners(p, owner, of_row, unscale, needs.x, dweight, dbias, compact)
    else:
        with float32_products(precision == "tf32"):
            dx = _chunks(p, of_row, unscale, needs.x, dweight, dbias, compact)
    if dx is not None:
        dx = (dx if unscale is None else dx * unscale).to(x.dtype)
    return dx, dweight, dbias


def _owner_tiles(p: Problem, extra: bool) -> tuple[Tile, Tile] | None:
    """Tiles of `owner_rows` and `owner_classes` where a whole row fits in one, else None."""
    row_bytes = p.d * p.x.element_size()
    wide = "" if row_bytes <= (512 if p.products == "rounded" else 256) else "_wide"
    names = f"owner_rows{wide}", f"owner_classes{wide}"
    tiles = _table(p).tiles
    if row_bytes > 512 or (names[0], p.products) not in tiles:
        return None
    if wide and extra and p.bend is not None:  # together they spill on sm_86
        return None
    return tiles[names[0], p.products], tiles[names[1], p.products]


def _owners(
    p: Problem,
    owner: tuple[Tile, Tile],
    of_row: RowVectors,
    unscale: Tensor | None,
    need_x: bool,
    dweight: Tensor | None,
    dbias: Tensor | None,
    compact: bool,  # dweight has a row for each of `classes`
) -> Tensor | None:
    """The form without stored G: owners of class tiles for dw, then owners of row tiles for dx."""
    depth = width(p.d)
    strides = (p.x.stride(0), p.weight.stride(0))
    flags = dict(BD=depth, EVEN=depth == p.d, BF16=p.bf16, DOT=p.dot)
    # the one buffer of C values, 1/D of W: the owners of classes leave their norms to those of rows
    inverse = None
    if p.normalize and need_x:
        inverse = torch.empty(p.count, dtype=torch.float32, device=p.x.device)
    if dweight is not None or dbias is not None:
        tile = owner[1]
        stride = 0 if dweight is None else dweight.stride(0)
        triton_launch.launch(
            kernel("row_statistics.triton_backward.owner_classes"),
            ceil_div(p.count, tile.columns),
            (p.x, p.weight, ClassVectors.of(p), of_row, inverse, unscale, dweight, dbias)
            + (*strides, stride, p.n, p.count, p.d),
            dict(BM=tile.rows, BN=tile.columns, NORMALIZE=p.normalize, COMPACT=compact) | flags,
            tile,
        )
    elif inverse is not None:
        triton_chunks.norms(p, inverse, 0, p.count)
    if not need_x:
        return None
    tile = owner[0]
    row_tiles, tiles = ceil_div(p.n, tile.rows), ceil_div(p.count, tile.columns)
    # four programs a processor; each adds its classes into its own dx
    steps = ceil_div(tiles, max(1, ceil_div(4 * gpu_device.processors(p.x.device), row_tiles)))
    splits = ceil_div(tiles, steps)
    parts = torch.empty((splits, p.n, p.d), dtype=torch.float32, device=p.x.device)
    triton_launch.launch(
        kernel("row_statistics.triton_backward.owner_rows"),
        row_tiles * splits,
        (p.x, p.weight, ClassVectors.of(p, inverse), of_row, parts)
        + (*strides, p.n, p.count, p.d, row_tiles, steps),
        dict(BM=tile.rows, BN=tile.columns) | flags,
        tile,
    )
    return parts.sum(0)


def _chunks(
    p: Problem,
    of_row: RowVectors,
    unscale: Tensor | None,
    need_x: bool,
    dweight: Tensor | None,
    dbias: Tensor | None,
    compact: bool,
) -> Tensor | None:
    """The form with a chunk of G stored, for any D."""
    extra = p.bias is not None or of_row.grad_weighted is not None
    table = _table(p)
    tile = table.tile(p, "gradient", extra, p.bend is not None)
    x, strides = p.x, (p.x.stride(0), p.weight.stride(0))

    def fill(
        part: slice, of_class: ClassVectors, ds: Tensor, sums: Tensor | None, first: int, end: int
    ) -> None:
        height = part.stop - part.start
        row_tiles = ceil_div(height, tile.rows)
        triton_launch.launch(
            kernel("row_statistics.triton_backward.gradient_tiles"),
            row_tiles * ceil_div(end - first, tile.columns),
            (x[part], p.weight, of_class, of_row.cut(part), ds, sums, *strides, ds.stride(0))
            + (height, first, end, p.d, row_tiles),
            dict(BM=tile.rows, BN=tile.columns, BK=tile.depth, EVEN=p.even(tile.depth))
            | dict(BF16=p.bf16, DOT=p.dot),
            tile,
        )

    given = (unscale, need_x, dweight, dbias, compact)
    sizes = partial(table.stored, x.device), table.norm_rows
    return triton_chunks.gradients(p, fill, tile, *sizes, *given)

"""The sweep over pairs on Triton, as `fused_losses.primitives.pairs` defines it.

Forward: partial statistics of every tile (at most PARTIAL_BYTES at a time), merged in float64.
Backward: a chunk of G at a time, and library products of it. Memory beyond the outputs: those two,
float32 sums of N x D and of a chunk's columns; never N x M.

At N = M = 32768, D = 512 (counted, roofline.md): both sides of an InfoNCE read 28 GB from L2,
where memeff's 128 x 128 reads 17: that tile spills here, with two classes of pairs. The backward
moves 50 GB, memeff's whole-row form 35. DRAM moves y once for every SWEEP_ROWS rows, and in the
backward x and dx once for every run of columns: the floor would take sums of all of dy besides.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.products import float32_products
from fused_losses.backends.gpu.tiles import Tile
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.backends.triton.launch import kernel
from fused_losses.base.numerics import row_dtype
from fused_losses.primitives.pairs import gpu
from fused_losses.primitives.pairs.gpu import Block, ColumnSums
from fused_losses.primitives.pairs.inputs import VALUE, PairInputs, PairNeeds
from fused_losses.primitives.pairs.triton_sweep import (
    TritonPairProblem,
    add_block,
    columns_within,
    problem,
    stored,
    stored_gradient,
)
from fused_losses.primitives.pairs.triton_tiles import TABLES

PARTIAL_BYTES = 64 << 20  # of a block's partials
SWEEP_ROWS = 8192  # rows of a forward block: 8 MiB at D = 512 in 16 bits stay in L2
PAIR_BYTES = 12  # of a stored pair at most: its square, G, and G of far pairs
# columns of a tile on any device: shapes alone say nothing of the architecture
COLUMNS = [t.columns for table in TABLES.values() for t in table.tiles.values()]
LEAST, MOST = min(COLUMNS), max(COLUMNS)


def workspace(p: PairInputs, needs: PairNeeds | None, width: int = 0) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward, which has fewer.

    width: of an attention's values.
    """
    (n, d), m = p.x.shape, p.y.shape[0]
    d += width
    # two classes of pairs, for rows and for columns
    partials = min(PARTIAL_BYTES, 64 * (n + LEAST) * (m + LEAST) // LEAST)
    # of G and of attention weights; float32 sums of a chunk's columns for y and for the values
    height, columns = min(n, gpu.ROW_BLOCK), min(m, gpu.MAX_CHUNK) + MOST
    stored = gpu_device.stored_bytes(p.x.device, n * m * PAIR_BYTES)
    stored = max(stored, height * MOST * PAIR_BYTES)
    chunk = min(stored, height * columns * PAIR_BYTES) + 2 * columns * d * 4
    # squares of pairs apart are stored in the forward, too
    most = partials + chunk if p.apart else max(partials, chunk)
    return most + 3 * (n + m) * d * 4 + 200 * (n + m)


# ---- statistics ---------------------------------------------------------------------------------


def statistics(p: PairInputs, reduction: str, cols: bool) -> tuple[Tensor, Tensor]:
    """rows and columns of `fused_losses.primitives.pairs`, [4, 2, N] and [4, 2, M or 0]."""
    s = problem(p, gradient=False)
    new = dict(dtype=row_dtype(p.x.device), device=p.x.device)
    rows = gpu.nothing_yet(s.n, new)
    columns = rows if p.triangle else gpu.nothing_yet(s.m if cols else 0, new)
    both = p.triangle or cols
    tile = s.tile("statistics", both)
    classes = 1 if s.p.x_labels is None else 2
    height = min(s.n, ceil_div(SWEEP_ROWS, tile.rows) * tile.rows)
    # four float32 statistics a class for each row of a column tile, and the same the other way
    tile_bytes = (
        16 * classes * (height + (ceil_div(height, tile.rows) * tile.columns if both else 0))
    )
    width = max(1, PARTIAL_BYTES // max(tile_bytes, 1)) * tile.columns
    width = min(width, ceil_div(s.m, tile.columns) * tile.columns)
    buffer = None
    if s.squares is not None:
        step = s.columns(tile)
        width = max(step, min(width, columns_within(s, tile, height, 4)) // step * step)
        buffer = torch.empty(height * width, dtype=torch.float32, device=p.x.device)
    sizes = [4 * classes * ceil_div(width, tile.columns) * height]
    sizes += [4 * classes * ceil_div(height, tile.rows) * width] if both else []
    kept = [torch.empty(size, dtype=torch.float32, device=p.x.device) for size in sizes]
    # the rows of a block stay in L2 while all columns go by
    for block in sorted(gpu.blocks(s.p, height, width)):
        first_row, row_end, first, end = block
        high, wide = row_end - first_row, end - first
        shapes = (ceil_div(wide, tile.columns), high), (ceil_div(high, tile.rows), wide)
        parts = [
            buffer[: 4 * classes * groups * length].view(4, classes, groups, length)
            for buffer, (groups, length) in zip(kept, shapes, strict=False)
        ]
        row_part, column_part = parts[0], parts[1] if both else None
        s.launch(
            kernel("pairs.triton_forward.statistics_tiles"),
            tile,
            block,
            (row_part, column_part),
            s.scored(block, buffer, tile),
            REDUCTION=reduction,
        )
        _merge(s, row_part, rows, (first_row, first), (tile.rows, tile.columns), reduction, False)
        if column_part is not None:
            firsts, sizes = (first, first_row), (tile.columns, tile.rows)
            _merge(s, column_part, columns, firsts, sizes, reduction, True)
    for out in (rows,) if p.triangle else (rows, columns):
        _each(out, "finish_vectors", (out,), reduction)
    return rows, rows[..., :0].clone() if p.triangle else columns


def _merge(
    s: TritonPairProblem,
    part: Tensor,  # [4, classes, groups, length]
    out: Tensor,  # [4, 2, N or M]
    firsts: tuple[int, int],
    sizes: tuple[int, int],
    reduction: str,
    columns: bool,
) -> None:
    """Adds a block's partials to the statistics of its rows (or columns)."""
    tile = Tile(16, 16, 0, 4, 2)
    _, classes, groups, length = part.shape
    programs = ceil_div(length, tile.rows)
    triton_launch.launch(
        kernel("pairs.triton_forward.merge_tiles"),
        programs * classes,
        (part, out, out.shape[-1], firsts[0], length, firsts[1], groups, programs),
        dict(
            CLASSES=classes,
            COLUMNS=columns,
            TRIANGLE=s.p.triangle,
            LSE=reduction == "lse",
            OWN=sizes[0],
            OTHER=sizes[1],
            BM=tile.rows,
            BT=tile.columns,
        ),
        tile,
    )


# ---- gradients ----------------------------------------------------------------------------------


def statistics_backward(
    grad_rows: Tensor,  # [2, 2, N]: of value and total
    grad_columns: Tensor,
    rows: Tensor,  # [4, 2, N]
    columns: Tensor,
    p: PairInputs,
    reduction: str,
    cols: bool,
    needs: PairNeeds,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, scale, x_bias and y_bias, each None where it is not needed."""
    s, both = problem(p, gradient=True), p.triangle or cols
    gain = gpu.statistics_gain(p, (grad_rows, grad_columns), (rows, columns))
    per_side = [_vectors(grad_rows, rows, reduction, gain)]
    if both:
        turned = (grad_columns, columns, reduction, gain)
        per_side += per_side if p.triangle else [_vectors(*turned)]
    tile = s.tile("gradient", both)
    gradients = s.gradients(gpu.possible(needs, p), 1 / gain)
    with float32_products(p.precision == "tf32"):
        for block, squares, buffers in stored(s, tile, *stored_gradient(s)):
            ds = buffers[0]
            s.launch(
                kernel("pairs.triton_backward.gradient_tiles"),
                tile,
                block,
                (per_side[0], per_side[1] if both else None, ds),
                squares,
                strides=(ds.stride(0),),
                REDUCTION=reduction,
            )
            add_block(s, gradients, block, squares, buffers)
    return gradients.results()


def _vectors(grad: Tensor, stats: Tensor, reduction: str, gain: Tensor | float) -> Tensor:
    """What the kernel wants of each class's rows, [2, VECTORS, N] float32 (`gpu.vectors`)."""
    size = stats.shape[-1]
    out = torch.empty((2, 4, size), dtype=torch.float32, device=stats.device)
    factor = gain.reshape(1) if isinstance(gain, Tensor) else None
    given = (grad.contiguous(), stats.contiguous(), factor, out)
    _each(stats, "gradient_vectors", given, reduction)
    return out


def _each(stats: Tensor, name: str, given: tuple, reduction: str) -> None:
    """A kernel over both classes' rows. stats [4, 2, N]"""
    size, tile = stats.shape[-1], Tile(256, 0, 0, 4, 1)
    if size:
        triton_launch.launch(
            kernel(f"pairs.triton_vectors.{name}"),
            ceil_div(2 * size, tile.rows),
            (*given, size),
            dict(LSE=reduction == "lse", BM=tile.rows),
            tile,
        )


# ---- attention ----------------------------------------------------------------------------------


def attention(values: Tensor, p: PairInputs, positives: bool) -> tuple[Tensor, Tensor]:
    """out [N, Dv] and lse [N] of `fused_losses.primitives.pairs.op.pair_attention`."""
    p, kind = gpu.attending(p, positives)
    lse = statistics(p, "lse", cols=False)[0][VALUE, kind].contiguous()
    s = problem(p, gradient=False)
    # a rounded forward would be no float32 accuracy: mixed rounds in the backward alone
    if p.precision == "mixed":
        s = replace(s, operands=replace(s.operands, low=p.x.dtype))
    out = torch.zeros((s.n, values.shape[1]), dtype=torch.float32, device=p.x.device)
    tile, base_rows, unit = s.tile("attention"), gpu.weight_base(lse), gpu.weight_unit(p)
    with float32_products(p.precision == "tf32"):
        for block, squares, (weights,) in stored(s, tile, s.operands.low):
            given = squares, kind, base_rows, weights, None, None, None, None, unit
            _attend(s, tile, block, *given)
            top, stop, first, end = block
            gpu.add(out[top:stop], gpu.cut(weights, block), values[first:end].to(weights.dtype))
    return out / unit, lse


def _attend(
    s: TritonPairProblem,
    tile: Tile,
    block: Block,
    squares: Tensor | None,
    kind: int,
    base_rows: Tensor,
    weights: Tensor | None,
    grad_out: Tensor | None,
    values: Tensor | None,
    shift: Tensor | None,
    ds: Tensor | None,
    unit: float,
) -> None:
    width = 0 if values is None else values.shape[1]
    stride = next(t.stride(0) for t in (weights, ds) if t is not None)
    strides = [0 if t is None else t.stride(0) for t in (grad_out, values)]
    s.launch(
        kernel("pairs.triton_attention.attention_tiles"),
        tile,
        block,
        (base_rows, weights, grad_out, values, shift, ds, unit),
        squares,
        strides=(*strides, stride),
        widths=(width,),
        KIND=kind,
        EVEN_WIDTH=width % tile.depth == 0,
    )


def attention_backward(
    grad_out: Tensor,  # [N, Dv]
    grad_lse: Tensor,  # [N]
    out: Tensor,
    lse: Tensor,
    values: Tensor,
    p: PairInputs,
    positives: bool,
    need_values: bool,
    needs: PairNeeds,
) -> tuple[Tensor | None, ...]:
    """Gradients of values, x, y, scale, x_bias and y_bias, each None where not needed."""
    p, kind = gpu.attending(p, positives)
    s = problem(p, gradient=True)
    low, unit, gain = s.operands.low, gpu.weight_unit(p), gpu.attention_gain(p, grad_out, grad_lse)
    # rounded as the products round it, so that G sums to zero over a row
    rounded = (grad_out * gain).to(low if s.operands.bf16 else values.dtype)
    shift = grad_lse * gain - (rounded.float() * out).sum(1)
    shift, base_rows = shift.float(), gpu.weight_base(lse)
    values = values if values.stride(-1) == 1 else values.contiguous()
    grad_rows = rounded.to(values.dtype).contiguous()
    grad_low = rounded.to(low)
    dvalues = None
    if need_values:
        dvalues = torch.empty(values.shape, dtype=values.dtype, device=values.device)
        dvalues = ColumnSums(dvalues if s.n else dvalues.zero_(), s.n, 1 / (gain * unit))
    want = any(needs)
    uneven = values.shape[1] % 64 > 0 or values.stride(0) % 16 > 0
    tile = s.tile("attention_gradient" if want else "attention", more=want and uneven)
    gradients = s.gradients(gpu.possible(needs, p), 1 / gain)
    with float32_products(p.precision == "tf32"):
        kept = [low] * need_values + stored_gradient(s) * want
        for block, squares, buffers in stored(s, tile, *kept):
            weights = buffers[0] if need_values else None
            ds = buffers[int(need_values)] if want else None
            given = squares, kind, base_rows, weights, grad_rows, values, shift, ds, unit
            _attend(s, tile, block, *given)
            if dvalues is not None and weights is not None:
                dvalues.add(block, gpu.cut(weights, block), grad_low)
            if want:
                add_block(s, gradients, block, squares, buffers)
    return (None if dvalues is None else dvalues.out, *gradients.results())

"""`row_statistics` on the CUDA C++ kernels: a library product into a tile, our kernel after it.

The classes go by in chunks, and rows in blocks, with a tile of scores [block, chunk], float32, as
large as memory allows (SIZES). Forward: score_rows merges the tile into each row's state. Backward:
gradient_rows turns the tile into G in place, then dx += G W and dW = G^T x are library products.
The kernels: csrc/cuda/row_statistics/, gather.cu. Memory never N x C; of C values the gradients
alone; rows of W are copied by the chunk, where `classes` gathers them or a product needs a cast.

Between L2 and the processors a score costs, beside what products read of x and W, 8 bytes in the
forward, and in the backward 8 + 3 g, with g = 2 or 4 of G: written once, read by two products.

A chunk is a handful of launches of a few microseconds each: capture the step in a CUDA graph where
the launches cost more than the work. Nothing here waits for the device or looks at its data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.cuda.launch import ELEMENTS
from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.library_products import (
    add_product,
    low_dtype,
    product,
    scores_precision,
)
from fused_losses.backends.gpu.products import add_rows, float16_scale, float32_products
from fused_losses.primitives.row_statistics import gpu as row_statistics_gpu
from fused_losses.primitives.row_statistics.gpu import Problem
from fused_losses.primitives.row_statistics.inputs import Inputs, Needs, RowGradients

STEP = 16  # a tile's columns are a multiple of it: whole packs, of 16-bit values too
MOST_PARTS = 32  # of a row's state, as finish_rows merges them
ROWS_A_SUM = 64  # of G that one thread adds up for dbias
MOST_SPLITS = 16  # of a chunk, for dx


@dataclass(frozen=True)
class Sizes:
    """How a call is cut up."""

    tile_bytes: int  # of a chunk, at most
    rows: int  # of a block, at most
    classes: int  # of a chunk, at most
    part: int  # columns of a row that one warp goes through, at least
    split_rows: int  # of the parts of dx, together

    def chunk(
        self, block: int, count: int, each: int, device: torch.device, whole: int = STEP
    ) -> int:
        """Classes of a chunk, a multiple of `whole`; each: bytes of one, but for its scores."""
        each += 4 * block
        stored = min(self.tile_bytes, gpu_device.stored_bytes(device, each * count))
        fitting = min(stored // each, self.classes, ceil_div(count, whole) * whole)
        return max(1, fitting // whole) * whole


# few chunks: those that stay in L2 take launches that cost more than DRAM does (roofline.md)
CHIPS = Sizes(gpu_device.STORED_BYTES, 16384, 1 << 17, 1024, 8192)
SIZES = dict.fromkeys(("sm_80", "sm_86", "sm_90", "sm_100"), CHIPS) | {
    # small, so that a few hundred rows and classes make several ragged tiles
    "interpret": Sizes(64 << 10, 64, 256, 16, 128),
}


def workspace(p: Inputs, needs: Needs | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    (n, d), host = p.x.shape, cuda_launch.on_host()
    count = p.weight.shape[0] if p.classes is None else p.classes.shape[0]
    sizes = SIZES["interpret"] if host else CHIPS
    block = max(1, min(n, sizes.rows))
    each = 0 if needs is None else 4 * d
    whole = STEP * (1 if needs is None else MOST_SPLITS)
    chunk = max(whole, sizes.chunk(block, count, each, p.x.device))
    # the chunk's rows, gathered or cast, in the backward in two dtypes, and its dW; columns' values
    values = chunk * ((1 if needs is None else 3) * d + 16)
    scores = block * chunk
    if host:  # where 16-bit operands are widened
        values, scores = 2 * values, 2 * scores + n * d
    sums = ceil_div(n, ROWS_A_SUM) * chunk
    rows = n * (MOST_PARTS * 6 + 32) + (max(n, sizes.split_rows) + 3 * n) * d
    return 4 * (values + scores + sums + rows)


class Chunks:
    """The classes of a problem in chunks: their rows as a product takes them, 1/|w|, bias, v."""

    def __init__(self, p: Problem, chunk: int) -> None:
        self.p, self.chunk = p, chunk
        device = p.x.device
        self.inverse = torch.empty(chunk, device=device) if p.normalize else None
        self.rows: Tensor | None = None  # where they are copied

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.p.count, self.chunk):
            yield first, min(first + self.chunk, self.p.count)

    def ids(self, first: int, end: int) -> Tensor | None:
        return None if self.p.classes is None else self.p.classes[first:end]

    def values(self, of_class: Tensor | None, first: int, end: int) -> Tensor | None:
        """Columns' values in float32, from a vector over all classes."""
        if of_class is None:
            return None
        ids = self.ids(first, end)
        return (of_class[first:end] if ids is None else of_class[ids]).float().contiguous()

    def weight(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows of W in this dtype, copied only if gathered or cast; fills `inverse`."""
        p, ids = self.p, self.ids(first, end)
        rows = p.weight[first:end] if ids is None else p.weight
        out = None
        if ids is not None or dtype != p.weight.dtype:
            if self.rows is None:
                self.rows = torch.empty((self.chunk, p.d), dtype=dtype, device=p.x.device)
            out = self.rows[: end - first]
        if out is not None or self.inverse is not None:
            cuda_launch.launch(
                "gather",
                rows=rows,
                classes=ids,
                out=out,
                inverse=self.inverse,
                stride=rows.stride(0),
                count=end - first,
                d=p.d,
                type=ELEMENTS[p.weight.dtype],
                out_type=ELEMENTS[dtype],
            )
        return rows if out is None else out


def _blocks(n: int, block: int) -> list[slice]:
    return [slice(top, min(top + block, n)) for top in range(0, n, block)]


def _check_dtype(inputs: Inputs) -> None:
    """What `backends.choose` refuses, for calls of the op itself."""
    if inputs.weight.dtype not in ELEMENTS:
        raise RuntimeError(f"cuda: {inputs.weight.dtype}: expected float32, bfloat16 or float16")


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse, target, weighted_sum, hardest, hardest_score (`row_statistics`)."""
    _check_dtype(inputs)
    p = row_statistics_gpu.checked_problem(inputs)
    n, device, weighted = p.n, p.x.device, inputs.weighted
    lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
    target = torch.zeros_like(lse)
    weighted_sum = torch.zeros(n if weighted else 0, device=device)
    hardest = torch.full((n,), -1, dtype=torch.int64, device=device)
    hardest_score = torch.full((n,), -torch.inf, device=device)
    if n == 0 or p.count == 0:
        return lse, target, weighted_sum, hardest, hardest_score
    sizes = SIZES[gpu_device.architecture(device)]
    block = min(n, sizes.rows)
    chunk = sizes.chunk(block, p.count, 0, device)
    parts = min(ceil_div(16 * gpu_device.processors(device), block), chunk // sizes.part)
    parts = max(1, min(parts, MOST_PARTS))
    high = torch.empty((parts, n), device=device)
    mass = torch.empty((parts, n), dtype=torch.float64, device=device)
    best = torch.empty((parts, n), dtype=torch.int32, device=device)
    moment = torch.empty_like(mass) if weighted else None
    tile = torch.empty((block, chunk), device=device)
    precision = scores_precision(inputs.precision, gradient=False)
    x = p.x.to(low_dtype(p.x.dtype, precision))
    chunks = Chunks(p, chunk)
    for first, end in chunks:
        w = chunks.weight(first, end, x.dtype)
        bias = chunks.values(p.bias, first, end)
        column_weight = chunks.values(p.column_weight, first, end) if weighted else None
        for part in _blocks(n, block):
            height = part.stop - part.start
            product(x[part], w.T, precision, out=tile[:height, : end - first])
            cuda_launch.launch(
                "row_scores",
                products=tile,
                inverse=chunks.inverse,
                bias=bias,
                column_weight=column_weight,
                bend=None if p.bend is None else p.bend[part],
                positions=p.positions[part],
                high=high[:, part],
                mass=mass[:, part],
                best=best[:, part],
                moment=None if moment is None else moment[:, part],
                stride=chunk,
                rows=height,
                length=end - first,
                first=first,
                parts=parts,
                state_stride=n,
            )
    cuda_launch.launch(
        "row_finish",
        x=p.exact,
        weight=p.weight,
        positions=p.positions,
        classes=p.classes,
        high=high,
        mass=mass,
        best=best,
        moment=moment,
        lse=lse,
        target=target,
        weighted=weighted_sum if weighted else None,
        hardest=hardest,
        hardest_score=hardest_score,
        stride_x=p.exact.stride(0),
        stride_w=p.weight.stride(0),
        n=n,
        d=p.d,
        parts=parts,
        type=ELEMENTS[p.weight.dtype],
        type_x=ELEMENTS[p.exact.dtype],
        normalize=p.normalize,
    )
    return lse, target, weighted_sum, hardest, hardest_score


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
    make = torch.empty if p.classes is None and p.n > 0 else torch.zeros
    dbias = make(bias.shape, device=x.device) if needs.bias and bias is not None else None
    if p.n == 0 or p.count == 0:
        dx = torch.zeros_like(x) if needs.x else None
        return dx, dweight, _like(dbias, bias)
    given = (row_gradients.lse, row_gradients.target, row_gradients.weighted if weighted else None)
    grads = [None if g is None else g.float().contiguous() for g in given]
    unscale = None
    if p.low == torch.float16:
        scale = float16_scale(grads, p.column_weight)
        grads, unscale = [None if g is None else g * scale for g in grads], (1 / scale).reshape(1)
    rows = [lse.float().contiguous(), *grads]
    with float32_products(precision == "tf32"):
        dx = _sweep(p, precision, rows, unscale, needs.x, dweight, dbias, compact)
    if dx is not None:
        dx = (dx if unscale is None else dx * unscale).to(x.dtype)
    return dx, dweight, _like(dbias, bias)


def _like(sums: Tensor | None, bias: Tensor | None) -> Tensor | None:
    return None if sums is None or bias is None else sums.to(bias.dtype)


def _sweep(
    p: Problem,
    precision: str,
    rows: list[Tensor | None],  # lse and the gradients that come in, [N] each
    unscale: Tensor | None,
    need_x: bool,
    dweight: Tensor | None,
    dbias: Tensor | None,
    compact: bool,  # dweight has a row for each of `classes`
) -> Tensor | None:
    n, d, low, device = p.n, p.d, p.low, p.x.device
    sizes = SIZES[gpu_device.architecture(device)]
    block = min(n, sizes.rows)
    # dx has few tiles: its classes are split over as many products as fill the GPU, added at last
    splits = max(1, min(MOST_SPLITS, sizes.split_rows // block)) if n == block else 1
    chunk = sizes.chunk(block, p.count, 4 * d * (dweight is not None), device, STEP * splits)
    piece = chunk // splits
    tile = torch.empty((block, chunk), device=device)
    runs = ceil_div(block, ROWS_A_SUM)
    sums = None
    if dbias is not None:
        sums = torch.empty((ceil_div(n, block) * runs, chunk), device=device)
    precision_of_scores = scores_precision(precision, gradient=True)
    x = p.x.to(low_dtype(p.x.dtype, precision_of_scores))
    x_low = x.to(low)
    # the product writes straight into dweight where nothing has to be done to it afterwards
    direct = not p.normalize and unscale is None and n == block
    direct = direct and (p.classes is None or compact)
    direct = direct and dweight is not None and dweight.dtype == low
    gradient = None
    if dweight is not None and not direct:
        gradient = torch.empty((chunk, d), device=device)
    dx = torch.zeros((splits, n, d), device=device) if need_x else None
    chunks = Chunks(p, chunk)
    for first, end in chunks:
        length = end - first
        w = chunks.weight(first, end, x.dtype)
        inverse, shift = chunks.inverse, None
        if low == torch.float16 and inverse is not None:
            w, inverse, shift = row_statistics_gpu.near_one(w, inverse)
        w_low = w.to(low) if need_x else None
        bias = chunks.values(p.bias, first, end)
        column_weight = chunks.values(p.column_weight, first, end) if rows[3] is not None else None
        for i, part in enumerate(_blocks(n, block)):
            height = part.stop - part.start
            product(x[part], w.T, precision_of_scores, out=tile[:height, :length])
            lse, grad_lse, grad_target, grad_weighted = (r if r is None else r[part] for r in rows)
            cuda_launch.launch(
                "row_gradient",
                products=tile,
                inverse=inverse,
                bias=bias,
                column_weight=column_weight,
                bend=None if p.bend is None else p.bend[part],
                positions=p.positions[part],
                lse=lse,
                grad_lse=grad_lse,
                grad_target=grad_target,
                grad_weighted=grad_weighted,
                sums=None if sums is None else sums[i * runs :],
                stride=chunk,
                rows=height,
                length=length,
                first=first,
                rows_a_sum=ROWS_A_SUM,
                out_type=ELEMENTS[low],
            )
            g = tile.view(low)[:height, :length]
            if dx is not None and w_low is not None:
                add_rows(dx[:, part], g, w_low, piece)
            if direct and dweight is not None:
                torch.mm(g.T, x_low, out=dweight[first:end])
            elif gradient is not None:
                beta = float(part.start > 0)
                add_product(gradient[:length], g.T, x_low[part], precision, beta)
        if gradient is not None and shift is not None:
            gradient[:length] *= shift
        if gradient is not None or sums is not None:
            cuda_launch.launch(
                "row_weight",
                gradient=gradient,
                weight=p.weight,
                inverse=chunks.inverse,
                classes=chunks.ids(first, end),
                sums=sums,
                unscale=unscale,
                dweight=None if gradient is None else dweight,
                dbias=dbias,
                stride_w=p.weight.stride(0),
                stride_dw=0 if dweight is None else dweight.stride(0),
                stride_sums=chunk,
                first=first,
                count=length,
                d=d,
                runs=ceil_div(n, block) * runs - runs + ceil_div(height, ROWS_A_SUM),
                type=ELEMENTS[p.weight.dtype],
                compact=compact,
            )
    return None if dx is None else dx.sum(0)

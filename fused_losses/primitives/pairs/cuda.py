"""The sweep over pairs on the CUDA C++ kernels, as `fused_losses.primitives.pairs` defines it.

A library product makes a large tile of scores; kernels turn it into statistics, into G
or into attention weights, in place where those are float32, and library products take them from
there. Forward statistics read a tile once for rows and once for columns. Memory beyond the outputs:
the tiles, sums of N x D and of a chunk's columns in float32; never N x M.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.library_products import low_dtype, product, scores_precision
from fused_losses.backends.gpu.products import float32_products
from fused_losses.base.numerics import row_dtype
from fused_losses.primitives.distances.cuda_products import (
    NEAR,
    distances_of_products,
    squared_norms,
)
from fused_losses.primitives.distances.cuda_sums import TILE, gradient
from fused_losses.primitives.pairs import apart, gpu
from fused_losses.primitives.pairs.gpu import Block, ColumnSums, PairGradients, PairProblem
from fused_losses.primitives.pairs.gpu_apart import ApartGradients, SplitBlock
from fused_losses.primitives.pairs.inputs import REDUCTIONS, PairInputs, PairNeeds

PAIR_BYTES = 16  # of a pair in all tiles of a block, at most
WIDTH = 64  # tiles are a multiple of it wide: rows start on 16 bytes in every type
HOST_ROWS, HOST_BYTES = 160, 128 << 10  # in the host execution: several ragged blocks of few pairs
SEGMENT = 128  # rows that a block of threads goes down: csrc/cuda/pairs/tile.h


def workspace(p: PairInputs, needs: PairNeeds | None, width: int = 0) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward, which has fewer.

    width: of an attention's values.
    """
    (n, d), m = p.x.shape, p.y.shape[0]
    d += width
    height, columns = min(n, gpu.ROW_BLOCK), min(ceil_div(m, WIDTH) * WIDTH, gpu.MAX_CHUNK)
    # tiles, the columns' sums of segments, and float32 sums of a chunk's columns
    tiles = gpu_device.stored_bytes(p.x.device, n * m * PAIR_BYTES)
    tiles = min(max(tiles, height * WIDTH * PAIR_BYTES), height * columns * PAIR_BYTES)
    parts = 4 * 2 * 4 * ceil_div(height, SEGMENT) * columns
    return tiles + parts + 2 * columns * d * 4 + 3 * (n + m) * d * 4 + 200 * (n + m)


@dataclass(frozen=True)
class CudaPairProblem(PairProblem):
    """Its operands for a library's products, and the launches of its kernels."""

    x: Tensor  # [N, D] as products multiply it
    y: Tensor  # [M, D]
    precision: str  # of the scores
    low: torch.dtype  # of G and what it is multiplied with
    norms: tuple[Tensor, Tensor] | None  # of pairs apart: |x|^2 [N] and |y|^2 [M] float32

    @property
    def share(self) -> float:
        return apart.share(self.p.precision)

    @property
    def wide(self) -> bool:
        """Whether G and weights are float32, and may take the place of what they are made of."""
        return self.low == torch.float32

    def scores(self, block: Block, tile: Tensor) -> None:
        """Products of a block into its tile, or squared distances; listed pairs are marked."""
        top, stop, first, end = block
        product(self.x[top:stop], self.y[first:end].T, self.precision, out=gpu.cut(tile, block))
        if self.norms is not None:
            norms = self.norms[0][top:stop], self.norms[1][first:end]
            rows = self.p.x[top:stop], self.p.y[first:end]
            distances_of_products(*rows, *norms, gpu.cut(tile, block), False, self.share)
        exclude = self.p.exclude
        if exclude is not None and exclude.numel():
            self.launch("pair_exclude", tile, block, exclude=exclude, excluded=exclude.shape[1])

    def launch(
        self,
        kernel: str,
        tile: Tensor,
        block: Block,
        reduction: str = "lse",
        **more: Tensor | float | None,
    ) -> None:
        p = self.p
        first_row, row_end, first_column, column_end = block
        cuda_launch.launch(
            kernel,
            tile=tile,
            stride=tile.stride(0),
            scale=self.scale,
            x_bias=p.x_bias,
            y_bias=p.y_bias,
            x_labels=p.x_labels,
            y_labels=p.y_labels,
            x_ids=p.x_ids,
            y_ids=p.y_ids,
            x_groups=p.x_groups,
            y_groups=p.y_groups,
            x_window=p.x_window,
            y_window=p.y_window,
            **{f"positive_{name}": value for name, value in p.positive._asdict().items()},
            **{f"negative_{name}": value for name, value in p.negative._asdict().items()},
            root=p.score == "root",
            skip_self=p.skip_self,
            triangle=p.triangle,
            reduction=REDUCTIONS.index(reduction),
            n=self.n,
            m=self.m,
            first_row=first_row,
            row_end=row_end,
            first_column=first_column,
            column_end=column_end,
            **more,
        )

    def gradients(
        self, needs: PairNeeds, unscale: Tensor | float
    ) -> PairGradients | ApartGradients:
        given = self.p, self.x.to(self.low), self.y
        if self.p.apart:
            return ApartGradients(*given, -self.scale, needs, unscale, self.near_sums)
        return PairGradients(*given, self.scale, needs, unscale)

    # ---- pairs apart ----------------------------------------------------------------------------

    def near_norms(self, block: Block) -> tuple[Tensor, Tensor]:
        """|x|^2 and |y|^2 as `is_near` of the kernels takes them, whose share is NEAR."""
        assert self.norms is not None
        top, stop, first, end = block
        factor = self.share / NEAR
        return self.norms[0][top:stop] * factor, self.norms[1][first:end] * factor

    def split(self, block: Block, g: Tensor, squares: Tensor, far: Tensor) -> SplitBlock:
        """A tile of G without its near pairs, into `far`; all of the tiles' full width."""
        n, m = block.row_end - block.first_row, block.column_end - block.first_column
        new = partial(torch.empty, device=far.device)
        across, down = -(-m // TILE), -(-n // TILE)
        x_norms, y_norms = self.near_norms(block)
        row_sums, moments = new((across, n)), new((across, n))
        column_sums, near = new((down, m)), new((down, across), dtype=torch.int32)
        cuda_launch.launch(
            "pair_split",
            g=g,
            squares=squares,
            x_norms=x_norms,
            y_norms=y_norms,
            far=far,
            row_sums=row_sums,
            column_sums=column_sums,
            moments=moments,
            near=near,
            stride=g.stride(0),
            far_stride=far.stride(0),
            n=n,
            m=m,
            type=cuda_launch.ELEMENTS[self.low],
        )
        moment = moments.sum(dtype=row_dtype(far.device))
        return SplitBlock(gpu.cut(far, block), row_sums.sum(0), column_sums.sum(0), moment, near)

    def near_sums(
        self, block: Block, g: Tensor, squares: Tensor, near: Tensor, to: Tensor, turned: bool
    ) -> None:
        top, stop, first, end = block
        x, y, norms = self.p.x[top:stop], self.p.y[first:end], self.near_norms(block)
        g, squares = gpu.cut(g, block), gpu.cut(squares, block)
        if turned:
            x, y, norms, near = y, x, (norms[1], norms[0]), near.T
            g, squares = g.T, squares.T
        gradient("near_pair", x, y, g, squares, norms=norms, near=near, to=to)


def problem(p: PairInputs, gradient: bool) -> CudaPairProblem:
    p, scale = gpu.kernel_form(p)
    if p.apart:
        p = p._replace(x=p.x.contiguous(), y=p.y.contiguous())
    precision = scores_precision(p.precision, gradient)
    low = low_dtype(p.x.dtype, precision)
    x, y, norms = p.x.to(low), p.y.to(low), None
    if p.apart:
        x_norms = squared_norms(x)
        # the kernels score squared distances
        norms, scale = (x_norms, x_norms if p.triangle else squared_norms(y)), -scale
    # a rounded forward would be no float32 accuracy: mixed rounds in the backward alone
    low = low_dtype(p.x.dtype, p.precision) if gradient else low
    if gradient and p.score == "root" and low == torch.float16:
        # the slope of a root, 1 / (2 d), takes G of short distances out of float16's range
        low = torch.float32
    return CudaPairProblem(p, scale, x, y, precision, low, norms)


def tiles(
    s: CudaPairProblem, *dtypes: torch.dtype, backward: bool = False
) -> Iterator[tuple[Block, list[Tensor]]]:
    """Blocks of the matrix, and a tile of each dtype that every block uses anew.

    Forward the columns stream by a run of rows; backward sums down a run of
    columns at a time.
    """
    size = sum(t.itemsize for t in dtypes)
    most, tall = gpu_device.stored_bytes(s.p.x.device, s.n * s.m * size), gpu.ROW_BLOCK
    if cuda_launch.on_host():
        most, tall = HOST_BYTES, HOST_ROWS
    height = min(s.n, tall)
    width = most // (max(height, 1) * size * WIDTH)
    width = min(max(width, 1), gpu.MAX_CHUNK // WIDTH, -(-s.m // WIDTH)) * WIDTH
    made = [torch.empty((height, width), dtype=t, device=s.p.x.device) for t in dtypes]
    order = gpu.blocks(s.p, height, width)
    for block in order if backward else sorted(order):
        yield block, made


# ---- statistics ---------------------------------------------------------------------------------


def statistics(p: PairInputs, reduction: str, cols: bool) -> tuple[Tensor, Tensor]:
    """rows and columns of `fused_losses.primitives.pairs`, [4, 2, N] and [4, 2, M or 0]."""
    s, both = problem(p, gradient=False), p.triangle or cols
    new: dict[str, Any] = dict(dtype=row_dtype(p.x.device), device=p.x.device)
    rows = gpu.nothing_yet(s.n, new)
    columns = rows if p.triangle else gpu.nothing_yet(s.m if cols else 0, new)
    parts = None
    for block, (tile,) in tiles(s, torch.float32):
        if both and parts is None:
            shape = (-(-tile.shape[0] // SEGMENT), 4, 2, tile.shape[1])
            parts = torch.empty(shape, dtype=torch.float32, device=p.x.device)
        s.scores(block, tile)
        more = dict(rows=rows, columns=columns if both else None, parts=parts)
        s.launch("pair_statistics", tile, block, reduction, **more)
    for out in (rows,) if p.triangle else (rows, columns):
        gpu.finish(out, reduction)
    return rows, rows[..., :0].clone() if p.triangle else columns


def _add(
    s: CudaPairProblem,
    gradients: PairGradients | ApartGradients,
    block: Block,
    ds: Tensor,
    tile: Tensor,
    far: Tensor,
) -> None:
    """What a tile of G makes; pairs apart: beside that of their squares, and room for `far`."""
    if isinstance(gradients, ApartGradients):
        gradients.add(block, ds, tile, s.split(block, ds, tile, far))
    else:
        gradients.add(block, gpu.cut(ds, block))


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
    row_vectors = gpu.packed(gpu.vectors(grad_rows, rows, reduction), gain)
    column_vectors = row_vectors if p.triangle else None
    if cols and not p.triangle:
        column_vectors = gpu.packed(gpu.vectors(grad_columns, columns, reduction), gain)
    gradients = s.gradients(gpu.possible(needs, p), 1 / gain)
    with float32_products(p.precision == "tf32"):
        low = (torch.float32, s.low) if p.apart else () if s.wide else (s.low,)
        for block, made in tiles(s, torch.float32, *low, backward=True):
            # pairs apart: the squares stay, and the tile after G is that of its products
            tile, ds = made[0], made[1 if p.apart else -1]
            s.scores(block, tile)
            s.launch(
                "pair_gradients",
                tile,
                block,
                reduction,
                row_vectors=row_vectors,
                column_vectors=column_vectors if both else None,
                ds=ds,
                ds_stride=ds.stride(0),
                type=cuda_launch.ELEMENTS[ds.dtype],
            )
            _add(s, gradients, block, ds, tile, made[-1])
    return gradients.results()


# ---- attention ----------------------------------------------------------------------------------


def attention(values: Tensor, p: PairInputs, positives: bool) -> tuple[Tensor, Tensor]:
    """out [N, Dv] and lse [N] of `pair_attention`, in one sweep."""
    p, kind = gpu.attending(p, positives)
    s = problem(p, gradient=False)
    new: dict[str, Any] = dict(device=p.x.device)
    out = torch.zeros((s.n, values.shape[1]), dtype=torch.float32, **new)
    best = torch.full((s.n,), -torch.inf, dtype=torch.float32, **new)
    mass = torch.zeros(s.n, dtype=row_dtype(p.x.device), **new)
    unit = gpu.weight_unit(p)
    with float32_products(p.precision == "tf32"):
        for block, made in tiles(s, torch.float32, *(() if s.wide else (s.low,))):
            tile, weights = made[0], made[-1]
            s.scores(block, tile)
            s.launch(
                "pair_attention",
                tile,
                block,
                kind=kind,
                best=best,
                mass=mass,
                out=out,
                width=out.shape[1],
                weights=weights,
                weight_stride=weights.stride(0),
                unit=unit,
                type=cuda_launch.ELEMENTS[s.low],
            )
            top, stop, first, end = block
            gpu.add(out[top:stop], gpu.cut(weights, block), values[first:end].to(s.low))
    some = torch.where(mass == 0, 1, mass)
    lse = torch.where(mass == 0, -torch.inf, best + some.log())
    return out.mul_((1 / (some * unit)).float()[:, None]), lse


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
    unit, gain = gpu.weight_unit(p), gpu.attention_gain(p, grad_out, grad_lse)
    # rounded as the products round it, so that G sums to zero over a row
    rounded = (grad_out * gain).to(low_dtype(values.dtype, s.precision))
    shift = (grad_lse * gain - (rounded.float() * out).sum(1)).float()
    base, grad_low = gpu.weight_base(lse), rounded.to(s.low)
    dvalues = None
    if need_values:
        dvalues = torch.empty(values.shape, dtype=values.dtype, device=values.device)
        dvalues = ColumnSums(dvalues if s.n else dvalues.zero_(), s.n, 1 / (gain * unit))
    want = any(needs)
    low = () if s.wide and not p.apart else (s.low,) * (need_values + want)
    gradients = s.gradients(gpu.possible(needs, p), 1 / gain)
    with float32_products(p.precision == "tf32"):
        for block, made in tiles(s, *(torch.float32,) * (1 + want), *low, backward=True):
            tile, into = made[0], made[1] if want else None
            # the weights take the place of the scores, G that of the other product
            weights, ds = made[-1 - want] if need_values else None, made[-1] if want else None
            ds = into if p.apart else ds
            s.scores(block, tile)
            top, stop, first, end = block
            if into is not None:
                of_values = values[first:end].to(rounded.dtype).T
                product(rounded[top:stop], of_values, s.precision, out=gpu.cut(into, block))
            s.launch(
                "pair_attention_gradients",
                tile,
                block,
                kind=kind,
                base=base,
                shift=shift,
                into=into,
                weights=weights,
                ds=ds,
                ds_type=cuda_launch.ELEMENTS[s.low if ds is None else ds.dtype],
                low_stride=made[-1].stride(0),
                unit=unit,
                type=cuda_launch.ELEMENTS[s.low],
            )
            if dvalues is not None and weights is not None:
                dvalues.add(block, gpu.cut(weights, block), grad_low)
            if ds is not None:
                _add(s, gradients, block, ds, tile, made[-1])
    return (None if dvalues is None else dvalues.out, *gradients.results())

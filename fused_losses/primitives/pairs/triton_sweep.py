"""A sweep over pairs as the Triton kernels want it: its launches, and blocks that are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.product import Product
from fused_losses.backends.gpu.tiles import Tile, TileTable
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.primitives.pairs import gpu
from fused_losses.primitives.pairs.gpu import Block, PairGradients, PairProblem
from fused_losses.primitives.pairs.gpu_apart import ApartGradients
from fused_losses.primitives.pairs.inputs import PairInputs, PairNeeds, Rule
from fused_losses.primitives.pairs.triton_apart import Squares, columns_of
from fused_losses.primitives.pairs.triton_tiles import TABLES


class Side(NamedTuple):
    """One side of the matrix as the kernels read it; all but its rows may be missing."""

    rows: Tensor  # [N, D]
    bias: Tensor | None  # [N] float32
    labels: Tensor | None  # [N] int32
    ids: Tensor | None  # [N] int32
    groups: Tensor | None  # [N] int32
    window: Tensor | None  # [4, N] float32
    stride: int


@dataclass(frozen=True)
class TritonPairProblem(PairProblem):
    """Its operands and tiles, and the launches of its kernels."""

    operands: Product
    squares: Squares | None  # of pairs apart

    def tile(self, kernel: str, two_sides: bool = False, more: bool = False) -> Tile:
        """A tile of the table; the narrower of two where a pair has more to hold."""
        p = self.p
        masks = p.x_ids, p.x_groups, p.exclude, p.x_window, p.y_window
        more = (
            more or p.apart or p.score == "root" or self.reach or any(t is not None for t in masks)
        )
        name = f"{kernel}_two" if two_sides else kernel
        if p.apart:
            narrower = self.table.tiles.get((f"{name}_apart", self.operands.products))
            if narrower is not None:
                return narrower
        return self.table.tile(self.operands, name, more)

    @property
    def table(self) -> TileTable:
        return TABLES[gpu_device.architecture(self.p.x.device)]

    @property
    def reach(self) -> bool:
        return min(self.p.positive.reach, self.p.negative.reach) < float("inf")

    def gradients(
        self, needs: PairNeeds, unscale: Tensor | float
    ) -> PairGradients | ApartGradients:
        given = self.p, self.operands.x.to(self.operands.low), self.operands.y
        if self.squares is not None:
            return ApartGradients(*given, -self.scale, needs, unscale, self.squares.near_sums)
        return PairGradients(*given, self.scale, needs, unscale)

    def columns(self, tile: Tile) -> int:
        """What the width of a stored block is a multiple of."""
        return tile.columns if self.squares is None else columns_of(tile, self.p.x.device)

    def scored(self, block: Block, buffer: Tensor | None, tile: Tile) -> Tensor | None:
        """What a block's kernel scores in place of products: squares of pairs apart."""
        if self.squares is None or buffer is None:
            return None
        return self.squares.block(block, buffer, self.columns(tile))

    def launch(
        self,
        kernel: Any,
        tile: Tile,
        block: Block,
        after: tuple,
        squares: Tensor | None = None,
        strides: tuple = (),
        widths: tuple = (),
        **constants: Any,
    ) -> None:
        """One program a tile of the block."""
        p, o = self.p, self.operands
        row_tiles = ceil_div(block.row_end - block.first_row, tile.rows)
        excluded = 0 if p.exclude is None else p.exclude.shape[1]
        triton_launch.launch(
            kernel,
            row_tiles * ceil_div(block.column_end - block.first_column, tile.columns),
            (
                Side(o.x, p.x_bias, p.x_labels, p.x_ids, p.x_groups, p.x_window, o.x.stride(0)),
                Side(o.y, p.y_bias, p.y_labels, p.y_ids, p.y_groups, p.y_window, o.y.stride(0)),
                *(self.scale, p.exclude),
                *(squares, None if squares is None else squares.stride(0), *after),
                *(Rule(*map(float, rule)) for rule in (p.positive, p.negative)),
                *(*strides, excluded, self.n, self.m, *block, o.d, *widths, row_tiles),
            ),
            dict(
                REACH=self.reach,
                ROOT=p.score == "root",
                SKIP_SELF=p.skip_self,
                TRIANGLE=p.triangle,
                BM=tile.rows,
                BN=tile.columns,
                BK=tile.depth,
                EVEN=o.even(tile.depth),
                BF16=o.bf16,
                DOT=o.dot,
            )
            | constants,
            tile,
        )


def problem(p: PairInputs, gradient: bool) -> TritonPairProblem:
    p, scale = gpu.kernel_form(p)
    operands = Product.of(p.x, p.y, p.precision, gradient)
    if gradient and p.score == "root" and operands.low == torch.float16:
        # the slope of a root, 1 / (2 d), takes G of short distances out of float16's range
        operands = replace(operands, low=torch.float32)
    if p.apart:
        # the kernels score squared distances
        return TritonPairProblem(p, -scale, operands, Squares.of(p, operands))
    return TritonPairProblem(p, scale, operands, None)


# ---- blocks that are stored ---------------------------------------------------------------------


def columns_within(s: TritonPairProblem, tile: Tile, height: int, size: int) -> int:
    """Columns whose pairs of `size` bytes are stored at once."""
    step = s.columns(tile)
    stored = s.table.stored(s.p.x.device, s.n * s.m * size)
    width = stored // (max(height, 1) * size * step)
    return min(max(width, 1), ceil_div(s.m, step)) * step


def stored(
    s: TritonPairProblem, tile: Tile, *dtypes: torch.dtype
) -> Iterator[tuple[Block, Tensor | None, list[Tensor]]]:
    """Blocks whose tiles are stored for library products, their squares, and where to store them.

    Of pairs apart the squares are stored beside them.
    """
    height, device = min(s.n, gpu.ROW_BLOCK), s.p.x.device
    size = 4 * (s.squares is not None) + sum(t.itemsize for t in dtypes)
    most = max(1, gpu.MAX_CHUNK // s.columns(tile)) * s.columns(tile)
    width = min(columns_within(s, tile, height, size), most)
    buffers = [torch.empty((height, width), dtype=t, device=device) for t in dtypes]
    squares = None
    if s.squares is not None:
        squares = torch.empty(height * width, dtype=torch.float32, device=device)
    for block in gpu.blocks(s.p, height, width):
        yield block, s.scored(block, squares, tile), buffers


def stored_gradient(s: TritonPairProblem) -> list[torch.dtype]:
    """What holds G: of pairs apart its far pairs stand beside it."""
    low = s.operands.low
    return [low] if s.squares is None else [torch.float32, low]


def add_block(
    s: TritonPairProblem,
    gradients: PairGradients | ApartGradients,
    block: Block,
    squares: Tensor | None,
    buffers: list[Tensor],  # of `stored_gradient`, and others before them
) -> None:
    if isinstance(gradients, ApartGradients) and s.squares is not None and squares is not None:
        g, far = buffers[-2:]
        split = s.squares.split(block, g, squares, far)
        gradients.add(block, g, squares, split)
    elif isinstance(gradients, PairGradients):
        gradients.add(block, gpu.cut(buffers[-1], block))

"""Pairs apart on Triton: blocks of squared distances, and the sums of their gradients.

The kernels over pairs read a block of squares where they else multiply: it is written to L2 first,
its near pairs from differences, by the kernels of `distances`. Backward see `gpu_apart`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.product import Product
from fused_losses.backends.gpu.tiles import Tile, width
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.backends.triton.launch import kernel
from fused_losses.primitives.distances import triton as distances
from fused_losses.primitives.pairs import apart, gpu
from fused_losses.primitives.pairs.gpu import Block
from fused_losses.primitives.pairs.gpu_apart import SplitBlock
from fused_losses.primitives.pairs.inputs import PairInputs

# a tile of G that is split, whose columns are also the rows that near sums take at once
CHIPS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
SPLIT: dict[str, Tile] = dict.fromkeys(CHIPS, Tile(64, 64, 32, 8, 1))
SPLIT["interpret"] = Tile(16, 16, 16, 8, 1)
# of own rows a tile of near sums has, and of D; 64 rows spill 10 bytes there
NEAR = SPLIT | dict.fromkeys(("sm_90", "sm_100"), Tile(32, 64, 32, 8, 1))


def columns_of(tile: Tile, device: torch.device) -> int:
    """What rows of a block are a multiple of, so that every tile of it is whole columns."""
    return max(tile.columns, SPLIT[gpu_device.architecture(device)].columns)


@dataclass(frozen=True)
class Squares:
    """Squared distances of a call's rows, a block at a time."""

    p: PairInputs
    operands: Product
    x_norms: Tensor  # [N] |x|^2 as products round x
    y_norms: Tensor  # [M]
    share: float  # of |x|^2 + |y|^2: a pair with less is near

    @classmethod
    def of(cls, p: PairInputs, operands: Product) -> Squares:
        o = operands
        x_norms = distances.squares(o, o.x, o.bf16)
        y_norms = x_norms if p.triangle else distances.squares(o, o.y, o.bf16)
        return cls(p, o, x_norms, y_norms, apart.share(p.precision))

    def block(self, block: Block, buffer: Tensor, step: int) -> Tensor:
        """|x - y|^2 of a block, [rows, columns rounded up to a multiple of step]."""
        top, stop, first, end = block
        y, y_norms = self.operands.y[first:end], self.y_norms[first:end]
        more = -(end - first) % step
        if more:
            y = torch.nn.functional.pad(y, (0, 0, 0, more))
            y_norms = torch.nn.functional.pad(y_norms, (0, more))
        operands = replace(self.operands, x=self.operands.x[top:stop], y=y)
        out = buffer[: operands.n * operands.m].view(operands.n, operands.m)
        distances.tiles(operands, (self.x_norms[top:stop], y_norms), out, False, self.share)
        return out

    def split(self, block: Block, g: Tensor, squares: Tensor, far: Tensor) -> SplitBlock:
        """A block of G without its near pairs, into `far`."""
        top, stop, first, end = block
        n, m, new = stop - top, end - first, partial(torch.empty, device=g.device)
        tile = SPLIT[gpu_device.architecture(g.device)]
        down, across = ceil_div(n, tile.rows), ceil_div(m, tile.columns)
        row_sums, moments = new((across, n)), new((across, n))
        near_rows = new((across, n), dtype=torch.int8)
        column_sums, near_columns = new((down, m)), new((down, m), dtype=torch.int8)
        triton_launch.launch(
            kernel("pairs.triton_near.split_tiles"),
            down * across,
            (
                *(g, squares, self.x_norms[top:stop], self.y_norms[first:end], far),
                *(row_sums, column_sums, moments, near_rows, near_columns, self.share),
                *(g.stride(0), squares.stride(0), far.stride(0), n, m, down),
            ),
            dict(BM=tile.rows, BN=tile.columns),
            tile,
        )
        moment = moments.sum(dtype=gpu.row_dtype(g.device))
        far = gpu.cut(far, block)
        return SplitBlock(
            far, row_sums.sum(0), column_sums.sum(0), moment, (near_rows, near_columns)
        )

    def near_sums(
        self,
        block: Block,
        g: Tensor,
        squares: Tensor,
        near: tuple[Tensor, Tensor],
        to: Tensor,
        turned: bool,
    ) -> None:
        top, stop, first, end = block
        o, order = self.operands, -1 if turned else 1
        own, other = (o.x[top:stop], o.y[first:end])[::order]
        norms = (self.x_norms[top:stop], self.y_norms[first:end])[::order]
        tile, d = NEAR[gpu_device.architecture(g.device)], own.shape[1]
        depth = min(tile.depth, width(d))
        depth_tiles = ceil_div(d, depth)
        triton_launch.launch(
            kernel("pairs.triton_near.near_sums"),
            ceil_div(own.shape[0], tile.rows) * depth_tiles,
            (
                *(own, other, *norms, g, squares, near[turned], to, self.share),
                *(own.stride(0), other.stride(0), *g.stride()[::order], *squares.stride()[::order]),
                *(own.shape[0], other.shape[0], d, depth_tiles),
            ),
            dict(BM=tile.rows, BN=tile.columns, BK=depth, EVEN=d % depth == 0),
            tile,
        )

"""One call as the kernels of both GPU backends read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.backends.gpu.device import architecture
from fused_losses.backends.gpu.tiles import Table, Tile
from fused_losses.primitives.row_statistics.inputs import Inputs
from fused_losses.primitives.row_statistics.triton_tiles import TABLES


@dataclass(frozen=True)
class Problem:
    """One call's inputs as the kernels want them."""

    x: Tensor  # [N, D], last stride 1
    weight: Tensor  # [C, D], last stride 1
    positions: Tensor  # [N] int32: column of the target, -1 = none
    classes: Tensor | None  # [K]
    bias: Tensor | None
    column_weight: Tensor | None
    bend: Tensor | None  # [N, 4] float32: t, p, q, r of a row side by side
    normalize: bool
    table: Table
    products: str  # the products column of the tile table
    bf16: bool  # round float32 operands to bfloat16
    dot: str
    low: torch.dtype  # of G and what it is multiplied with

    @property
    def n(self) -> int:
        return self.x.shape[0]

    @property
    def d(self) -> int:
        return self.x.shape[1]

    @property
    def count(self) -> int:
        return self.weight.shape[0] if self.classes is None else self.classes.shape[0]

    def tile(self, kernel: str, extra: bool = False) -> Tile:
        """A tile of the table; a narrower one where a kernel has more to hold."""
        tile = self.table.tiles[kernel, self.products]
        rows = self.x.stride(0), self.weight.stride(0)
        # rows that do not start on a whole vector take more address registers
        plain = self.even(tile.depth) and all(stride % 16 == 0 for stride in rows)
        if extra and self.bend is not None:
            name = (f"{kernel}_bent", self.products)
            return self.table.tiles.get(name) or self.table.tiles[f"{kernel}_extra", self.products]
        narrow = extra or self.bend is not None or not plain
        return self.table.tiles[f"{kernel}_extra", self.products] if narrow else tile

    def even(self, depth: int) -> bool:
        return depth > 0 and self.d % depth == 0


def problem(inputs: Inputs, gradient: bool) -> Problem:
    """The inputs as the kernels read them, with the tiles and products of this device."""
    x, weight, labels, classes, bias, column_weight, normalize, _, precision, bend = inputs
    arch = architecture(x.device)
    wide = x.dtype == torch.float32
    bf16 = wide and precision == "bf16"
    dot, products = "ieee", "rounded" if bf16 else "half"
    if wide and not bf16:
        # scores of a bfloat16 product against an exact lse would be off by whole factors at scale
        # 100, so the mixed backward recomputes them in tf32 and rounds G alone
        coarse = precision == "tf32" or precision == "mixed" and gradient
        products = "tf32" if coarse else "tf32x3"
        # three tf32 products reach float32 accuracy on NVIDIA; AMD multiplies float32 itself
        dot = products if arch.startswith("sm_") else "ieee"
    if arch == "interpret":
        dot = "interpret"
    if classes is None:
        positions = labels.to(torch.int32)
    else:
        classes = classes.to(torch.int64).contiguous()
        found = torch.searchsorted(classes, labels).clamp_max(max(classes.numel() - 1, 0))
        known = classes[found] == labels if classes.numel() else torch.zeros_like(labels).bool()
        # a label outside `classes` has no column here: the row counts as one without target
        positions = torch.where(known, found, -1).to(torch.int32)
    return Problem(
        # columns of a matrix that is not stored by rows would be read element by element
        x if x.stride(-1) == 1 else x.contiguous(),
        weight if weight.stride(-1) == 1 else weight.contiguous(),
        positions.contiguous(),
        classes,
        None if bias is None else bias.contiguous(),
        None if column_weight is None else column_weight.to(torch.float32).contiguous(),
        # copied even where a view would do: a kernel reads a row's four at once
        None if bend is None else bend.T.to(torch.float32, copy=True).contiguous(),
        normalize,
        TABLES[arch],
        products,
        bf16,
        dot,
        torch.bfloat16 if wide and precision in ("mixed", "bf16") else x.dtype,
    )


def weight_gradient(p: Problem, compact: bool) -> Tensor:
    """To be written: [K, D] if compact, else [C, D]; zeros where not every row will be."""
    make = torch.empty if p.n > 0 and (p.classes is None or compact) else torch.zeros
    rows = p.count if compact else p.weight.shape[0]
    return make((rows, p.d), dtype=p.weight.dtype, device=p.weight.device)

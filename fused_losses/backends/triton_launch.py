"""What the Triton launchers share: one call's inputs as kernels want them, and the one launch.

Every launch goes through `launch`, so that a test can compile or execute exactly what a GPU gets.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends.triton_tiles import TABLES, Table, Tile
from fused_losses.inputs import Inputs


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels() -> tuple[ModuleType, ModuleType]:
    from fused_losses.backends import triton_gradients, triton_kernels

    return triton_kernels, triton_gradients


def architecture(device: torch.device) -> str:
    """Which row of the tile tables a device uses."""
    if device.type == "cpu":
        return "interpret"
    if torch.version.hip:
        return "gfx942"
    return table_row(torch.cuda.get_device_capability(device))


def table_row(capability: tuple[int, int]) -> str:
    """The row of the tile tables of an NVIDIA GPU."""
    # 8.6, 8.9 and 12 (which has not the instructions of sm_100) compile to tighter code than 8.0
    other = "sm_80" if capability == (8, 0) else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], other)


def processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, programs: int, args: tuple, constants: dict[str, Any], tile: Tile) -> None:
    if interpreted():
        import triton.language as tl

        # the interpreter of Triton 3.6 cannot use its own integers as loop bounds under numpy 2.4
        args = tuple(tl.constexpr(a) if isinstance(a, int) else a for a in args)
    kernel[(programs,)](*args, **constants, num_warps=tile.warps, num_stages=tile.stages)


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


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def from_column(tensor: Tensor | None, first: int) -> Tensor | None:
    return None if tensor is None else tensor[first:]


def norms(p: Problem, inverse: Tensor, first: int, end: int) -> None:
    """1/|w_j| of columns [first, end), which also brings their rows into L2."""
    classes = from_column(p.classes, first)
    weight = p.weight[first:] if classes is None else p.weight
    tile = Tile(0, 16, 128, 4, 1)
    launch(
        kernels()[0].inverse_norms,
        ceil_div(end - first, tile.columns),
        (weight, classes, inverse, weight.stride(0), end - first, p.d),
        dict(BN=tile.columns, BK=tile.depth, EVEN=p.even(tile.depth)),
        tile,
    )

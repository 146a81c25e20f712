"""A product of rows as both GPU backends read it: its operands, and how they multiply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device


@dataclass(frozen=True)
class Product:
    """The products of rows of x and rows of y."""

    x: Tensor  # [N, D], last stride 1
    y: Tensor  # [M, D], last stride 1
    products: str  # the products column of the tile tables
    bf16: bool  # round float32 operands to bfloat16
    dot: str
    low: torch.dtype  # of G, or an attention's weights, and what these are multiplied with

    @classmethod
    def of(cls, x: Tensor, y: Tensor, precision: str, gradient: bool, **more: Any) -> Self:
        """The operands with the products of their device; `more`: a subclass's own fields."""
        arch = gpu_device.architecture(x.device)
        wide = x.dtype == torch.float32
        bf16 = wide and precision == "bf16"
        dot, products = "ieee", "rounded" if bf16 else "half"
        if wide and not bf16:
            # scores of a bfloat16 product against an exact lse would be off by whole factors at
            # scale 100, so the mixed backward recomputes them in tf32 and rounds G alone
            coarse = precision == "tf32" or (precision == "mixed" and gradient)
            products = "tf32" if coarse else "tf32x3"
            # three tf32 products reach float32 accuracy on NVIDIA; AMD multiplies float32 itself
            dot = products if arch.startswith("sm_") else "ieee"
        return cls(
            # columns of a matrix that is not stored by rows would be read element by element
            x=x if x.stride(-1) == 1 else x.contiguous(),
            y=y if y.stride(-1) == 1 else y.contiguous(),
            products=products,
            bf16=bf16,
            dot="interpret" if arch == "interpret" else dot,
            low=torch.bfloat16 if bf16 or (wide and gradient and precision == "mixed") else x.dtype,
            **more,
        )

    @property
    def n(self) -> int:
        return self.x.shape[0]

    @property
    def m(self) -> int:
        return self.y.shape[0]

    @property
    def d(self) -> int:
        return self.x.shape[1]

    def even(self, depth: int) -> bool:
        """Whether slices of D are all whole."""
        return depth > 0 and self.d % depth == 0

    def aligned(self, *others: int) -> bool:
        """Whether rows (and `others`) start on whole vectors; else they take more registers."""
        return all(size % 16 == 0 for size in (self.x.stride(0), self.y.stride(0), *others))

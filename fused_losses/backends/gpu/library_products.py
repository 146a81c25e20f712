"""The library products around the CUDA kernels: float32 results, in the precision of the call.

On a GPU they are cuBLAS's, in the host execution those of torch on the CPU, where 16-bit operands
are widened: the sum of exact products in float32 either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.backends.gpu.products import float32_products

ROUNDED = ("mixed", "bf16")


def low_dtype(dtype: torch.dtype, precision: str) -> torch.dtype:
    """What a product of rows of this dtype multiplies."""
    return torch.bfloat16 if dtype == torch.float32 and precision in ROUNDED else dtype


def scores_precision(precision: str, gradient: bool) -> str:
    """The precision of scores that an exponential follows.

    mixed rounds gradients alone: scores of rounded rows against an exact lse would be off by whole
    factors at scale 100. They are float32 in the forward, and recomputed in tf32 on a GPU.
    """
    if precision != "mixed":
        return precision
    return "tf32" if gradient else "fp32"


def product(a: Tensor, b: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """a [n, k] times b [k, m] in float32, of operands of one dtype. [n, m]

    fp32, tf32 (float32 on the host); mixed and bf16 round float32 operands. No operand is widened
    on a GPU: 16-bit ones are multiplied as they are, whatever the precision.
    """
    low = low_dtype(a.dtype, precision)
    a, b = a.to(low), b.to(low)
    with float32_products(precision == "tf32"):
        if low != torch.float32 and a.is_cuda:
            if out is None:
                return torch.mm(a, b, out_dtype=torch.float32)
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a.float(), b.float(), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, precision: str, beta: float = 1.0) -> None:
    """total [n, m] = beta total + a b, in place; as `product`. beta = 0 does not read the total."""
    low = low_dtype(a.dtype, precision)
    a, b = a.to(low), b.to(low)
    with float32_products(precision == "tf32"):
        if low != torch.float32 and a.is_cuda:
            torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
        else:
            total.addmm_(a.float(), b.float(), beta=beta)

"""What surrounds a library product on a GPU: its precision, scales and sums."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from fused_losses.base.compiled import extension


def float16_scale(grads: list[Tensor | None], column_weight: Tensor | None) -> Tensor:
    """A power of two that brings the largest gradient to 16: float16 starts at 6e-8."""
    largest = [g.abs().max() for g in grads if g is not None]
    if column_weight is not None and grads[2] is not None:
        largest.append(largest[2] * column_weight.abs().max())
    exponent = torch.stack(largest).max().log2().floor()
    return torch.exp2(torch.where(exponent.isfinite(), (4 - exponent).clamp(-100, 100), 0))


def float32_products(tf32: bool) -> AbstractContextManager:
    """float32 library products within, of this thread, as the precision of a call has them.

    Without tf32 none is one, whatever the process allows. With it they are where the process allows
    them: PyTorch has no switch for a thread or a product, and its switch is not ours to set.
    """
    built = extension()
    if built is not None:
        return built.tf32_products(tf32)
    if not tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        _warn_of_tf32()
    return nullcontext()


def products_on(backend: str, tf32: bool = False) -> AbstractContextManager:
    """`float32_products` where a GPU backend runs; those of PyTorch's forms follow the process."""
    return float32_products(tf32) if backend in ("triton", "cuda") else nullcontext()


@cache
def _warn_of_tf32() -> None:
    warnings.warn(
        "fused_losses: the process allows tf32 products, and without the C++ extension those of "
        "float32 rows by the library are, also under precision='fp32'",
        stacklevel=4,
    )


def accumulate(total: Tensor, a: Tensor, b: Tensor, beta: float = 1.0) -> None:
    """total = beta total + a b over a batch, float32 sums whatever the operands."""
    if a.dtype == torch.float32:
        total.baddbmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.baddbmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:
        total.baddbmm_(a.float(), b.float(), beta=beta)


def add_rows(dx: Tensor, g: Tensor, w: Tensor, piece: int) -> None:
    """dx[s] += G W over the s-th piece of the classes; the rest of a ragged chunk to the first."""
    length = g.shape[1]
    full = length // piece
    if full:
        split = g[:, : full * piece].unflatten(1, (full, piece)).transpose(0, 1)
        accumulate(dx[:full], split, w[: full * piece].unflatten(0, (full, piece)))
    if length > full * piece:
        accumulate(dx[:1], g[None, :, full * piece :], w[None, full * piece :])

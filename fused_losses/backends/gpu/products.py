"""What surrounds a library product on a GPU: its precision, scales and sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def float16_scale(grads: list[Tensor | None], column_weight: Tensor | None) -> Tensor:
    """A power of two that brings the largest gradient to 16: float16 starts at 6e-8."""
    largest = [g.abs().max() for g in grads if g is not None]
    if column_weight is not None and grads[2] is not None:
        largest.append(largest[2] * column_weight.abs().max())
    exponent = torch.stack(largest).max().log2().floor()
    return torch.exp2(torch.where(exponent.isfinite(), (4 - exponent).clamp(-100, 100), 0))


@contextmanager
def library_tf32(wanted: bool) -> Iterator[None]:
    """float32 library products in the precision that the caller asked for, whatever the global."""
    if not torch.cuda.is_available():
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, now = matmul.fp32_precision, "tf32" if wanted else "ieee"
    matmul.fp32_precision = now
    try:
        yield
    finally:
        matmul.fp32_precision = before


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

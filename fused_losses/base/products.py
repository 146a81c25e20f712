"""Products of matrices by plain autograd, whose backward autocast does not round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.numerics import no_autocast

TILE = 32  # bfloat16 numbers in a row of a tile register


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y^T, [..., N, D], [..., M, D] -> [..., N, M]; any derivative in the operands' dtype.

    A forward may run without autocast, but its backward runs in the caller's.
    """
    if torch.compiler.is_compiling():
        return plain_product(x, y)  # traced with the autocast of the forward
    return _RowProduct.apply(x, y)


def plain_product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y^T by PyTorch, where a row of NaN spoils no other's.

    On CPUs with AMX oneDNN's products of bfloat16 read behind a row that does not end with a tile
    register: 0 times what the next one begins with.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        rest = -x.shape[-1] % TILE
        x, y = (torch.nn.functional.pad(t, (0, rest)) for t in (x, y)) if rest else (x, y)
    return x @ y.mT


class _RowProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return plain_product(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad
        with no_autocast(grad.device):
            dx = _summed(product(grad, y.mT), x) if need_x else None
            dy = _summed(product(grad.mT, x.mT), y) if need_y else None
        return dx, dy

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dy: Tensor | None) -> Tensor:
        x, y = (torch.autograd.forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
        moved = [product(a, b) for a, b in ((dx, y), (x, dy)) if a is not None and b is not None]
        return sum(moved[1:], start=moved[0])


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """Over the leading dimensions that were broadcast."""
    return grad if grad.shape == like.shape else grad.sum_to_size(like.shape)

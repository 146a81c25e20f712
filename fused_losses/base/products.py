"""Products of matrices by plain autograd, whose backward autocast does not round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.numerics import no_autocast


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y^T, [..., N, D], [..., M, D] -> [..., N, M]; any derivative in the operands' dtype.

    A forward may run without autocast, but its backward runs in the caller's.
    """
    if torch.compiler.is_compiling():
        return x @ y.mT  # traced with the autocast of the forward
    return _RowProduct.apply(x, y)


class _RowProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x @ y.mT

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

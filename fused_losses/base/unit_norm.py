"""Rows of norm 1, of any gathered order: nothing kept for the backward but the input itself.

    u = x / |x|        dx = (du - u <u, du>) / |x|

Of any length: the squares are of rows brought near 1 by a power of two, which is exact. A row of
zeros stays zero and gets gradient zero, as in `numerics.unit_rows`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype, power_of_two

ROWS = 1024  # that are widened to the accumulation dtype at a time


def unit(x: Tensor, order: Tensor | None = None) -> Tensor:
    """x / |x| over the last dimension, rounded once to x's dtype; rows permuted by `order`."""
    if torch.compiler.is_compiling():
        # the compiler decides itself what to keep
        return _forward(x if order is None else x.index_select(0, order))
    return _Unit.apply(x, order)


def _parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, and two factors whose product is 1 / |x| (the first 0 for a zero row)."""
    x = x.to(accumulate_dtype(x.dtype))
    factor = power_of_two(x)
    x = x * factor
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # `not <=` and not `>`: a NaN norm must stay NaN
    alive = ~(norm <= 0)
    inverse = torch.where(alive, 1 / torch.where(alive, norm, 1), 0)
    return torch.where(alive, x * inverse, 0), inverse, factor


def _forward(x: Tensor) -> Tensor:
    return _parts(x)[0].to(x.dtype)


def _backward(x: Tensor, grad: Tensor) -> Tensor:
    u, inverse, factor = _parts(x)
    wide = grad.to(u.dtype)
    across = wide - u * (u * wide).sum(dim=-1, keepdim=True)
    # one after the other: 1 / |x| itself may overflow
    return (inverse * across * factor).to(x.dtype)


class _Unit(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor | None) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for i in range(0, x.shape[0], ROWS):
            rows = x[i : i + ROWS] if order is None else x[order[i : i + ROWS]]
            out[i : i + ROWS] = _forward(rows)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, order = ctx.saved_tensors
        if torch.is_grad_enabled():
            # in operations that can themselves be differentiated
            if order is None:
                return _backward(x, grad), None
            return _backward(x, grad.index_select(0, order.argsort())), None
        out = torch.empty_like(x)
        for i in range(0, x.shape[0], ROWS):
            if order is None:
                out[i : i + ROWS] = _backward(x[i : i + ROWS], grad[i : i + ROWS])
            else:
                rows = order[i : i + ROWS]
                out[rows] = _backward(x[rows], grad[i : i + ROWS])
        return out, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        x, order = ctx.saved_tensors
        x = forward_ad.unpack_dual(x).primal
        if order is not None:
            x, tangent = x.index_select(0, order), tangent.index_select(0, order)
        # the Jacobian is symmetric
        return _backward(x, tangent)

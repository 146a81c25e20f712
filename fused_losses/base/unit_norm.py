"""Rows of norm 1, of any gathered order: nothing kept for the backward but the input itself.

    u = x / |x|        dx = (du - u <u, du>) / |x|

Of any length: the squares are of rows brought near 1 by a power of two, which is exact. A row of
zeros stays zero and gets gradient zero, as in `numerics.unit_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fused_losses.base.compiled import dense_rows, helpers
from fused_losses.base.numerics import accumulate_dtype, power_of_two, row_dtype

ROWS = 1024  # that are widened to the accumulation dtype at a time


class UnitForm(NamedTuple):
    """A device's kernels for what `_Unit` does."""

    takes: Callable[[Tensor], bool]
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # of x and dL/du


# of GPUs: entered by the backend that has some
FORMS: list[UnitForm] = []


def _form(x: Tensor) -> UnitForm:
    if not x.is_cuda:
        return PLAIN
    return next((form for form in FORMS if form.takes(x)), PLAIN)


def unit(x: Tensor, order: Tensor | None = None) -> Tensor:
    """x / |x| over the last dimension, rounded once to x's dtype; rows permuted by `order`."""
    if torch.compiler.is_compiling():
        # the compiler decides itself what to keep
        return _forward(x if order is None else x.index_select(0, order))
    compiled = helpers(x)
    if compiled is not None and dense_rows(x):
        return compiled.unit_rows(x, order)
    return _Unit.apply(x, order, x.dtype)


def wide_unit(x: Tensor) -> Tensor:
    """x / |x| in the dtype of sums: 16-bit rows are widened a block at a time, never as a whole."""
    dtype = accumulate_dtype(x.dtype)
    if x.dtype == dtype or torch.compiler.is_compiling():
        return unit(x.to(dtype))
    return _Unit.apply(x, None, dtype)


class UnitRows(NamedTuple):
    """Rows of norm 1, and what their gradient goes through."""

    rows: Tensor  # [..., D] u = x / |x|
    alive: Tensor  # [..., 1] bool: no row of zeros
    inverse: Tensor  # [..., 1] 1 / |x|, but for
    factor: Tensor  # [..., 1] a power of two: their product may overflow

    def backward(self, grad: Tensor) -> Tensor:
        """dL/dx of dL/du, and a tangent of u of one of x: the Jacobian is symmetric."""
        u = self.rows
        found = torch.addcmul(grad, u, (u * grad).sum(dim=-1, keepdim=True), value=-1)
        found = self.inverse * found  # by one name: what it held before is free
        found = found * self.factor
        return torch.where(self.alive, found, 0)


def unit_parts(x: Tensor) -> UnitRows:
    """x, widened, as unit rows. [..., D]; time and memory O(N D)"""
    x, tangent = forward_ad.unpack_dual(x.to(accumulate_dtype(x.dtype)))
    found = _parts(x)
    if tangent is None:
        return found
    return found._replace(rows=forward_ad.make_dual(found.rows, _moved(x, tangent).to(x.dtype)))


def _parts(x: Tensor) -> UnitRows:
    factor = power_of_two(x)
    x = x * factor
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # `not <=` and not `>`: a NaN norm must stay NaN
    alive = ~(norm <= 0)
    inverse = 1 / torch.where(alive, norm, 1)
    return UnitRows(x * torch.where(alive, inverse, 0), alive, inverse, factor)


def _moved(x: Tensor, tangent: Tensor) -> Tensor:
    """The tangent of x / |x|: what cancels in it others may compute again."""
    wide = row_dtype(x.device)
    return _parts(x.to(wide)).backward(tangent.to(wide))


def _wide(x: Tensor) -> Tensor:
    return _parts(x.to(accumulate_dtype(x.dtype))).rows


def _forward(x: Tensor) -> Tensor:
    return _wide(x).to(x.dtype)


def _backward(x: Tensor, grad: Tensor) -> Tensor:
    of = unit_parts(x)
    return of.backward(grad.to(of.rows.dtype)).to(x.dtype)


# rounded where they are written
PLAIN = UnitForm(lambda x: True, _wide, _backward)


class _Unit(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
        form = _form(x) if dtype == x.dtype else PLAIN
        if form is not PLAIN and order is None:
            return form.forward(x)
        out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        for i in range(0, x.shape[0], ROWS):
            rows = x[i : i + ROWS] if order is None else x[order[i : i + ROWS]]
            out[i : i + ROWS] = form.forward(rows)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *saved, ctx.dtype = inputs
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, order = ctx.saved_tensors
        if torch.is_grad_enabled():
            # in operations that can themselves be differentiated
            if order is None:
                return _backward(x, grad), None, None
            return _backward(x, grad.index_select(0, order.argsort())), None, None
        form = _form(x) if grad.dtype == x.dtype else PLAIN
        if form is not PLAIN and order is None:
            return form.backward(x, grad), None, None
        out = torch.empty_like(x)
        for i in range(0, x.shape[0], ROWS):
            if order is None:
                out[i : i + ROWS] = form.backward(x[i : i + ROWS], grad[i : i + ROWS])
            else:
                rows = order[i : i + ROWS]
                out[rows] = form.backward(x[rows], grad[i : i + ROWS])
        return out, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        x, order = ctx.saved_tensors
        x = forward_ad.unpack_dual(x).primal
        if order is not None:
            x, tangent = x.index_select(0, order), tangent.index_select(0, order)
        return _moved(x, tangent).to(ctx.dtype)

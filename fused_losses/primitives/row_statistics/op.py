"""The streamed primitive: statistics of each row's scores over all classes, the target apart.

    z_ij = psi_i(<x_i, w_j>) + b_j        (w_j / |w_j| with normalize=True)
    lse_i = log sum_{j != y_i} exp z_ij      target_i = <x_i, w_{y_i}>
    weighted_sum_i = sum_{j != y_i} v_j z_ij      hardest_i = argmax_{j != y_i} z_ij

psi_i(c) = c, or with `bend` [4, N] = (t, p, q, r): c where c <= t_i, else p_i + q_i c + r_i c^2:
what losses that mine hard classes make of a high score.

A margin touches the target only, so every margin softmax is ordinary autograd on these [N]
vectors; and since the target is never in the sum, 1 - p = sigmoid(lse - z_y) keeps its digits
when p rounds to 1. Backward recomputes the scores tile by tile: G_ij = dlse_i exp(z_ij - lse_i).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.compiled import helpers
from fused_losses.base.numerics import accumulate_dtype, row_dtype
from fused_losses.primitives.op import StreamedFunction, StreamedOp, duals
from fused_losses.primitives.row_statistics import tangents
from fused_losses.primitives.row_statistics.inputs import (
    BACKWARD,
    FORWARD,
    Inputs,
    backward_arguments,
    gradient_shape,
    kept_row,
)


class RowStatistics(NamedTuple):
    """What one sweep over the classes knows of each row, [N] each.

    lse and target are float64 on CPU and CUDA whatever the inputs: their difference decides 1 - p,
    and a float32 score near 48 has steps of 4e-6. The rest is float32 (float64 for float64).
    """

    lse: Tensor
    target: Tensor
    weighted_sum: Tensor
    hardest: Tensor
    hardest_score: Tensor


def row_statistics(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N], -1: no target
    *,
    classes: Tensor | None = None,  # [K], increasing
    bias: Tensor | None = None,  # [C]
    column_weight: Tensor | None = None,  # [C]
    normalize: bool = False,
    weighted: bool = False,
    precision: str = "fp32",
    bend: Tensor | None = None,  # [4, N]
    kept_classes: int = 0,
    backend: str | None = None,
) -> RowStatistics:
    """Statistics over the classes, differentiable in x, weight and bias (module docstring).

    `bend`: t, p, q, r of each row, in the accumulation dtype; no gradient.
    `kept_classes`: how many classes' scores the forward may keep for the backward (cpu only).
    Time O(N K D); memory O(N D) plus kept_classes * N. Second derivatives raise.
    """
    name, _ = backends.choose(
        backend, x.device, weight.dtype, precision, "row_statistics", x.shape[1]
    )
    arguments = (
        x,
        weight,
        labels,
        classes,
        bias,
        column_weight,
        normalize,
        weighted,
        precision,
        bend,
        kept_classes if name == "cpu" else 0,
    )
    tensors = (x, weight, labels, classes, bias, column_weight, bend)
    compiled = helpers(*(t for t in tensors if t is not None)) if name == "cpu" else None
    if compiled is not None:
        # the same op, with its gradient in C++
        return RowStatistics(*compiled.row_statistics(*arguments))
    out = ROW_STATISTICS(name, *arguments)
    return RowStatistics(*out[:5])


class RowStatisticsFunction:
    """The primitive as an autograd Function, for code that composes Functions by hand."""

    @staticmethod
    def apply(backend: str, *inputs: Any) -> tuple[Tensor, ...]:
        """The registered op's outputs and gradient: apply(backend, x, weight, labels, ...)."""
        return StreamedFunction.apply(ROW_STATISTICS, backend, *inputs)


class RowStatisticsOp(StreamedOp):
    """Statistics of rows over classes, with their gradient."""

    name = primitive = "row_statistics"
    schema, backward_schema = FORWARD, BACKWARD

    def setup_context(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, labels, classes, bias, column_weight, *settings, bend, _ = inputs
        lse, _, _, hardest, hardest_score, kept = output
        ctx.mark_non_differentiable(hardest, hardest_score, kept)
        ctx.save_for_backward(x, weight, labels, classes, bias, column_weight, lse, kept, bend)
        ctx.settings = settings
        # or backward would be handed zeros of the size of `kept`, as large as the whole budget
        ctx.set_materialize_grads(False)

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        x, weight, labels, classes, bias, column_weight, lse, kept, bend = ctx.saved_tensors
        normalize, weighted, precision = ctx.settings
        # the third is a weighted call's alone
        asked = grads[: 3 if weighted else 2]
        given = [torch.zeros_like(lse) if g is None else g.contiguous() for g in asked]
        need_x, need_weight, _, _, need_bias = needed[:5]
        dx, dweight, dbias = backward_op(
            *given,
            *(() if weighted else (None,)),
            x,
            weight,
            labels,
            classes,
            bias,
            column_weight,
            lse,
            kept,
            normalize,
            weighted,
            precision,
            bend,
            False,
            need_x,
            need_weight,
            need_bias,
        )
        some = (dx if need_x else None, dweight if need_weight else None)
        return (*some, None, None, dbias if need_bias else None, None, None, None, None, None, None)

    def fake_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        p, kept_classes = Inputs(*arguments[:-1]), arguments[-1]
        x, weight = p.x, p.weight
        n = x.shape[0]
        dtype = accumulate_dtype(weight.dtype)
        row = x.new_empty(n, dtype=row_dtype(weight.device))
        return (
            row,
            torch.empty_like(row),
            x.new_empty(n if p.weighted else 0, dtype=dtype),
            torch.empty_like(p.labels, dtype=torch.int64),
            x.new_empty(n, dtype=dtype),
            x.new_empty((kept_classes, kept_row(n)), dtype=dtype),
        )

    def fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        p, _, _, _, needs = backward_arguments(arguments)
        return (
            p.x.new_empty(p.x.shape if needs.x else 0),
            p.weight.new_empty(gradient_shape(p, needs) if needs.weight else 0),
            p.bias.new_empty(p.bias.shape)
            if needs.bias and p.bias is not None
            else p.weight.new_empty(0),
        )

    def forward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        p = Inputs(*arguments[:-1])
        lse, target, *rest = self.form(backend).forward(p)
        wide = row_dtype(p.weight.device)
        kept = rest[-1].new_empty((0, kept_row(p.x.shape[0])))
        return (lse.to(wide), target.to(wide), *rest, kept)

    def backward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        p, lse, _, grads, needs = backward_arguments(arguments)
        narrow = accumulate_dtype(p.weight.dtype)
        grads = grads._replace(lse=grads.lse.to(narrow), target=grads.target.to(narrow))
        out = self.form(backend).backward(p, lse.to(narrow), grads, needs)
        return tuple(p.weight.new_empty(0) if g is None else g for g in out)

    def tangents(self, direction: str, arguments: tuple, moves: tuple, output: tuple) -> tuple:
        if direction:
            return super().tangents(direction, arguments, moves, output)
        # the bend has no gradient
        moving = tuple(t if i in (0, 1, 4) else None for i, t in enumerate(moves))
        p = Inputs(*duals(arguments, moving)[:-1])
        return *tangents.statistics(p, output[0]), None, None, None

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        if not direction:
            return self.form(backend).workspace(Inputs(*arguments[:-1]), None)
        p, _, _, _, needs = backward_arguments(arguments)
        return self.form(backend).workspace(p, needs)


ROW_STATISTICS = RowStatisticsOp()
ROW_STATISTICS.define()
op = ROW_STATISTICS.op

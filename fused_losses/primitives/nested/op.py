"""The streamed primitive over pairs at several widths of the same rows, from one product.

    t_ij,w = sum_{d in columns of w} x_id y_jd + sx_i,w sy_j,w t_ij,w-1          (the sum so far)
    u_ij,w = scale fx_i,w fy_j,w t_ij,w                                          (the score)

with the statistics of `primitives.pairs` of each width's scores. Columns of w: those after width
w - 1 and up to width w. Shrinks s (1 where there are none) and factors f are a row's own: with
both, each width has units and a norm of its own (`functions.nested`), without both u is
scale <x_:w, y_:w>.

All widths cost one product of the whole width, and not one each: D products a pair forward, 3 D
backward, where the widths one by one cost sum_w w and 3 sum_w w. With G_w = dL/dt_w from width w's
own statistics, from the widest down

    H_w = G_w + sx_w+1 sy_w+1 H_w+1        dx of w's columns = H_w y, dy = H_w^T x

A width's sum has the roundings of a sum of w products, however many columns come after it: none of
those is in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.backends.gpu.products import products_on
from fused_losses.base import validation
from fused_losses.base.numerics import row_dtype
from fused_losses.base.validation import describe
from fused_losses.primitives.kept import keep, kept
from fused_losses.primitives.nested import bounded
from fused_losses.primitives.nested import reference as reference_nested
from fused_losses.primitives.nested.inputs import (
    BACKWARD,
    BEFORE,
    FIELDS,
    FORWARD,
    NestedInputs,
    NestedNeeds,
)
from fused_losses.primitives.op import (
    PYTHON_BACKENDS,
    StreamedOp,
    duals,
    moves_of,
    through_backward,
)
from fused_losses.primitives.pairs.inputs import BEST, COUNT, TOTAL, VALUE
from fused_losses.primitives.pairs.op import PairStatistics

# where among NestedInputs the tensors stand that may need a gradient, as in NestedNeeds
DIFFERENTIABLE = (0, 1, 2, 3, 4)


def nested_statistics(
    inputs: NestedInputs, *, cols: bool = False, precision: str = "fp32", backend: str | None = None
) -> tuple[PairStatistics, PairStatistics | None]:
    """One sweep: the rows' statistics at each width, [W, 2, N], with cols=True the columns', too.

    Differentiable in x, y, scale and the factors; second derivatives run on the bounded path,
    whichever backend ran the first. Every backend but "reference" runs the same blocks of PyTorch.
    Raises ValueError or TypeError for inputs that do not fit each other. Time O(N M (D + W)), of
    which the product is N M D whatever W is; memory O((N + M) (D + W)) and W blocks.
    """
    _check(inputs)
    x = inputs.x
    name, _ = backends.choose(backend, x.device, x.dtype, precision, "pairs", x.shape[1])
    inputs = inputs._replace(widths=list(inputs.widths), precision=precision)
    if name == "reference":
        rows, columns = reference_nested.statistics(inputs, cols)
    else:
        rows, columns = NESTED_STATISTICS(name, *inputs, cols)
    return _named(rows), _named(columns) if cols else None


def _check(p: NestedInputs) -> None:
    """What the forms rely on; the losses say more of their own arguments."""
    validation.check_matrix("x", p.x, "[N, D]")
    validation.check_matrix("y", p.y, "[M, D]")
    validation.check_meeting(p.x, p.y)
    widths = list(p.widths)
    increasing = all(a < b for a, b in zip([0, *widths], widths, strict=False))
    if not widths or not increasing or widths[-1] != p.x.shape[1]:
        raise ValueError(
            f"widths: expected increasing ones of which the last is D={p.x.shape[1]}, got {widths}"
        )
    told = (p.x_factor, p.y_factor, p.x_shrink, p.y_shrink)
    if any(t is None for t in told) and any(t is not None for t in told):
        raise ValueError("x_factor, y_factor, x_shrink, y_shrink: expected all or none, got some")
    for side, rows in (("x", p.x), ("y", p.y)):
        for name in ("factor", "shrink"):
            field, given = f"{side}_{name}", getattr(p, f"{side}_{name}")
            shape = (len(widths), rows.shape[0])
            if given is not None and tuple(given.shape) != shape:
                raise ValueError(f"{field}: expected shape {shape}, got {describe(given)}")


def _named(statistics: Tensor) -> PairStatistics:
    return PairStatistics(
        statistics[:, VALUE],
        statistics[:, TOTAL],
        statistics[:, COUNT].detach(),
        statistics[:, BEST].detach(),
    )


# ---- the op: autograd and registration ----------------------------------------------------------


class NestedStatisticsOp(StreamedOp):
    """`nested_statistics` on a backend."""

    name, primitive = "nested_statistics", "nested"
    schema, backward_schema = FORWARD, BACKWARD
    # products of the library, and the blocks of pairs: nothing here is compiled
    python_backends = (*PYTHON_BACKENDS, "cpu")

    def setup_context(self, ctx: Any, arguments: tuple, output: tuple) -> None:
        keep(ctx, arguments, *output)
        ctx.set_materialize_grads(False)

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        arguments, output = kept(ctx)
        # of value and total only: the others are counts
        grads = tuple(
            torch.zeros_like(o[:, :2]) if g is None else g[:, :2].contiguous()
            for g, o in zip(grads, output, strict=True)
        )
        needs = [needed[i] for i in DIFFERENTIABLE]
        out = backward_op(*grads, *output, *arguments, *needs)
        out = [g if need else None for g, need in zip(out, needs, strict=True)]
        return (*out, *[None] * (len(arguments) - len(out)))

    def tangents(self, direction: str, arguments: tuple, moves: tuple, output: tuple) -> tuple:
        """In one sweep, from the statistics that are known."""
        at = BEFORE if direction else 0
        moving = {*range(at), *(at + i for i in DIFFERENTIABLE)}
        given = duals(arguments, tuple(t if i in moving else None for i, t in enumerate(moves)))
        if direction:
            return moves_of(self.backward("bounded", *given))
        return bounded.tangents(NestedInputs(*given[:-1]), given[-1], *output)

    def setup_second(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        keep(ctx, inputs)

    def second(self, ctx: Any, *grads: Tensor | None) -> tuple:
        """The backward op's own derivative, tile by tile."""
        arguments, _ = kept(ctx)
        return through_backward(ctx, arguments, grads, lambda given: _backward(given, True))

    def fake_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        p, cols = NestedInputs(*arguments[:-1]), arguments[-1]
        new: dict[str, Any] = dict(dtype=row_dtype(p.x.device))
        rows = p.x.new_empty((len(p.widths), 4, 2, p.x.shape[0]), **new)
        return rows, p.x.new_empty((len(p.widths), 4, 2, p.y.shape[0] if cols else 0), **new)

    def fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        p = NestedInputs(*arguments[BEFORE : BEFORE + FIELDS])
        given = zip((p.x, p.y, p.scale, p.x_factor, p.y_factor), arguments[-5:], strict=True)
        return tuple(
            t.new_empty(t.shape) if need and t is not None else p.x.new_empty(0)
            for t, need in given
        )

    def forward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        p = NestedInputs(*arguments[:-1])
        with products_on(backend, p.precision == "tf32"):
            return bounded.statistics(p, arguments[-1])

    def backward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        with products_on(backend, arguments[BEFORE + FIELDS - 1] == "tf32"):
            return _backward(arguments)

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        at = BEFORE if direction else 0
        needs = NestedNeeds(*arguments[-5:]) if direction else None
        return bounded.workspace(NestedInputs(*arguments[at : at + FIELDS]), needs)


def _backward(arguments: Any, differentiable: bool = False) -> tuple[Tensor, ...]:
    p = NestedInputs(*arguments[BEFORE : BEFORE + FIELDS])
    grad_rows, grad_columns, rows, columns = arguments[:BEFORE]
    cols, *needs = arguments[BEFORE + FIELDS :]
    found = bounded.statistics_backward(
        grad_rows, grad_columns, rows, columns, p, cols, NestedNeeds(*needs), differentiable
    )
    # an op must return tensors
    return tuple(p.x.new_empty(0) if g is None else g for g in found)


NESTED_STATISTICS = NestedStatisticsOp()
NESTED_STATISTICS.define()

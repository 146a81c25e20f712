"""The streamed primitive over rows: each row of scores is folded into a few numbers, never stored.

    d_ij = |x_i - y_j|, |x_i - y_j|^2, <x_i, y_j> or -<x_i, y_j>     (the score)
    each pair is positive, negative or left out                      (the labels)
    out_i = rule(row i of d, its positives, its negatives)           (`row_rules`)

A rule of two products is given <x_second_i, y_second_j> of each pair as well: a guide's score, the
square of a masked norm, what a temperature is made of.

For losses where a row's value needs its whole row of scores at once (an order, a count, a choice),
and not only sums over its pairs: those are `pairs`. Blocks of rows at a time: O((N + M) D) memory
and a few blocks. Backward computes the scores again; its gradient is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.numerics import no_autocast, row_dtype
from fused_losses.base.validation import describe
from fused_losses.primitives.op import PYTHON_BACKENDS, StreamedOp
from fused_losses.primitives.row_rules import bounded
from fused_losses.primitives.row_rules.inputs import (
    BACKWARD,
    FORWARD,
    ROW_SCORES,
    RowInputs,
    RowNeeds,
)
from fused_losses.primitives.row_rules.reference import reference
from fused_losses.primitives.row_rules.rules import ROW_FOLDS


def row_losses(inputs: RowInputs, *, backend: str | None = None) -> Tensor:
    """The rule's statistics of each row, [N, S] in `row_dtype` (float32 or float64).

    Differentiable in x, y, values and the second factors, where the rule is. NaN scores make their
    rows' statistics NaN (of a rule that gives indices: the NaN is chosen). Raises ValueError or
    TypeError for inputs that do not fit each other; NotImplementedError for a second derivative,
    but on "reference".
    Time O(N M D) and the rule's own; memory O((N + M) D) and a few blocks.
    """
    _check(inputs)
    inputs = inputs._replace(params=[float(p) for p in inputs.params])
    if ROW_FOLDS[inputs.rule].gradient is None:
        inputs = inputs._replace(x=inputs.x.detach(), y=inputs.y.detach())
    name, _ = backends.choose(
        backend, inputs.x.device, inputs.x.dtype, inputs.precision, "rows", inputs.x.shape[1]
    )
    with no_autocast(inputs.x.device):
        if name == "reference":
            return reference(inputs)
        # kernels need a coordinate
        width = inputs.x.shape[1] and (inputs.x_second is None or inputs.x_second.shape[1])
        return ROW_LOSSES(name if width else "bounded", *inputs)


def _check(p: RowInputs) -> None:
    """What the blocks rely on; the losses say more of their own arguments."""
    validation.check_matrix("x", p.x, "[N, D]")
    validation.check_matrix("y", p.y, "[M, D]")
    validation.check_meeting(p.x, p.y)
    validation.check_choice("rule", p.rule, tuple(ROW_FOLDS))
    validation.check_choice("score", p.score, tuple(ROW_SCORES))
    validation.check_choice("precision", p.precision, validation.PRECISIONS)
    for side, rows in (("x", p.x), ("y", p.y)):
        for name in ("labels", "groups"):
            field, vector = f"{side}_{name}", getattr(p, f"{side}_{name}")
            if vector is None and name == "groups":
                continue
            if not isinstance(vector, Tensor) or vector.dtype != torch.int32:
                got = describe(vector) if isinstance(vector, Tensor) else type(vector).__name__
                raise TypeError(f"{field}: expected an int32 tensor, got {got}")
            if tuple(vector.shape) != (rows.shape[0],):
                raise ValueError(
                    f"{field}: expected shape ({rows.shape[0]},), got {describe(vector)}"
                )
            validation.check_device("x", p.x, field, vector)
    if (p.x_groups is None) != (p.y_groups is None):
        raise ValueError("x_groups, y_groups: expected both or neither, got one")
    if (p.x_second is None) != (p.y_second is None):
        raise ValueError("x_second, y_second: expected both or neither, got one")
    if ROW_FOLDS[p.rule].seconds and p.x_second is None:
        raise ValueError(f"x_second: expected a tensor [N, E] for rule {p.rule!r}, got None")
    if p.x_second is not None and p.y_second is not None:
        for field, second, rows in (("x_second", p.x_second, p.x), ("y_second", p.y_second, p.y)):
            validation.check_matrix(field, second, "[N, E]")
            validation.check_device("x", p.x, field, second)
            validation.check_same_dtype("x", p.x, field, second)
            if second.shape[0] != rows.shape[0] or second.shape[1] != p.x_second.shape[1]:
                raise ValueError(
                    f"{field}: expected shape ({rows.shape[0]}, {p.x_second.shape[1]}), got "
                    f"{describe(second)}"
                )
    if p.values is not None:
        if p.values.dim() != 2 or p.values.shape[0] != p.x.shape[0]:
            raise ValueError(
                f"values: expected [{p.x.shape[0]}, K], a row each, got {describe(p.values)}"
            )
        validation.check_device("x", p.x, "values", p.values)


# ---- the op: autograd and registration ----------------------------------------------------------

FIELDS = len(RowInputs._fields)
TENSORS = RowInputs._fields.index("rule")  # how many fields, the first ones, are tensors
LAST = RowInputs._fields.index("x_second")  # from where on they are again
# where among RowInputs the tensors stand that may need a gradient, as in RowNeeds
DIFFERENTIABLE = tuple(RowInputs._fields.index(name) for name in RowNeeds._fields)
NEEDS = len(DIFFERENTIABLE)


class RowLossesOp(StreamedOp):
    """Rows of scores folded by a rule, with the gradient."""

    name, primitive = "row_losses", "row_rules"
    schema, backward_schema = FORWARD, BACKWARD
    # rules are Python on the CPU too, its scores are the compiled op's
    python_backends = (*PYTHON_BACKENDS, "cpu")

    def setup_context(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:TENSORS], *inputs[LAST:])
        ctx.rest = inputs[TENSORS:LAST]
        if ROW_FOLDS[inputs[TENSORS]].gradient is None:
            ctx.mark_non_differentiable(output)
        ctx.set_materialize_grads(False)

    def tangents(self, direction: str, arguments: tuple, moves: tuple, output: tuple) -> tuple:
        found = super().tangents(direction, arguments, moves, output)
        if direction or ROW_FOLDS[RowInputs(*arguments).rule].gradient is None:
            return found
        # where no row has what its rule sums, no argument reaches the result
        return tuple(
            torch.zeros_like(o) if t is None else t for t, o in zip(found, output, strict=True)
        )

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        if grads[0] is None:
            return (None,) * FIELDS
        needs = [needed[at] for at in DIFFERENTIABLE]
        saved = ctx.saved_tensors
        given = *saved[:TENSORS], *ctx.rest, *saved[TENSORS:]
        found = backward_op(grads[0].contiguous(), *given, *needs)
        out: list[Tensor | None] = [None] * FIELDS
        for at, need, gradient in zip(DIFFERENTIABLE, needs, found, strict=True):
            out[at] = gradient if need else None
        return tuple(out)

    def fake_forward(self, *arguments: Any) -> Tensor:
        p = RowInputs(*arguments)
        size = (p.x.shape[0], ROW_FOLDS[p.rule].size(list(p.params)))
        return p.x.new_empty(size, dtype=row_dtype(p.x.device))

    def fake_backward(self, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        given = (arguments[at] for at in DIFFERENTIABLE)
        return tuple(
            t.new_empty(t.shape) if need and t is not None else arguments[0].new_empty(0)
            for t, need in zip(given, arguments[FIELDS:], strict=True)
        )

    def forward(self, backend: str, *arguments: Any) -> Tensor:
        return bounded.forward(backend, RowInputs(*arguments))

    def backward(self, backend: str, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return bounded.backward(backend, grad, RowInputs(*rest[:FIELDS]), RowNeeds(*rest[FIELDS:]))

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        if not direction:
            return bounded.workspace(backend, RowInputs(*arguments), None)
        p, needs = RowInputs(*arguments[1:-NEEDS]), RowNeeds(*arguments[-NEEDS:])
        return bounded.workspace(backend, p, needs)


ROW_LOSSES = RowLossesOp()
ROW_LOSSES.define()

"""The streamed primitive over rows: each row of scores is folded into a few numbers, never stored.

    d_ij = |x_i - y_j|, |x_i - y_j|^2, <x_i, y_j> or -<x_i, y_j>     (the score)
    each pair is positive, negative or left out                      (the labels)
    out_i = rule(row i of d, its positives, its negatives)           (`row_rules`)

For losses where a row's value needs its whole row of scores at once (an order, a count, a choice),
and not only sums over its pairs: those are `pairs`. Blocks of rows at a time: O((N + M) D) memory
and a few blocks. Backward computes the scores again; its gradient is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, row_dtype
from fused_losses.base.validation import describe
from fused_losses.primitives.distances import reference as reference_distances
from fused_losses.primitives.distances.op import DISTANCE_MATRIX
from fused_losses.primitives.op import PYTHON_BACKENDS, StreamedOp
from fused_losses.row_rules import RULES, Block

# a score's kind of distance matrix, and its sign
SCORES = {
    "euclidean": ("euclidean", 1),
    "sqeuclidean": ("sqeuclidean", 1),
    "dot": ("dot", 1),
    "minus_dot": ("dot", -1),
}
BLOCK_BYTES = 2 << 20  # of scores in a block
GPU_BLOCK_BYTES = 16 << 20  # enough rows for every processor; a block stays in L2

INPUTS = (
    "Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, Tensor? x_groups, Tensor? y_groups, "
    "Tensor? values, str rule, float[] params, str score, bool skip_self, str precision"
)
FORWARD = f"({INPUTS}) -> Tensor statistics"
BACKWARD = (
    f"(Tensor grad, {INPUTS}, bool need_x, bool need_y, bool need_values) "
    "-> (Tensor dx, Tensor dy, Tensor dvalues)"
)


class RowInputs(NamedTuple):
    """One call, in the order of the op's schema."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D], of x's dtype
    x_labels: Tensor  # [N] int32; equal labels: a positive pair, else a negative one
    y_labels: Tensor  # [M] int32
    x_groups: Tensor | None = None  # [N] int32; different groups: the pair is left out
    y_groups: Tensor | None = None  # [M] int32
    values: Tensor | None = None  # [N, K] in `row_dtype`, numbers of each row that the rule takes
    rule: str = "triplets"  # a name in `row_rules.RULES`
    params: tuple[float, ...] | list[float] = ()
    score: str = "euclidean"  # a name in SCORES
    skip_self: bool = False  # leave out i == j
    precision: str = "fp32"


def block_bytes(device: torch.device) -> int:
    return GPU_BLOCK_BYTES if device.type == "cuda" else BLOCK_BYTES


def row_losses(inputs: RowInputs, *, backend: str | None = None) -> Tensor:
    """The rule's statistics of each row, [N, S] in `row_dtype` (float32 or float64).

    Differentiable in x, y and values, where the rule is. NaN scores make their rows' statistics
    NaN (of a rule that gives indices: the NaN is chosen). Raises ValueError or TypeError for inputs
    that do not fit each other; NotImplementedError for a second derivative, but on "reference".
    Time O(N M D) and the rule's own; memory O((N + M) D) and a few blocks.
    """
    _check(inputs)
    inputs = inputs._replace(params=[float(p) for p in inputs.params])
    if RULES[inputs.rule].gradient is None:
        inputs = inputs._replace(x=inputs.x.detach(), y=inputs.y.detach())
    name, _ = backends.choose(
        backend, inputs.x.device, inputs.x.dtype, inputs.precision, "rows", inputs.x.shape[1]
    )
    with torch.autocast(inputs.x.device.type, enabled=False):
        if name == "reference":
            return _reference(inputs)
        # kernels need a coordinate
        return ROW_LOSSES(name if inputs.x.shape[1] else "bounded", *inputs)


def _check(p: RowInputs) -> None:
    """What the blocks rely on; the losses say more of their own arguments."""
    validation.check_matrix("x", p.x, "[N, D]")
    validation.check_matrix("y", p.y, "[M, D]")
    if p.x.shape[1] != p.y.shape[1]:
        raise ValueError(f"y: expected [M, {p.x.shape[1]}] as x has, got {describe(p.y)}")
    validation.check_device("x", p.x, "y", p.y)
    validation.check_same_dtype("x", p.x, "y", p.y)
    validation.check_choice("rule", p.rule, tuple(RULES))
    validation.check_choice("score", p.score, tuple(SCORES))
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
    if p.values is not None:
        if p.values.dim() != 2 or p.values.shape[0] != p.x.shape[0]:
            raise ValueError(
                f"values: expected [{p.x.shape[0]}, K], a row each, got {describe(p.values)}"
            )
        validation.check_device("x", p.x, "values", p.values)


def _block(p: RowInputs, score: Tensor, rows: slice) -> Block:
    """The block of these rows: its classes of pairs beside its scores."""
    same = p.x_labels[rows, None] == p.y_labels
    other = ~same
    if p.x_groups is not None:
        together = p.x_groups[rows, None] == p.y_groups
        same, other = same & together, other & together
    if p.skip_self:
        i = torch.arange(rows.start, rows.stop, device=score.device)
        apart = i[:, None] != torch.arange(score.shape[1], device=score.device)
        same, other = same & apart, other & apart
    values = None if p.values is None else p.values[rows]
    return Block(score, same, other, values, list(p.params))


def _reference(p: RowInputs) -> Tensor:
    """The rule's formula on the whole matrix, of every difference of two rows at once."""
    kind, sign = SCORES[p.score]
    score = sign * reference_distances.distance(kind, p.x, p.y, None, 2.0)
    return RULES[p.rule].formula(_block(p, score, slice(0, p.x.shape[0])))


# ---- blocks of rows -----------------------------------------------------------------------------


def _cuts(p: RowInputs) -> Iterator[slice]:
    n, m = p.x.shape[0], p.y.shape[0]
    size = accumulate_dtype(p.x.dtype).itemsize
    tall = max(1, block_bytes(p.x.device) // (max(m, 1) * size))
    for i in range(0, n, tall):
        yield slice(i, min(i + tall, n))


def _scores(backend: str, p: RowInputs, x: Tensor, y: Tensor) -> Tensor:
    """Scores [B, M] of rows x, before their sign."""
    return DISTANCE_MATRIX.op(backend)(x, y, None, SCORES[p.score][0], 2.0, p.precision)


def _forward(backend: str, p: RowInputs) -> Tensor:
    rule, dtype = RULES[p.rule], accumulate_dtype(p.x.dtype)
    x, y, sign = p.x.to(dtype), p.y.to(dtype), SCORES[p.score][1]
    size = (p.x.shape[0], rule.size(list(p.params)))
    out = p.x.new_empty(size, dtype=row_dtype(p.x.device))
    for rows in _cuts(p):
        score = _scores(backend, p, x[rows], y)
        out[rows] = rule.on(backend).forward(_block(p, -score if sign < 0 else score, rows))
    return out


def _backward(
    backend: str, grad: Tensor, p: RowInputs, need_x: bool, need_y: bool, need_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rule, dtype = RULES[p.rule], accumulate_dtype(p.x.dtype)
    x, y = p.x.to(dtype), p.y.to(dtype)
    kind, sign = SCORES[p.score]
    dx = torch.empty_like(x) if need_x else p.x.new_empty(0)
    dy = torch.zeros_like(y) if need_y else p.y.new_empty(0)
    dvalues = torch.zeros_like(p.values) if need_values else p.x.new_empty(0)
    backward = DISTANCE_MATRIX.op(backend, "_backward")
    for rows in _cuts(p):
        score = _scores(backend, p, x[rows], y)
        slope, of_values = rule.on(backend).gradient(
            _block(p, -score if sign < 0 else score, rows), grad[rows].to(dtype)
        )
        slope = -slope if sign < 0 else slope
        given = (slope.to(dtype), score, x[rows], y, None, kind, 2.0, p.precision)
        of_x, of_y, _ = backward(*given, need_x, need_y, False)
        if need_x:
            dx[rows] = of_x
        if need_y:
            dy += of_y
        if need_values and of_values is not None:
            dvalues[rows] = of_values.to(dvalues.dtype)
    return (
        dx.to(p.x.dtype) if need_x else dx,
        dy.to(p.y.dtype) if need_y else dy,
        dvalues,
    )


def _python(direction: str, backend: str, *arguments: Any) -> Any:
    with torch.autocast(arguments[0].device.type, enabled=False):
        if not direction:
            return _forward(backend, RowInputs(*arguments))
        grad, *inputs = arguments
        return _backward(backend, grad, RowInputs(*inputs[:FIELDS]), *inputs[FIELDS:])


# ---- the op: autograd and registration ----------------------------------------------------------

FIELDS = len(RowInputs._fields)
TENSORS = RowInputs._fields.index("rule")  # how many fields, the first ones, are tensors
VALUES = RowInputs._fields.index("values")


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.rest = inputs[TENSORS:]
    if RULES[inputs[TENSORS]].gradient is None:
        ctx.mark_non_differentiable(output)
    ctx.set_materialize_grads(False)


def _gradients(backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
    if grads[0] is None:
        return (None,) * FIELDS
    needs = (needed[0], needed[1], needed[VALUES])
    found = backward_op(grads[0].contiguous(), *ctx.saved_tensors, *ctx.rest, *needs)
    out: list[Tensor | None] = [None] * FIELDS
    for at, need, gradient in zip((0, 1, VALUES), needs, found, strict=True):
        out[at] = gradient if need else None
    return tuple(out)


def _fake_forward(*arguments: Any) -> Tensor:
    p = RowInputs(*arguments)
    size = (p.x.shape[0], RULES[p.rule].size(list(p.params)))
    return p.x.new_empty(size, dtype=row_dtype(p.x.device))


def _fake_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    p, (need_x, need_y, need_values) = RowInputs(*arguments[:FIELDS]), arguments[FIELDS:]
    return (
        p.x.new_empty(p.x.shape if need_x else 0),
        p.y.new_empty(p.y.shape if need_y else 0),
        torch.empty_like(p.values) if need_values else p.x.new_empty(0),
    )


ROW_LOSSES = StreamedOp(
    name="row_losses",
    forward=FORWARD,
    backward=BACKWARD,
    setup_context=_setup_context,
    gradients=_gradients,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    python=_python,
    # rules are Python on the CPU too, its scores are the compiled op's
    python_backends=(*PYTHON_BACKENDS, "cpu"),
)
ROW_LOSSES.define()

"""The streamed primitive of class losses: tiles of classes folded by a rule, written in PyTorch.

    c_ij = pool_k <x_i, w_jk>                      a class's cosine, over its K centres
    statistic_si = sum_j term_s(c_ij)              or log sum_j exp term_s(c_ij), over the negatives
    targets_il = c_i,y_il                          the classes of the row's own labels

A rule says what the terms are; a class that is none of a row's labels is its negative. Statistics
of tiles, and of shards of the classes, merge by `merge_statistics`, and the gradient of a tile
needs nothing but the merged ones: the same op serves one process and a sharded head. It is for
losses that `row_statistics` cannot express (sub-centres, several labels a row, no softmax). The
backends in COMPILED have the KERNEL_RULES in kernels; all else runs in PyTorch on a tile, its
products on the backend. Tiles are computed again in backward; nothing N x C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.memory_budget import Room
from fused_losses.base.numerics import no_autocast, row_dtype
from fused_losses.base.validation import describe
from fused_losses.primitives.class_rules import bounded, tangents
from fused_losses.primitives.class_rules.bounded import gradient_shape
from fused_losses.primitives.class_rules.inputs import (
    BACKWARD,
    FORWARD,
    ClassInputs,
    ClassNeeds,
    ClassStatistics,
)
from fused_losses.primitives.class_rules.reference import reference
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS, KERNEL_RULES
from fused_losses.primitives.op import PYTHON_BACKENDS, StreamedOp, duals
from fused_losses.primitives.row_statistics.inputs import kept_classes

# ---- what the op is given -----------------------------------------------------------------------


def class_statistics(
    inputs: ClassInputs, *, room: Room | None = None, backend: str | None = None
) -> ClassStatistics:
    """The rule's statistics and the cosines of the labels, differentiable in x and weight.

    room: bytes of products that the forward may keep to spare the backward their recomputation, of
    as many centres as fit (rules in Triton's kernels keep none); it takes them from the room.
    Raises ValueError, TypeError or IndexError for inputs that do not fit each other;
    NotImplementedError for a second derivative, but on "reference". Labels must be among `classes`.
    Time O(N M K D) and the rule's own; memory O(N D) and a few tiles (`explain`).
    """
    _check(inputs)
    inputs = inputs._replace(params=[float(p) for p in inputs.params])
    name = _choose(inputs, backend)
    with no_autocast(inputs.x.device):
        if name == "reference":
            return reference(inputs)
        return ClassStatistics(*CLASS_RULES(name, *inputs, _kept_centers(name, inputs, room))[:-1])


def _kept_centers(name: str, p: ClassInputs, room: Room | None) -> int:
    """Of how many centres the forward keeps products, taken from the room."""
    if name != "cpu" and _in_kernels(name, p):
        return 0
    return kept_classes(room, p.x, p.weight, p.taking_part * p.centers)


def class_gradients(
    inputs: ClassInputs,
    statistics: Tensor,  # [S, N], merged over all shards
    grad_statistics: Tensor,  # [S, N]
    grad_targets: Tensor,  # [N, L]
    *,
    compact: bool = False,
    need_x: bool = True,
    need_weight: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """dx [N, D] and dweight of one shard, by hand: for heads that merge statistics over ranks.

    dweight is [C K, D], or with `compact` and `classes` [M K, D], the rows of these classes;
    what is not needed is empty. Time and memory as `class_statistics`, and dweight.
    """
    inputs = inputs._replace(params=[float(p) for p in inputs.params])
    name = _choose(inputs, backend)
    if name == "reference":
        raise ValueError("backend: expected a streamed one, got 'reference', which autograd serves")
    op = CLASS_RULES.op(name, "_backward")
    needs = compact, need_x, need_weight, False
    given = grad_statistics, grad_targets, statistics, inputs.kept(0)
    return op(*given, *inputs, *needs)[:2]


def is_reference(inputs: ClassInputs, backend: str | None) -> bool:
    """Whether `class_statistics` would run materialised, with any order of derivatives."""
    return _choose(inputs, backend) == "reference"


def _choose(p: ClassInputs, backend: str | None) -> str:
    width = p.x.shape[1]
    name, _ = backends.choose(
        backend, p.x.device, p.weight.dtype, p.precision, "class_rules", width
    )
    # kernels need a coordinate
    return name if width or name == "reference" else "bounded"


def _check(p: ClassInputs) -> None:
    """What the tiles rely on; the losses say more of their own arguments."""
    validation.check_matrix("x", p.x, "[N, D]")
    validation.check_matrix("weight", p.weight, "[C K, D]")
    n = p.x.shape[0]
    if p.x.shape[1] != p.weight.shape[1]:
        raise ValueError(
            f"weight: expected [C K, {p.x.shape[1]}] as x has, got {describe(p.weight)}"
        )
    if p.x.dtype not in (p.weight.dtype, p.dtype):
        raise TypeError(
            f"x: expected {p.weight.dtype} or {p.dtype} beside weight, got {describe(p.x)}"
        )
    validation.check_device("x", p.x, "weight", p.weight)
    validation.check_choice("rule", p.rule, tuple(CLASS_FOLDS))
    validation.check_choice("precision", p.precision, validation.PRECISIONS)
    if p.centers < 1 or p.weight.shape[0] % p.centers:
        raise ValueError(
            f"centers: expected a divisor of weight's {p.weight.shape[0]} rows, got {p.centers}"
        )
    if not p.softness >= 0:
        raise ValueError(f"softness: expected a value >= 0, got {p.softness}")
    if p.labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64 class ids, got {describe(p.labels)}")
    if p.labels.dim() != 2 or p.labels.shape[0] != n:
        raise ValueError(f"labels: expected shape ({n}, L), got {describe(p.labels)}")
    rule = CLASS_FOLDS[p.rule]
    if len(p.params) != rule.params:
        raise ValueError(f"params: expected {rule.params} of {p.rule!r}, got {len(p.params)}")
    given = 0 if p.values is None else p.values.shape[0]
    if given not in rule.values or (p.values is not None and tuple(p.values.shape) != (given, n)):
        wanted = " or ".join(f"({r}, {n})" if r else "None" for r in rule.values)
        got = "None" if p.values is None else describe(p.values)
        raise ValueError(f"values: expected {wanted} with rule {p.rule!r}, got {got}")


# ---- the op: autograd and registration ----------------------------------------------------------

FIELDS = len(ClassInputs._fields)
TENSORS = ClassInputs._fields.index("rule")  # how many fields, the first ones, are tensors
# backends with some rules in kernels; others, and other rules, run `bounded` on their products
COMPILED = ("cpu", "triton")
VALUES = ClassInputs._fields.index("values")
NEEDS = len(ClassNeeds._fields)
SAVED = 4  # what a backward has before the inputs


def _in_kernels(backend: str, p: ClassInputs) -> bool:
    return backend in COMPILED and p.rule in KERNEL_RULES


class ClassRulesOp(StreamedOp):
    """Classes folded by a rule, with the gradient."""

    name = primitive = "class_rules"
    schema, backward_schema = FORWARD, BACKWARD
    # the CPU's kernels are functions of the extension, whose targets are PyTorch's
    python_backends = (*PYTHON_BACKENDS, "cpu")

    def setup_context(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        statistics, _, hardest, hardest_score, kept = output
        ctx.mark_non_differentiable(hardest, hardest_score, kept)
        ctx.save_for_backward(*inputs[:TENSORS], statistics, kept)
        ctx.rest = inputs[TENSORS:-1]
        ctx.set_materialize_grads(False)

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        *tensors, statistics, kept = ctx.saved_tensors
        of_statistics, of_targets = grads[:2]
        if of_statistics is None and of_targets is None:
            return (None,) * (FIELDS + 1)
        if of_statistics is None:
            of_statistics = torch.zeros_like(statistics)
        if of_targets is None:
            of_targets = torch.zeros_like(tensors[2], dtype=statistics.dtype)
        asked = needed[0], needed[1], needed[VALUES] and CLASS_FOLDS[ctx.rest[0]].own_slope
        found = backward_op(
            of_statistics.contiguous(), of_targets.contiguous(), statistics, kept, *tensors,
            *ctx.rest, False, *asked,
        )  # fmt: skip
        given: list[Tensor | None] = [None] * (FIELDS + 1)
        for at, need, gradient in zip((0, 1, VALUES), asked, found, strict=True):
            given[at] = gradient if need else None
        return tuple(given)

    def fake_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        p, kept_centers = ClassInputs(*arguments[:-1]), arguments[-1]
        n, wide = p.x.shape[0], row_dtype(p.x.device)
        return (
            p.x.new_empty((len(CLASS_FOLDS[p.rule].kinds), n), dtype=wide),
            p.x.new_empty(p.labels.shape, dtype=wide),
            p.labels.new_empty(n),
            p.x.new_empty(n, dtype=p.dtype),
            p.kept(kept_centers),
        )

    def fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        p, needs = ClassInputs(*arguments[SAVED:-NEEDS]), ClassNeeds(*arguments[-NEEDS:])
        return (
            p.x.new_empty(p.x.shape if needs.x else 0),
            p.weight.new_empty(gradient_shape(p, needs.compact) if needs.weight else 0),
            arguments[0].new_empty((1, p.x.shape[0]) if needs.values else 0),
        )

    def forward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        p = ClassInputs(*arguments[:-1])
        kept = p.kept(arguments[-1])
        if not _in_kernels(backend, p):
            return *bounded.forward(backend, p, kept), kept
        more = (kept,) if backend == "cpu" else ()
        return *self.form(backend).forward(p, *more), kept

    def backward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        p, needs = ClassInputs(*arguments[SAVED:-NEEDS]), ClassNeeds(*arguments[-NEEDS:])
        of_statistics, of_targets, statistics, kept = arguments[:SAVED]
        given = of_statistics, of_targets, statistics, p, needs.compact, needs.x, needs.weight
        if _in_kernels(backend, p):
            more = (kept,) if backend == "cpu" else ()
            found = self.form(backend).backward(*given, *more)
        else:
            found = bounded.backward(backend, *given, kept)
        return *found, _of_values(of_statistics, statistics, needs.values)

    def tangents(self, direction: str, arguments: tuple, moves: tuple, output: tuple) -> tuple:
        if direction:
            # kept products do not know their tangents
            at = SAVED - 1
            without = *arguments[:at], arguments[at][:0], *arguments[SAVED:]
            moves = *moves[:at], None, *moves[SAVED:]
            return super().tangents(direction, without, moves, output)
        moving = tuple(t if i in (0, 1, VALUES) else None for i, t in enumerate(moves))
        p = ClassInputs(*duals(arguments, moving)[:-1])
        return *tangents.statistics(p, output[0]), None, None, None

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        needs = None
        if direction:
            arguments, needs = arguments[SAVED:-NEEDS], ClassNeeds(*arguments[-NEEDS:])
        p = ClassInputs(*arguments[:FIELDS])
        if _in_kernels(backend, p):
            return self.form(backend).workspace(p, needs)
        return bounded.workspace(backend, p, needs)


def _of_values(grad_statistics: Tensor, statistics: Tensor, needed: bool) -> Tensor:
    if not needed:
        return grad_statistics.new_empty(0)
    return (grad_statistics[0] * statistics[1])[None]


CLASS_RULES = ClassRulesOp()
CLASS_RULES.define()


class ClassTargetsOp(StreamedOp):
    """Cosines of the rows with their labels, without a gradient; on every device the same code."""

    name, primitive = "class_targets", "class_rules"
    schema = (
        "(Tensor x, Tensor weight, Tensor labels, int centers, float softness, bool normalize) "
        "-> Tensor"
    )
    python_backends = ("bounded",)

    def forward(self, backend: str, *arguments: Any) -> Tensor:
        return bounded.targets(*arguments)

    def fake_forward(self, x: Tensor, weight: Tensor, labels: Tensor, *_: Any) -> Tensor:
        return x.new_empty(labels.shape, dtype=row_dtype(x.device))

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        x, _, labels, centers, *_ = arguments
        return bounded.targets_workspace(x, labels, centers)


CLASS_TARGETS = ClassTargetsOp()
CLASS_TARGETS.define()


def class_targets(p: ClassInputs) -> Tensor:
    """Cosines of the rows with their labels, [N, L] in `row_dtype`, 0 where the label is -1.

    Without gradient: for values that the rule needs before the sweep, which gives them again with
    one. Labels must be in range. Time O(N L K D), memory a tile.
    """
    given = (p.x.detach(), p.weight.detach(), p.labels, p.centers, p.softness, p.normalize)
    return CLASS_TARGETS("bounded", *given)

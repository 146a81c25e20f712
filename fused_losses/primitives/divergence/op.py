"""The streamed primitive of distillation: two score matrices, met class by class, never stored.

    u_ij = <x_i, w_j> + b_j        v_ij = <t_i, wt_j> + bt_j   (w_j, wt_j by their norms if asked)
                                   or scale_i teacher_ij + bt_j, of scores [N, C]
    lse_i = log sum_{j != y_i} exp u_ij      target_i = u_iy      (teacher_lse, teacher_target of v)

With q_s and q_t the softmaxes of u and v over j != y_i, the folds of a kind are

    forward          sum q_t log(q_t / q_s)
    reverse          sum q_s log(q_s / q_t)
    power            log sum exp(eps v), and the mean of u under softmax(eps v)
    jensen_shannon   beta KL(q_t || m) + (1 - beta) KL(q_s || m),  m = beta q_t + (1 - beta) q_s
    total_variation  sum |q_t - q_s| / 2
    bernoulli        sum KL(Bern(sigmoid v) || Bern(sigmoid u)), scores cut at +-limit
    bernoulli_norm   sum KL(Bern(1/2) || Bern(sigmoid(u - v))), u - v cut at +-limit
    squared          sum (u - v)^2

Near agreement all keep their digits: a Kullback-Leibler divergence is log(1 + E) with
E = sum q_t (exp(r) - 1 - r) >= 0 of the scores' difference r about its mean, in one sweep; tiles
merge as variances do. q_s - q_t is q_t expm1(log q_s - log q_t), within the tile. The kinds of
probabilities (jensen_shannon, total_variation) sweep twice. Backward computes both tiles again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.numerics import no_autocast, row_dtype
from fused_losses.base.validation import describe
from fused_losses.primitives.divergence import bounded
from fused_losses.primitives.divergence.faults import FAULTS
from fused_losses.primitives.divergence.inputs import (
    BACKWARD,
    FORWARD,
    TENSORS,
    DivergenceInputs,
    backward_arguments,
    gradient_shapes,
)
from fused_losses.primitives.divergence.reference import reference
from fused_losses.primitives.divergence.rules import DIVERGENCES
from fused_losses.primitives.op import StreamedOp


class DivergenceStatistics(NamedTuple):
    """What one sweep over the classes knows of each row, in `row_dtype`."""

    lse: Tensor  # [N] of the student's scores of the others; -inf: there are none
    teacher_lse: Tensor  # [N]
    target: Tensor  # [N] the student's score of the label, bias and all; 0 without one
    teacher_target: Tensor  # [N]
    folds: Tensor  # [F, N] of the kind; over no classes 0 (a log of a sum: -inf)


def divergence(
    inputs: DivergenceInputs, *, kept_classes: int = 0, backend: str | None = None
) -> DivergenceStatistics:
    """Statistics of both scores over the classes, differentiable in all that floats.

    `kept_classes`: how many classes' scores the forward may keep for the backward (cpu only).

    Raises ValueError, TypeError or IndexError for inputs that do not fit each other;
    NotImplementedError for a second derivative, but on "reference". Labels must be among `classes`.
    A number that is NaN or infinite makes its row NaN, one of a class every row. Time
    O(N K (Ds + Dt)), memory O(N D), a few tiles and N for each class's score that is kept; a dense
    teacher's gradient is [N, C].
    """
    _check(inputs)
    inputs = inputs._replace(params=[float(p) for p in inputs.params])
    name = choose(inputs, backend)
    with no_autocast(inputs.x.device):
        if name == "reference":
            found = reference(inputs)
        else:
            spoilt = FAULTS(*(v.detach() if isinstance(v, Tensor) else v for v in inputs))
            kept = kept_classes if name == "cpu" else 0
            found = (part + spoilt for part in DIVERGENCE(name, *inputs, kept)[:-1])
    lse, teacher_lse, target, teacher_target, folds = found
    vectors = lse, teacher_lse, target, teacher_target
    return DivergenceStatistics(*vectors, folds[: DIVERGENCES[inputs.kind].differentiable])


def choose(p: DivergenceInputs, backend: str | None) -> str:
    """The backend that runs such a call."""
    width = p.x.shape[1]
    name, _ = backends.choose(backend, p.x.device, p.weight.dtype, p.precision, "divergence", width)
    # kernels need a coordinate
    deep = width > 0 and (p.teacher_weight is None or p.teacher.shape[1] > 0)
    return name if deep or name == "reference" else "bounded"


def _check(p: DivergenceInputs) -> None:
    """What the tiles rely on; the losses say more of their own arguments."""
    validation.check_choice("kind", p.kind, tuple(DIVERGENCES))
    rule = DIVERGENCES[p.kind]
    if len(p.params) != len(rule.params):
        raise ValueError(
            f"params: expected {len(rule.params)} of {p.kind!r} ({', '.join(rule.params)}), got "
            f"{len(p.params)}"
        )
    validation.check_choice("precision", p.precision, validation.PRECISIONS)
    validation.check_pair("x", p.x, "weight", p.weight)
    (n, _), c = p.x.shape, p.weight.shape[0]
    if p.x.dtype not in (p.weight.dtype, p.dtype):
        raise TypeError(
            f"x: expected {p.weight.dtype} or {p.dtype} beside weight, got {describe(p.x)}"
        )
    if p.teacher_weight is None:
        validation.check_matrix("teacher", p.teacher, "[N, C]")
        if tuple(p.teacher.shape) != (n, c):
            raise ValueError(
                f"teacher: expected scores ({n}, {c}) without a teacher_weight, got "
                f"{describe(p.teacher)}"
            )
    else:
        validation.check_pair("teacher", p.teacher, "teacher_weight", p.teacher_weight)
        if p.teacher.shape[0] != n:
            raise ValueError(f"teacher: expected {n} rows as x has, got {describe(p.teacher)}")
        if p.teacher_weight.shape[0] != c:
            raise ValueError(
                f"teacher_weight: expected {c} classes as weight has, got "
                f"{describe(p.teacher_weight)}"
            )
        validation.check_same_dtype("weight", p.weight, "teacher_weight", p.teacher_weight)
        if p.teacher.dtype not in (p.weight.dtype, p.dtype):
            raise TypeError(
                f"teacher: expected {p.weight.dtype} or {p.dtype} beside teacher_weight, got "
                f"{describe(p.teacher)}"
            )
        if p.teacher_scale is not None:
            raise ValueError(
                "teacher_scale: expected None with a teacher_weight (multiply the rows instead)"
            )
    validation.check_device("x", p.x, "teacher", p.teacher)
    validation.check_index_vector("labels", p.labels, n, p.x)
    for name, vector, size, what in (
        ("bias", p.bias, c, "one value a class [C]"),
        ("teacher_bias", p.teacher_bias, c, "one value a class [C]"),
        ("teacher_scale", p.teacher_scale, n, "one value a row [N]"),
    ):
        if vector is not None:
            validation.check_vector(name, vector, size, what, p.x)


class DivergenceOp(StreamedOp):
    """Two score matrices met class by class, with the gradients of both."""

    name = primitive = "divergence"
    schema, backward_schema = FORWARD, BACKWARD

    def setup_context(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        lse, teacher_lse, _, _, folds, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(*inputs[:TENSORS], lse, teacher_lse, folds, kept)
        ctx.rest = inputs[TENSORS:-1]
        ctx.set_materialize_grads(False)

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        *tensors, lse, teacher_lse, folds, kept = ctx.saved_tensors
        like = (lse, lse, lse, lse, folds)
        given = (
            torch.zeros_like(of) if g is None else g.contiguous()
            for g, of in zip(grads[:-1], like, strict=True)
        )
        x, weight, teacher, teacher_weight, _, _, bias, teacher_bias, teacher_scale = needed[
            :TENSORS
        ]
        needs = (x, weight, teacher, teacher_weight, bias, teacher_bias, teacher_scale)
        saved = lse, teacher_lse, folds, kept
        found = backward_op(*given, *tensors, *ctx.rest, *saved, False, *needs)
        some = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (*some[:4], None, None, *some[4:], *(None,) * (len(ctx.rest) + 1))

    def fake_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        p, kept_classes = DivergenceInputs(*arguments[:-1]), arguments[-1]
        n, wide = p.x.shape[0], row_dtype(p.x.device)
        vectors = [p.x.new_empty(n, dtype=wide) for _ in range(4)]
        rule = DIVERGENCES[p.kind]
        folds = p.x.new_empty((rule.folds + rule.kept, n), dtype=wide)
        return (*vectors, folds, p.kept(kept_classes))

    def fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        _, p, _, needs = backward_arguments(arguments)
        return tuple(like.new_empty(shape) for like, shape in gradient_shapes(p, needs))

    def forward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        p = DivergenceInputs(*arguments[:-1])
        if backend in ON_TILES:
            found = bounded.forward(p, backend)
        else:
            found = self.form(backend).forward(p)
        return (*found, p.kept(0))

    def backward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        grads, p, saved, needs = backward_arguments(arguments)
        if backend in ON_TILES:
            return bounded.backward(p, saved, grads, needs, backend)
        found = self.form(backend).backward(p, saved, grads, needs)
        return tuple(p.weight.new_empty(0) if g is None else g for g in found)

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        if direction:
            _, p, _, needs = backward_arguments(arguments)
        else:
            p, needs = DivergenceInputs(*arguments[:-1]), None
        if backend in ON_TILES:
            return bounded.workspace(p, needs, backend)
        return self.form(backend).workspace(p, needs)


# backends without kernels of their own: tiles in PyTorch, products on the backend
ON_TILES = ("bounded", "cuda")
DIVERGENCE = DivergenceOp()
DIVERGENCE.define()

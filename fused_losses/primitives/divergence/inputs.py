"""What a divergence of two score matrices is given and gives, passed whole between the layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.row_statistics.inputs import kept_row

INPUTS = (
    "Tensor x, Tensor weight, Tensor teacher, Tensor? teacher_weight, Tensor labels, "
    "Tensor? classes, Tensor? bias, Tensor? teacher_bias, Tensor? teacher_scale, bool normalize, "
    "bool teacher_normalize, str kind, float[] params, str precision"
)

FORWARD = (
    f"({INPUTS}, SymInt kept_classes) -> (Tensor lse, Tensor teacher_lse, Tensor target, "
    "Tensor teacher_target, Tensor folds, Tensor kept)"
)

BACKWARD = (
    "(Tensor grad_lse, Tensor grad_teacher_lse, Tensor grad_target, Tensor grad_teacher_target, "
    f"Tensor grad_folds, {INPUTS}, Tensor lse, Tensor teacher_lse, Tensor folds, Tensor kept, "
    "bool compact, bool need_x, bool need_weight, bool need_teacher, bool need_teacher_weight, "
    "bool need_bias, bool need_teacher_bias, bool need_teacher_scale) -> (Tensor dx, "
    "Tensor dweight, Tensor dteacher, Tensor dteacher_weight, Tensor dbias, Tensor dteacher_bias, "
    "Tensor dteacher_scale)"
)


class DivergenceInputs(NamedTuple):
    """One call, in the order of the op's schema."""

    x: Tensor  # [N, Ds], the student's rows
    weight: Tensor  # [C, Ds]
    teacher: Tensor  # [N, Dt], or where there is no teacher_weight its scores [N, C]
    teacher_weight: Tensor | None  # [C, Dt]
    labels: Tensor  # [N] int64, -1: no target
    classes: Tensor | None = None  # [K] int64, increasing: the classes that take part
    bias: Tensor | None = None  # [C]
    teacher_bias: Tensor | None = None  # [C]
    teacher_scale: Tensor | None = None  # [N], of scores [N, C] alone
    normalize: bool = False  # rows of weight by their norm
    teacher_normalize: bool = False  # rows of teacher_weight
    kind: str = "forward"  # a name in DIVERGENCES
    params: tuple[float, ...] | list[float] = ()
    precision: str = "fp32"

    @property
    def taking_part(self) -> int:
        return self.weight.shape[0] if self.classes is None else self.classes.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of products."""
        return accumulate_dtype(self.weight.dtype)

    @property
    def kept_scores(self) -> int:
        """Of a row and a class: u and v (near, u - v), or beside dense scores u alone."""
        return 1 if self.teacher_weight is None else 2

    def kept(self, classes: int) -> Tensor:
        """Room for what the forward keeps of so many classes, in the dtype of products."""
        shape = (self.kept_scores, classes, kept_row(self.x.shape[0]))
        return self.x.new_empty(shape, dtype=self.dtype)


class DivergenceGradients(NamedTuple):
    """The gradients that come in."""

    lse: Tensor  # [N]
    teacher_lse: Tensor  # [N]
    target: Tensor  # [N]
    teacher_target: Tensor  # [N]
    folds: Tensor  # [F, N]


class DivergenceNeeds(NamedTuple):
    """The gradients that are asked for."""

    compact: bool  # those of both weights have the rows of `classes` only
    x: bool
    weight: bool
    teacher: bool
    teacher_weight: bool
    bias: bool
    teacher_bias: bool
    teacher_scale: bool

    @property
    def of_teacher(self) -> bool:
        return self.teacher or self.teacher_weight or self.teacher_bias or self.teacher_scale


class DivergenceSaved(NamedTuple):
    """What the backward needs of the forward."""

    lse: Tensor  # [N]
    teacher_lse: Tensor  # [N]
    folds: Tensor  # [F, N], and what is kept beside them (`Divergence.kept`) if none joined them
    kept: Tensor | None = None  # [1 or 2, kept classes, `kept_row`]: what the op's own forward kept


GRADIENTS, FIELDS = len(DivergenceGradients._fields), len(DivergenceInputs._fields)
SAVED, TENSORS = len(DivergenceSaved._fields), DivergenceInputs._fields.index("normalize")


def backward_arguments(
    arguments: tuple,
) -> tuple[DivergenceGradients, DivergenceInputs, DivergenceSaved, DivergenceNeeds]:
    """The backward op's arguments, in its schema's order, sorted out."""
    after = GRADIENTS + FIELDS
    return (
        DivergenceGradients(*arguments[:GRADIENTS]),
        DivergenceInputs(*arguments[GRADIENTS:after]),
        DivergenceSaved(*arguments[after : after + SAVED]),
        DivergenceNeeds(*arguments[after + SAVED :]),
    )


def gradient_shapes(p: DivergenceInputs, needs: DivergenceNeeds) -> list[tuple[Tensor, tuple]]:
    """For each gradient its input (another one where there is none) and its shape, (0,): none."""
    rows = p.taking_part if needs.compact else p.weight.shape[0]
    given = (
        (needs.x, p.x, None), (needs.weight, p.weight, rows), (needs.teacher, p.teacher, None),
        (needs.teacher_weight, p.teacher_weight, rows), (needs.bias, p.bias, None),
        (needs.teacher_bias, p.teacher_bias, None), (needs.teacher_scale, p.teacher_scale, None),
    )  # fmt: skip
    return [
        (p.weight, (0,))
        if not need or t is None
        else (t, tuple(t.shape) if count is None else (count, *t.shape[1:]))
        for need, t, count in given
    ]


def check_ids(p: DivergenceInputs) -> None:
    """Labels and classes in range, before anything is read by them."""
    validation.check_labels(p.labels, p.weight.shape[0])
    if p.classes is not None and not (p.labels.is_cuda or p.labels.is_meta):
        validation.check_classes(p.classes, p.weight.shape[0])
        validation.check_labels_in_classes(p.labels, p.classes)

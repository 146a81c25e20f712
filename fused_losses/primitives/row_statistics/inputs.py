"""What the streamed primitive is given, passed whole between the layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.memory_budget import Room, less_of
from fused_losses.base.numerics import accumulate_dtype


class Inputs(NamedTuple):
    """One call of the primitive (`fused_losses.primitives.row_statistics`)."""

    x: Tensor  # [N, D]
    weight: Tensor  # [C, D]
    labels: Tensor  # [N], -1: no target
    classes: Tensor | None = None  # [K], increasing
    bias: Tensor | None = None  # [C]
    column_weight: Tensor | None = None  # [C]
    normalize: bool = False
    weighted: bool = False
    precision: str = "fp32"
    bend: Tensor | None = None  # [4, N]: threshold, then the polynomial above it


def counts_as_zero(backend: str | None) -> float:
    """The norm below which a class is one of zeros, where it is normalised.

    GPU kernels keep 1/|w| as a float32 number that may meet a gradient (csrc/cuda/rows.h).
    """
    return 2.0**-120 if backend in ("triton", "cuda") else 0.0


class RowGradients(NamedTuple):
    """The gradients that come in, [N] each."""

    lse: Tensor
    target: Tensor
    weighted: Tensor | None


class Needs(NamedTuple):
    """The gradients that are asked for."""

    x: bool
    weight: bool
    bias: bool
    compact: bool = False  # the weight's gradient has the rows of `classes` only, [K, D]


FORWARD = (
    "(Tensor x, Tensor weight, Tensor labels, Tensor? classes, Tensor? bias, "
    "Tensor? column_weight, bool normalize, bool weighted, str precision, Tensor? bend, "
    "SymInt kept_classes) "
    "-> (Tensor lse, Tensor target, Tensor weighted_sum, Tensor hardest, Tensor hardest_score, "
    "Tensor kept)"
)

BACKWARD = (
    "(Tensor grad_lse, Tensor grad_target, Tensor? grad_weighted, Tensor x, Tensor weight, "
    "Tensor labels, Tensor? classes, Tensor? bias, Tensor? column_weight, Tensor lse, "
    "Tensor kept, bool normalize, bool weighted, str precision, Tensor? bend, bool compact, "
    "bool need_x, bool need_weight, bool need_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)

KEPT_PADDING = 64  # scores are kept in rows of whole vectors
# bytes of all scores of a call that "cpu" keeps without a room: what a thread's scratch may hold
# between calls (kHeldScratch of csrc/bind/bind.h), which its tiles need anyway
SMALL = 1 << 20


def kept_row(n: int) -> int:
    """Elements that a class's scores of n rows take where they are kept."""
    return (n + KEPT_PADDING - 1) // KEPT_PADDING * KEPT_PADDING


def kept_classes(
    room: Room | None,
    x: Tensor,
    weight: Tensor,
    taking_part: int,
    scores: int = 1,
    backend: str | None = None,
) -> int:
    """How many classes' scores are kept, whole vectors a class, taken from the room.

    scores: of each row and class. None where no gradient is asked for. With no room all of a small
    call on the backend "cpu", at most SMALL bytes; in compiled code, whose sizes may be symbols,
    none.
    """
    needed = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not needed or (room is None and (backend != "cpu" or torch.compiler.is_compiling())):
        return 0
    each = max(scores * kept_row(x.shape[0]), 1) * accumulate_dtype(weight.dtype).itemsize
    if room is None:
        return taking_part if taking_part * each <= SMALL else 0
    kept = less_of(room.left // each, taking_part)
    room.take(kept * each)
    return kept


def backward_arguments(
    arguments: tuple,
) -> tuple[Inputs, Tensor, Tensor, RowGradients, Needs]:
    """The backward op's arguments, in its schema's order, sorted out: inputs, lse, kept, ..."""
    p = Inputs(*arguments[3:9], *arguments[11:15])
    needs = Needs(*arguments[16:], compact=arguments[15])
    return p, arguments[9], arguments[10], RowGradients(*arguments[:3]), needs


def gradient_shape(p: Inputs, needs: Needs) -> tuple[int, int]:
    """Of the weight: its own, or with `compact` a row for each class that takes part."""
    rows = p.classes if needs.compact and p.classes is not None else p.weight
    return (rows.shape[0], p.weight.shape[1])


def check(labels: Tensor, weight: Tensor, classes: Tensor | None) -> None:
    """Labels and classes in range, before anything is read by them."""
    validation.check_labels(labels, weight.shape[0])
    if classes is not None and not labels.is_cuda:
        validation.check_classes(classes, weight.shape[0])
        validation.check_labels_in_classes(labels, classes)

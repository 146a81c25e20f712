"""One call as the kernels of both GPU backends read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.backends.gpu.product import Product
from fused_losses.base.checked_labels import checked_labels
from fused_losses.primitives.row_statistics.inputs import Inputs, check


@dataclass(frozen=True)
class Problem(Product):
    """The product of x and W, with what rows and classes have besides."""

    exact: Tensor  # [N, D] x for the targets' scores: float32 where products take it in 16 bits
    positions: Tensor  # [N] int32: column of the target, -1 = none
    classes: Tensor | None  # [K]
    bias: Tensor | None
    column_weight: Tensor | None
    bend: Tensor | None  # [N, 4] float32: t, p, q, r of a row side by side
    normalize: bool

    @property
    def weight(self) -> Tensor:
        """[C, D], last stride 1"""
        return self.y

    @property
    def count(self) -> int:
        return self.m if self.classes is None else self.classes.shape[0]


def checked_problem(inputs: Inputs) -> Problem:
    """The forward's, labels and classes found in range."""
    if inputs.classes is not None:
        check(inputs.labels, inputs.weight, inputs.classes)
        return problem(inputs, gradient=False)
    positions = checked_labels(inputs.labels, inputs.weight.shape[0], dtype=torch.int32)
    return problem(inputs, gradient=False, positions=positions)


def problem(inputs: Inputs, gradient: bool, positions: Tensor | None = None) -> Problem:
    """The inputs as the kernels read them, with the products of this device."""
    x, weight, labels, classes, bias, column_weight, normalize, _, precision, bend = inputs
    if classes is None:
        positions = labels.to(torch.int32) if positions is None else positions
    else:
        classes = classes.to(torch.int64).contiguous()
        found = torch.searchsorted(classes, labels).clamp_max(max(classes.numel() - 1, 0))
        known = classes[found] == labels if classes.numel() else torch.zeros_like(labels).bool()
        # a label outside `classes` has no column here: the row counts as one without target
        positions = torch.where(known, found, -1).to(torch.int32)
    exact = x if x.dtype == weight.dtype else x.float()
    return Problem.of(
        x.to(weight.dtype),  # tensor cores take both operands in one dtype
        weight,
        precision,
        gradient,
        exact=exact if exact.stride(-1) == 1 else exact.contiguous(),
        positions=positions.contiguous(),
        classes=classes,
        bias=None if bias is None else bias.contiguous(),
        column_weight=None
        if column_weight is None
        else column_weight.to(torch.float32).contiguous(),
        # copied even where a view would do: a kernel reads a row's four at once
        bend=None if bend is None else bend.T.to(torch.float32, copy=True).contiguous(),
        normalize=normalize,
    )


def weight_gradient(p: Problem, compact: bool) -> Tensor:
    """To be written: [K, D] if compact, else [C, D]; zeros where not every row will be."""
    make = torch.empty if p.n > 0 and (p.classes is None or compact) else torch.zeros
    rows = p.count if compact else p.m
    return make((rows, p.d), dtype=p.weight.dtype, device=p.weight.device)


def near_one(w: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by powers of two to lengths near 1, what is left of 1/|w|, and the powers [k, 1].

    float16 begins and ends too soon for G over the length of a short or a long row.
    """
    rest = torch.frexp(inverse).mantissa
    shift = torch.where(rest == 0, 1, inverse / rest)[: len(w), None]
    return (w * shift).to(w.dtype), rest, shift

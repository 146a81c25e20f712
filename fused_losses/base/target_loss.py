"""The end of a softmax over classes in one pass, where PyTorch's formulas take some sixty.

    z_i = scale margin(t_i / scale)        loss = sum or mean_i softplus(lse_i - z_i)

over the rows with a label. Slopes in lse and target come with the value; second derivatives are
those of the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base.compiled import extension, helpers

# conventions beyond pi that have closed forms
BEYOND = ("linear", "none", "easy", "monotone")
LONG = 1 << 14  # rows that are worth several threads


class MovedTarget(NamedTuple):
    """A target's cosine t as cos(acos(t) + m2) - m3, or where m2 is 0 as t - m3."""

    m2: float
    m3: float
    beyond_pi: str


class TargetEnd(NamedTuple):
    """What becomes of a target's score: numbers alone."""

    scale: float
    moved: MovedTarget | None  # None: no margin
    mean: bool

    def is_closed(self) -> bool:
        """Whether its margin is one of the forms' own."""
        return self.moved is None or self.moved.m2 == 0 or self.moved.beyond_pi in BEYOND


class TargetForm(NamedTuple):
    """A device's kernel: a loss [] and its slopes [2, N] in lse and target."""

    takes: Callable[[Tensor, TargetEnd], bool]  # lse
    run: Callable[[Tensor, Tensor, Tensor, TargetEnd], tuple[Tensor, Tensor]]


# of GPUs: entered by the backend that has some
FORMS: list[TargetForm] = []
EndFormula = Callable[[Tensor, Tensor], Tensor]


def target_loss(
    lse: Tensor,  # [N] over the other classes
    target: Tensor,  # [N]
    labels: Tensor,  # [N], -1: no target
    end: TargetEnd,
    formula: EndFormula,  # the same of lse and target, in PyTorch
) -> Tensor | None:
    """The loss [] by a kernel, or None where none takes these rows."""
    if torch.compiler.is_compiling():
        return None
    if lse.is_cuda:
        form = next((form for form in FORMS if form.takes(lse, end)), None)
    else:
        form = ON_CPU if helpers(lse, target, labels) and ON_CPU.takes(lse, end) else None
    return None if form is None else _TargetLoss.apply(lse, target, labels, end, formula, form)


def _takes(lse: Tensor, end: TargetEnd) -> bool:
    return end.is_closed() and lse.dtype == torch.float64 and lse.numel() <= LONG


def _losses(lse: Tensor, target: Tensor, labels: Tensor, end: TargetEnd) -> tuple[Tensor, Tensor]:
    m2, m3, beyond = end.moved or (0.0, 0.0, "none")
    moves = end.moved is not None
    run = extension().target_losses
    return run(lse, target, labels, end.scale, moves, m2, m3, beyond, end.mean)


ON_CPU = TargetForm(_takes, _losses)


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        lse: Tensor,
        target: Tensor,
        labels: Tensor,
        end: TargetEnd,
        formula: EndFormula,
        form: TargetForm,
    ) -> Tensor:
        loss, slopes = form.run(lse, target, labels, end)
        ctx.save_for_backward(lse, target, slopes)
        ctx.formula = formula
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lse, target, slopes = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *(slopes * grad).unbind(), None, None, None, None
        # in operations that can themselves be differentiated
        wanted = ctx.needs_input_grad[:2]
        leaves = [t for t, asked in zip((lse, target), wanted, strict=True) if asked]
        found = iter(torch.autograd.grad(ctx.formula(lse, target), leaves, grad, create_graph=True))
        return *(next(found) if asked else None for asked in wanted), None, None, None, None

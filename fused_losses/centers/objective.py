"""What a head's margin means: the loss of a row, and the kernels that sweep for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base.parameters import check_called
from fused_losses.centers.engines import Engine, RuleEngine, SoftmaxEngine
from fused_losses.functions.adaptive_scale import AdaptiveScale
from fused_losses.functions.class_values import ClassLoss, MergedRows, Softmax
from fused_losses.functions.margin_calls import penalty_of
from fused_losses.functions.smoothed_softmax import toward_uniform
from fused_losses.margins import Margin

HeadMargin = Margin | ClassLoss | AdaptiveScale | None


@dataclass(frozen=True)
class AdaptiveLoss(ClassLoss):
    """AdaptiveScale in a batch whose scale is known."""

    margin: AdaptiveScale
    scale: float
    valid: Tensor | None
    training: bool

    rule = "softmax"

    def params(self) -> list[float]:
        return [self.scale]

    def row_loss(self, rows: MergedRows) -> Tensor:
        target, lse = rows.targets[:, 0], rows.statistics[0]
        moved = target
        if self.training:
            moved = target - self.margin.margin_of(target, lse, self.scale, self.valid)
        return -F.logsigmoid(self.scale * moved - lse)


@dataclass(frozen=True)
class HeadSoftmax(Softmax):
    """With a scale that learns: by the target's score here, by the others' in `Sharded`.

    smoothing: torch's label smoothing over so many classes, which takes one label a row. The sum of
    the other classes' scores may be of a sample, corrected for it.
    """

    learned: Tensor | None = None
    smoothing: float = 0.0
    classes: int = 1

    def _scaled(self, cosines: Tensor) -> Tensor:
        if self.learned is None:
            return super()._scaled(cosines)
        return self.learned.reshape(()).to(cosines.dtype) * cosines

    def row_loss(self, rows: MergedRows) -> Tensor:
        if not self.smoothing:
            return super().row_loss(rows)
        lse, others = rows.statistics
        z = self._scaled(self._moved(rows.targets, rows.norms, rows.present))[:, 0]
        loss = torch.where(z == torch.inf, torch.nan, -F.logsigmoid(z - lse))
        loss = toward_uniform(loss, z, others, self.classes, self.smoothing)
        return loss + penalty_of(self.margin, rows.norms)


def loss_of(
    margin: HeadMargin,
    scale: float | Tensor,  # of an AdaptiveScale: the batch's
    gradient: str,
    *,
    valid: Tensor | None = None,
    training: bool = False,
    smoothing: float = 0.0,
    classes: int = 1,
) -> ClassLoss:
    """The loss of a row."""
    if isinstance(margin, ClassLoss | AdaptiveScale):
        check_called("margin", margin)
    if smoothing and isinstance(margin, ClassLoss | AdaptiveScale):
        raise ValueError(
            "label_smoothing: expected 0 beside a loss of its own, "
            f"got {smoothing} beside {type(margin).__name__}"
        )
    if isinstance(scale, Tensor):
        # through a bend the scores are not the scale times what they are without it
        if isinstance(margin, ClassLoss | AdaptiveScale) or hasattr(margin, "bend"):
            raise ValueError(
                "scale: expected a number beside a loss with a scale of its own, or a margin that "
                f"bends other classes, got a parameter beside {type(margin).__name__}"
            )
        return HeadSoftmax(margin, float(scale.detach()), gradient, scale, smoothing, classes)
    if isinstance(margin, ClassLoss):
        if margin.asks_hardest:
            raise ValueError(
                "margin: expected a loss whose gradient all classes share, got "
                f"{type(margin).__name__}; class_loss has it, on one process"
            )
        return margin
    if isinstance(margin, AdaptiveScale):
        return AdaptiveLoss(margin, scale, valid, training)
    return HeadSoftmax(margin, scale, gradient, None, smoothing, classes)


def engine_of(
    loss: ClassLoss,
    *,
    labels: int,  # a row
    centers: int,  # a class
    normalize: bool,
    precision: str,
    backend: str | None,
) -> Engine:
    """The loss's kernels."""
    smoothed = isinstance(loss, HeadSoftmax) and loss.smoothing > 0
    if smoothed and labels != 1:
        raise ValueError("labels: expected one a row with label_smoothing")
    rule = "summed_softmax" if smoothed else loss.rule
    params, summed = tuple(loss.params()), rule == "summed_softmax"
    if labels == centers == 1 and loss.softness == 0 and (summed or rule == "softmax"):
        return SoftmaxEngine(params[0], normalize, precision, backend, summed)
    return RuleEngine(rule, params, loss.softness, normalize, precision, backend)

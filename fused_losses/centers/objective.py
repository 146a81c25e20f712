"""What a head's margin means: the loss of a row, and the kernels that sweep for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fused_losses.centers.shard import Engine, RuleEngine, SoftmaxEngine
from fused_losses.losses.adaptive_scale import AdaptiveScale
from fused_losses.losses.class_values import ClassLoss, MergedRows, Softmax
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
class LearnedSoftmax(Softmax):
    """With a scale that learns: by the target's score here, by the others' in `Sharded`."""

    learned: Tensor | None = None

    def _scaled(self, cosines: Tensor) -> Tensor:
        assert self.learned is not None
        return self.learned.reshape(()).to(cosines.dtype) * cosines


def loss_of(
    margin: HeadMargin,
    scale: float | Tensor,  # of an AdaptiveScale: the batch's
    gradient: str,
    *,
    valid: Tensor | None = None,
    training: bool = False,
) -> ClassLoss:
    """The loss of a row."""
    if isinstance(scale, Tensor):
        # through a bend the scores are not the scale times what they are without it
        if isinstance(margin, ClassLoss | AdaptiveScale) or hasattr(margin, "bend"):
            raise ValueError(
                "scale: expected a number beside a loss with a scale of its own, or a margin that "
                f"bends other classes, got a parameter beside {type(margin).__name__}"
            )
        return LearnedSoftmax(margin, float(scale.detach()), gradient, scale)
    if isinstance(margin, ClassLoss):
        return margin
    if isinstance(margin, AdaptiveScale):
        return AdaptiveLoss(margin, scale, valid, training)
    return Softmax(margin, scale, gradient)


def engine_of(
    loss: ClassLoss, *, plain: bool, normalize: bool, precision: str, backend: str | None
) -> Engine:
    """The loss's kernels. plain: one label a row and one centre a class."""
    if plain and loss.rule == "softmax" and loss.softness == 0:
        return SoftmaxEngine(loss.params()[0], normalize, precision, backend)
    params = tuple(loss.params())
    return RuleEngine(loss.rule, params, loss.softness, normalize, precision, backend)

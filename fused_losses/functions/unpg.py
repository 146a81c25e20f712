"""UNPG: a margin softmax whose rows share the batch's own hard negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import no_autocast
from fused_losses.base.parameters import check_margin
from fused_losses.base.validation import GRADIENTS, number
from fused_losses.functions.class_rows import ClassOptions, class_rows
from fused_losses.functions.margin_calls import apply_margin, penalty_of
from fused_losses.functions.positions import over_positions
from fused_losses.margins import CosFace, Margin
from fused_losses.primitives.shared_negatives.op import _check_whisker, add_shared, shared_negatives


@dataclass(frozen=True)
class UNPG:
    """The shared negatives of a batch as an object that a head holds; see `shared_negatives`."""

    whisker: float = 1.5

    def __post_init__(self) -> None:
        _check_whisker(self.whisker)

    def __call__(
        self, embeddings: Tensor, labels: Tensor, scale: float | Tensor, **options: Any
    ) -> Tensor:
        return shared_negatives(embeddings, labels, scale=scale, whisker=self.whisker, **options)


@over_positions
def unpg_margin_softmax(
    embeddings: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    *,
    margin: Margin | None = CosFace(0.5),
    scale: float | Tensor = 64.0,
    negatives: UNPG = UNPG(),
    normalize: bool = True,
    ignore_index: int = -100,
    classes: Tensor | None = None,  # [K]
    precision: str = "fp32",
    gradient: str = "exact",
    row_weight: Tensor | None = None,  # [N]
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Margin softmax with the batch's pairs as negatives of every row (module docstring).

    Arguments, dtypes and errors are those of `margin_softmax`, scale a number or a scalar tensor.
    Time and memory: those of one sweep over the classes and of `shared_negatives`.
    """
    validation.check_choice("gradient", gradient, GRADIENTS)
    check_margin(margin)
    if not isinstance(negatives, UNPG):
        raise TypeError(f"negatives: expected a UNPG, got {type(negatives).__name__}")
    options = ClassOptions(
        normalize, ignore_index, classes, precision, reduction, backend, row_weight
    )
    rows = class_rows(embeddings, weight, labels, options)
    scale = number("scale", scale, embeddings)
    with no_autocast(embeddings.device):
        lse, target = rows.statistics(scale, margin)
        norm = rows.norm.to(target.dtype)
        moved = apply_margin(margin, target / scale, norm, gradient, rows.valid)
        shared = negatives(
            rows.x,
            rows.labels,
            scale,
            normalize=False,
            ignore_index=validation.NO_TARGET,
            backend=rows.options.backend,
        )
        penalty = penalty_of(margin, norm)
        return rows.cross_entropy(scale * moved, add_shared(lse, shared), penalty)


examples(unpg_margin_softmax, lambda f, t: f(t.x, t.w, t.targets % 29, scale=16.0))

"""The door and the two ends of a softmax over classes whose row losses are vector arithmetic.

Between them stands one sweep: for each row the logsumexp of its other classes, and its target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.class_labels import one_label
from fused_losses.base.memory_budget import Room
from fused_losses.base.numerics import accumulate_dtype, against, followed, reduced
from fused_losses.base.parameters import check_row_weight
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import meet
from fused_losses.functions.margin_calls import bend_of, shown
from fused_losses.margins import Margin
from fused_losses.primitives.row_statistics import bounded, reference
from fused_losses.primitives.row_statistics.inputs import counts_as_zero, kept_classes
from fused_losses.primitives.row_statistics.op import row_statistics


class ClassOptions(NamedTuple):
    """What the losses over classes have in common beside their tensors; see `margin_softmax`."""

    normalize: bool
    ignore_index: int
    classes: Tensor | None  # [K]
    precision: str
    reduction: str
    backend: str | None
    row_weight: Tensor | None = None  # [N]
    room: Room | None = None  # for scores that sweeps keep


class ClassRows(NamedTuple):
    """Checked inputs of one call, in the form that the sweep takes."""

    x: Tensor  # [N, D] in the accumulation dtype, unit rows if normalised, ignored rows zero
    weight: Tensor  # [C, D]
    labels: Tensor  # [N] int64, NO_TARGET: ignored
    valid: Tensor  # [N] bool
    norm: Tensor  # [N] of the embeddings
    options: ClassOptions  # classes increasing; the backend that runs

    def target_cosine(self) -> Tensor:
        """<x_i, w_y> of each row, detached, 0 where ignored. [N]; time O(N D)."""
        with torch.no_grad():
            short = counts_as_zero(self.options.backend)
            given = self.x, self.weight, self.labels, self.options.normalize
            found = bounded.targets(*given, short)
            return shown(found)

    def statistics(
        self, scale: float | Tensor, margin: Margin | None = None
    ) -> tuple[Tensor, Tensor]:
        """log sum_{j != y} exp(scale cos_ij) and scale cos_iy, differentiable. [N], [N]

        margin: what may bend the cosines of the other classes; the target comes without it.
        """
        p = self.options
        x, bend = self.x * scale, self._bend(scale, margin)
        if p.backend != "reference":
            count = self.weight.shape[0] if p.classes is None else p.classes.shape[0]
            found = row_statistics(
                x.to(self.x.dtype),
                self.weight,
                self.labels,
                classes=p.classes,
                normalize=p.normalize,
                precision=p.precision,
                bend=None if bend is None else bend.detach().to(self.x.dtype),
                kept_classes=kept_classes(p.room, self.x, self.weight, count, backend=p.backend),
                backend=p.backend,
            )
            return found.lse, found.target
        weight = self.weight.to(x.dtype)
        found = reference.row_statistics(
            x, weight, self.labels, p.classes, None, None, p.normalize, bend
        )
        return found["lse"], found["target"]

    def _bend(self, scale: float | Tensor, margin: Margin | None) -> Tensor | None:
        """The margin's bends of scores, [4, N], from its bends of cosines."""
        bend = (
            bend_of(margin, self.target_cosine(), self.valid) if hasattr(margin, "bend") else None
        )
        if bend is None:
            return None
        streamed = self.options.backend != "reference"
        if streamed and isinstance(scale, Tensor) and followed(scale):
            raise NotImplementedError(
                "scale: its gradient through a margin that bends other classes is not supported "
                "by the streamed kernels; use backend='reference', or detach the scale"
            )
        t, p, q, r = bend
        return torch.stack((t * scale, p * scale, q, r / scale))

    def cross_entropy(self, target: Tensor, lse: Tensor, penalty: Tensor | float = 0.0) -> Tensor:
        """log(exp target + exp lse) - target + penalty of each row [N], reduced.

        target, lse [N]. Ignored rows have loss 0 and are not in the mean (0 of none). Accumulation
        dtype.
        """
        loss = against(shown(target), lse) + penalty
        dtype, of_rows = self.x.dtype, self.options.row_weight
        return reduced(loss, self.valid, self.options.reduction, dtype, of_rows)


def class_rows(
    embeddings: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    options: ClassOptions,
) -> ClassRows:
    """Checks as in `margin_softmax`: raises ValueError, TypeError, IndexError or RuntimeError.

    Time and memory O(N D + K log K).
    """
    normalize, ignore_index, classes, precision, reduction, backend, row_weight, _ = options
    validation.check_pair("embeddings", embeddings, "weight", weight)
    n, c = embeddings.shape[0], weight.shape[0]
    labels = one_label(labels, embeddings, c, ignore_index)
    validation.check_choice("precision", precision, validation.PRECISIONS)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    embeddings = meet(embeddings, weight)
    check_row_weight(row_weight, n, embeddings)
    valid = labels != validation.NO_TARGET
    if row_weight is not None:
        valid = valid & (row_weight > 0)
        labels = torch.where(valid, labels, validation.NO_TARGET)
    classes = validation.increasing_classes(classes, embeddings)
    if classes is not None and not torch.compiler.is_compiling() and not classes.is_cuda:
        validation.check_classes(classes, c)
        validation.check_labels_in_classes(labels, classes)
    name, _ = backends.choose(
        backend, embeddings.device, weight.dtype, precision, "row_statistics", embeddings.shape[1]
    )
    # an ignored row must not reach the gradients, not even with NaN
    x = torch.where(valid[:, None], embeddings.to(accumulate_dtype(weight.dtype)), 0)
    norm = torch.linalg.vector_norm(x, dim=1)
    x = unit(x) if normalize else x
    options = options._replace(classes=classes, backend=name)
    return ClassRows(x, weight, labels, valid, norm, options)

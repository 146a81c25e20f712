"""Margin softmax at several widths of the same rows and centres (MRL-E), from one sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.class_labels import one_label
from fused_losses.base.examples import examples
from fused_losses.base.integers import count_up
from fused_losses.base.numerics import accumulate_dtype, against, no_autocast
from fused_losses.base.parameters import check_margin, check_row_weight
from fused_losses.base.validation import GRADIENTS, NO_TARGET, meet, number
from fused_losses.functions.margin_calls import apply_margin, penalty_of
from fused_losses.functions.margin_rows import mean_of
from fused_losses.functions.nested import checked_widths, halves, in_order, sweeps, swept
from fused_losses.margins import ArcFace, CosFace
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE


def nested_margin_softmax(
    embeddings: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    widths: Sequence[int],  # [W]
    *,
    margin: Any = ArcFace(0.5),
    scale: float | Tensor = 64.0,
    normalize: bool = True,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,  # [N]
    gradient: str = "exact",
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """`margin_softmax` of the first w coordinates, for every w of widths, from one product.

        loss_w = margin_softmax(embeddings[:, :w], weight[:, :w], labels, ...)

    One table of centres for all widths, each a prefix of the next: Matryoshka's MRL-E. With
    normalize each width has norms of its own (docs/nested.md).

    Args:
        embeddings, weight: [N, D] and [C, D], float32, bfloat16, float16 or float64.
        labels: [N] int64 in [0, C), or `ignore_index`.
        widths: each once, in any order, from 1 to D.
        margin: None, or a margin without a bend, which is called at every width in turn: one that
            is drawn is drawn anew, one that keeps averages moves them.
        scale: > 0; a number or a scalar tensor, which may need a gradient.
        others: as in `margin_softmax`, the same for all widths.

    Returns [W] in the widths' order, float32 (float64 for float64 inputs); with reduction="none"
    [W, N]. Raises ValueError, TypeError, IndexError for bad arguments.
    Time O(N C (D + W)), where one call a width takes O(N C sum(widths)); memory O((N + C) (D + W)).
    What runs is that of `nested_info_nce`. Paper: Kusupati et al., Matryoshka Representation
    Learning, 2022.
    """
    check_margin(margin)
    if hasattr(margin, "bend") or hasattr(margin, "scale_of") or hasattr(margin, "rule"):
        raise ValueError(
            "margin: expected one of the target's cosine alone, got "
            f"{type(margin).__name__}, which moves other classes' scores"
        )
    validation.check_pair("embeddings", embeddings, "weight", weight)
    n, c = embeddings.shape[0], weight.shape[0]
    labels = one_label(labels, embeddings, c, ignore_index)
    validation.check_choice("precision", precision, validation.PRECISIONS)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    validation.check_choice("gradient", gradient, GRADIENTS)
    check_row_weight(row_weight, n, embeddings)
    ordered = sorted(checked_widths(widths, weight.shape[1]))
    factor = number("scale", scale, embeddings)
    embeddings = meet(embeddings, weight)
    if row_weight is not None:
        labels = torch.where(row_weight > 0, labels, NO_TARGET)
    with no_autocast(embeddings.device):
        valid = labels != NO_TARGET
        # an ignored row must not reach the gradients, not even with NaN
        x = torch.where(valid[:, None], embeddings, 0)
        numbers = dict(x_labels=torch.where(valid, labels, -1).int(), y_labels=count_up(c, weight))
        parts = sweeps(x, weight, ordered, factor, normalize, **numbers)
        rows, _ = swept(parts, False, precision, backend)
        accumulate, found = accumulate_dtype(weight.dtype), []
        for w, own, lse in zip(
            ordered, rows.value[:, POSITIVE], rows.value[:, NEGATIVE], strict=True
        ):
            # a sum over one class is its score
            cosine = torch.where(valid, own, 0) / factor
            norm = torch.linalg.vector_norm(x[:, :w].to(accumulate), dim=1).to(cosine)
            target = factor * apply_margin(margin, cosine, norm, gradient, valid)
            loss = against(target, lse) * torch.where(target == torch.inf, torch.nan, 1)
            loss = torch.where(valid, loss + penalty_of(margin, norm), 0).to(accumulate)
            found.append(mean_of(loss, labels, None, reduction, row_weight))
        return in_order(torch.stack(found), widths)


examples(
    nested_margin_softmax,
    lambda f, t: f(t.x, t.w, t.targets, halves(t.x)),
    {
        "": dict(margin=CosFace(0.35), scale=16.0),
        "products": dict(margin=None, scale=1.0, normalize=False, reduction="sum"),
        "some rows": dict(
            margin=CosFace(0.35),
            scale=4.0,
            ignore_index=1,
            gradient="straight_through",
            reduction="none",
        ),
    },
)
examples(
    nested_margin_softmax,
    lambda f, t: f(t.x, t.w, t.targets, halves(t.x), margin=None, scale=t.scale),
    {"learned scale": {}},
)

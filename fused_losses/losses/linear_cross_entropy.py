"""Linear cross entropy with torch's signature, on the same streamed primitive."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import accumulate_dtype, autocasts, no_autocast
from fused_losses.base.validation import check_plain, checked_smoothing, meet
from fused_losses.losses.margin_softmax import kept_classes, margin_softmax, row_weights
from fused_losses.losses.positions import over_positions
from fused_losses.primitives.row_statistics.op import row_statistics


@over_positions
def linear_cross_entropy(
    input: Tensor,  # [N, D], [D] or [..., D]
    linear_weight: Tensor,  # [C, D]
    target: Tensor,  # [N], [], [...] or probabilities [N, C], [C], [..., C]
    *,
    linear_bias: Tensor | None = None,  # [C]
    weight: Tensor | None = None,  # [C]
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,  # noqa: ARG001 (torch's signature)
    precision: str = "fp32",
    memory_budget: int = 0,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` without the N x C logits.

    cross_entropy(linear(input, linear_weight, linear_bias), target, ...) with torch's signature,
    semantics (a mean over no rows is NaN) and dtype, under autocast float32 (float64 of float64);
    `options` (torch's chunking) is accepted and not needed. input [..., D] has a row for each
    position, beside target [...] or [..., C]. Class probabilities [N, C] as target cost one product
    [N, C] x [C, D], no logits. A K-dimensional loss (linear_weight with more than two dimensions)
    is refused: call once for each position. Memory, precision, budget and errors as in
    `margin_softmax`.
    """
    check_plain(label_smoothing=label_smoothing)
    single = input.dim() == 1
    rows = input[None] if single else input
    if linear_weight.dim() > 2:
        raise ValueError(
            f"linear_weight: expected [C, D], got {validation.describe(linear_weight)}; a "
            "K-dimensional loss is K calls, one for each position"
        )
    validation.check_pair("input", rows, "linear_weight", linear_weight)
    validation.check_choice("precision", precision, validation.PRECISIONS)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    label_smoothing = checked_smoothing(label_smoothing)
    n, c = rows.shape[0], linear_weight.shape[0]
    for name, vector in (("linear_bias", linear_bias), ("weight", weight)):
        if vector is not None:
            validation.check_vector(name, vector, c, "one value a class [C]", rows)
    rows = meet(rows, linear_weight, "input", "linear_weight")
    if target.is_floating_point():
        probabilities = target[None] if single else target
        if tuple(probabilities.shape) != (n, c):
            raise ValueError(
                f"target: expected class ids [{n}] or probabilities [{n}, {c}], got "
                f"{validation.describe(target)}"
            )
        if ignore_index is not None and ignore_index >= 0:
            raise ValueError("ignore_index: expected None with probabilities as target")
        name, _ = backends.choose(
            backend, rows.device, rows.dtype, precision, "row_statistics", rows.shape[-1]
        )
        with no_autocast(rows.device):
            row_loss = _soft_targets(
                rows, linear_weight, probabilities, linear_bias, weight, label_smoothing,
                precision, memory_budget, name,
            )  # fmt: skip
        loss = row_loss.mean() if reduction == "mean" else row_loss
        loss = loss.sum() if reduction == "sum" else loss
    else:
        labels = target.reshape(1) if single and target.dim() == 0 else target
        ignored = -100 if ignore_index is None else ignore_index
        loss = margin_softmax(
            rows,
            linear_weight,
            labels,
            margin=None,
            scale=1.0,
            normalize=False,
            bias=linear_bias,
            label_smoothing=label_smoothing,
            ignore_index=ignored,
            class_weight=weight,
            precision=precision,
            memory_budget=memory_budget,
            reduction="none" if reduction == "none" else "sum",
            backend=backend,
        )
        assert isinstance(loss, Tensor)  # no stats were asked for
        if reduction == "mean":
            loss = loss / row_weights(labels.long(), ignored, weight, loss).sum()
    # autocast has cross_entropy in float32, whatever the logits come in
    loss = loss.to(accumulate_dtype(rows.dtype) if autocasts(input.device) else input.dtype)
    return loss[0] if single and reduction == "none" else loss


def _soft_targets(
    rows: Tensor,
    weight: Tensor,
    probabilities: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    precision: str,
    memory_budget: int,
    backend: str,
) -> Tensor:
    """sum_j p_j v_j (lse - z_j), with sum_j p_j v_j z_j = <x, sum_j p_j v_j w_j>: no logits."""
    accumulate = accumulate_dtype(weight.dtype)
    c = weight.shape[0]
    mix = probabilities * (1 - label_smoothing) + label_smoothing / c
    mix = mix if class_weight is None else mix * class_weight
    if backend == "reference":
        logits = F.linear(rows, weight, bias).to(accumulate)
        return (mix * (torch.logsumexp(logits, 1, keepdim=True) - logits)).sum(1)
    x = rows.to(accumulate)
    labels = torch.full((rows.shape[0],), validation.NO_TARGET, device=rows.device)
    stats = row_statistics(
        x,
        weight,
        labels,
        bias=None if bias is None else bias.to(accumulate),
        precision=precision,
        kept_classes=kept_classes(memory_budget, x, weight, c),
        backend=backend,
    )
    mix = mix.to(weight.dtype)
    picked = (x * (mix @ weight).to(accumulate)).sum(1)
    if bias is not None:
        picked = picked + (mix @ bias.to(mix.dtype)).to(accumulate)
    return mix.to(accumulate).sum(1) * stats.lse - picked


examples(linear_cross_entropy, lambda f, t: f(t.x, t.w, t.targets))

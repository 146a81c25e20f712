"""Linear cross entropy with torch's signature, on the same streamed primitive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.memory_budget import MemoryBudget, Room, room_of
from fused_losses.base.numerics import accumulate_dtype, autocasts, no_autocast
from fused_losses.base.parameters import check_parameter, check_row_weight
from fused_losses.base.products import product
from fused_losses.base.validation import check_plain, checked_smoothing, meet
from fused_losses.functions.class_values import check_floats
from fused_losses.functions.margin_rows import row_weights
from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.functions.positions import over_positions
from fused_losses.primitives.row_statistics.inputs import kept_classes
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
    row_weight: Tensor | None = None,  # [N] or [...]
    z_loss: float = 0.0,
    softcap: float | None = None,
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` without the N x C logits.

    cross_entropy(linear(input, linear_weight, linear_bias), target, ...) with torch's signature,
    semantics (a mean over no rows is NaN) and dtype, under autocast float32 (float64 of float64);
    `options` (torch's chunking) is accepted and not needed. input [..., D] has a row for each
    position, beside target [...] or [..., C]. Class probabilities [N, C] as target cost one product
    [N, C] x [C, D], no logits. A K-dimensional loss (linear_weight with more than two dimensions)
    is refused: call once for each position. Beyond torch's: row_weight [N] >= 0 of rows, in the
    mean's divisor, too; z_loss and softcap as in `margin_softmax`, softcap beside no linear_bias,
    weight or probabilities. Memory, precision, budget, bits and errors as in `margin_softmax`.
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
    check_row_weight(row_weight, n, rows)
    if softcap is not None:
        _refuse_beside_softcap(
            linear_bias=linear_bias is not None,
            weight=weight is not None,
            target=target.is_floating_point(),
        )
    check_floats(check_parameter, z_loss=z_loss)
    check_parameter("z_loss", z_loss, 0)
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
                z_loss, precision, room_of(memory_budget, linear_weight), name,
            )  # fmt: skip
            loss = _of_rows(row_loss, row_weight, reduction)
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
            row_weight=row_weight,
            z_loss=z_loss,
            softcap=softcap,
            precision=precision,
            memory_budget=memory_budget,
            reduction="none" if reduction == "none" else "sum",
            backend=backend,
        )
        assert isinstance(loss, Tensor)  # no stats were asked for
        if reduction == "mean":
            loss = loss / row_weights(labels.long(), ignored, weight, loss, row_weight).sum()
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
    z_loss: float,
    precision: str,
    room: Room | None,
    backend: str,
) -> Tensor:
    """sum_j p_j v_j (lse - z_j), with sum_j p_j v_j z_j = <x, sum_j p_j v_j w_j>: no logits."""
    accumulate = accumulate_dtype(weight.dtype)
    c = weight.shape[0]
    mix = probabilities * (1 - label_smoothing) + label_smoothing / c
    mix = mix if class_weight is None else mix * class_weight
    if backend == "reference":
        logits = product(rows, weight).to(accumulate)
        logits = logits if bias is None else logits + bias.to(accumulate)
        lse = torch.logsumexp(logits, 1, keepdim=True)
        return (mix * (lse - logits)).sum(1) + z_loss * lse[:, 0] ** 2
    x = rows.to(accumulate)
    labels = torch.full((rows.shape[0],), validation.NO_TARGET, device=rows.device)
    stats = row_statistics(
        x,
        weight,
        labels,
        bias=None if bias is None else bias.to(accumulate),
        precision=precision,
        kept_classes=kept_classes(room, x, weight, c, backend=backend),
        backend=backend,
    )
    mix = mix.to(weight.dtype)
    picked = (x * (mix @ weight).to(accumulate)).sum(1)
    if bias is not None:
        picked = picked + (mix @ bias.to(mix.dtype)).to(accumulate)
    return mix.to(accumulate).sum(1) * stats.lse - picked + z_loss * stats.lse**2


def _of_rows(loss: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    """Of probabilities every row counts; the mean over none is NaN, as torch has it."""
    count: Tensor | int = loss.shape[0]
    if row_weight is not None:
        row_weight = row_weight.to(loss.dtype)
        # what counts for nothing may be NaN
        loss, count = torch.where(row_weight > 0, loss, 0) * row_weight, row_weight.sum()
    if reduction == "none":
        return loss
    return loss.sum() / count if reduction == "mean" else loss.sum()


def _refuse_beside_softcap(**given: bool) -> None:
    for name, is_given in given.items():
        if is_given:
            wanted = "class ids" if name == "target" else "its default"
            raise ValueError(f"{name}: expected {wanted} beside a softcap")


examples(linear_cross_entropy, lambda f, t: f(t.x, t.w, t.targets))

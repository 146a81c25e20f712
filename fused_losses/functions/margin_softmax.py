"""Margin softmax: checks at the door, one streamed primitive, ordinary autograd after it."""

from __future__ import annotations

import inspect
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.class_labels import one_label
from fused_losses.base.compiled import helpers
from fused_losses.base.examples import examples
from fused_losses.base.memory_budget import MemoryBudget, Room, room_of
from fused_losses.base.numerics import accumulate_dtype, joined, no_autocast
from fused_losses.base.parameters import check_margin, check_parameter, check_row_weight
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import GRADIENTS, NO_TARGET, check_plain, checked_smoothing, meet
from fused_losses.functions import reference as losses_reference
from fused_losses.functions.adaptive_scale import adaptive_margin_softmax
from fused_losses.functions.class_loss import class_loss
from fused_losses.functions.class_values import Softmax, check_floats
from fused_losses.functions.margin_calls import apply_margin, penalty_of
from fused_losses.functions.margin_rows import checked_scale, mean_of, smoothed
from fused_losses.functions.margin_softmax_options import MarginSoftmaxOptions
from fused_losses.functions.margin_softmax_stats import (
    MarginSoftmaxStats,
    blanked,
    check_return_stats,
    reference_stats,
)
from fused_losses.functions.positions import over_positions
from fused_losses.functions.smoothed_softmax import SmoothedSoftmax
from fused_losses.functions.target_end import against_target, at_once, score_bend
from fused_losses.margins import ArcFace, CosFace, Margin, MVSoftmax
from fused_losses.primitives.row_statistics.inputs import counts_as_zero, kept_classes
from fused_losses.primitives.row_statistics.op import row_statistics

Stats = tuple[Tensor, MarginSoftmaxStats]


@overload
def margin_softmax(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[MarginSoftmaxOptions],
) -> Tensor: ...
@overload
def margin_softmax(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_stats: Literal[True, "grad"],
    **options: Unpack[MarginSoftmaxOptions],
) -> Stats: ...
@over_positions
def margin_softmax(
    embeddings: Tensor,  # [N, D] or [..., D]
    weight: Tensor,  # [C, D] or [C, K, D]
    labels: Tensor,  # [N] or [N, L]; [...] or [..., L]
    *,
    margin: Any = ArcFace(0.5),
    scale: float | Tensor = 64.0,
    normalize: bool = True,
    bias: Tensor | None = None,  # [C]
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,  # [C]
    row_weight: Tensor | None = None,  # [N]
    classes: Tensor | None = None,  # [K]
    z_loss: float = 0.0,
    softcap: float | None = None,
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    gradient: str = "exact",
    reduction: str = "mean",
    return_stats: bool | str = False,
    backend: str | None = None,
) -> Tensor | Stats:
    """Cross entropy over C classes with a margin on the target, without the N x C logits.

        z_j = scale psi(cos(x, w_j)) + b_j  (j != y),   z_y = scale margin(cos(x, w_y)) + b_y
        loss = -log softmax(z)_y

    psi(c) = c, but for margins that bend other classes (CurricularFace, MVSoftmax,
    InterclassFilter): a row's polynomial of c above the row's threshold.
    Sub-centres (weight [C, K, D]: a class has its best centre's cosine), several labels a row
    (labels [N, L] padded with ignore_index) and the losses of `fused_losses.class_losses` as margin
    are `class_loss`; with `AdaptiveScale` it is `adaptive_margin_softmax`. Both, and `softcap`,
    take neither bias, class_weight nor return_stats, whose sweep is another; label_smoothing goes
    with a softcap or sub-centres and one label a row.

    Args:
        embeddings: [N, D] float32, bfloat16, float16 or float64; [..., D] beside labels [...]: a
            row for each position, whose results of a row come in the shape [...].
        weight: [C, D] class centres, of the same dtype (under torch.autocast the embeddings take
            the weight's dtype; `precision` alone says how products are computed).
        labels: [N] int64 in [0, C), or `ignore_index`.
        margin: None, an object of `fused_losses.margins`, any callable on the target cosine, a
            `ClassLoss` or an `AdaptiveScale` (which have scales of their own).
        scale: > 0; a number, a tensor of one value or of one a row [N]; may need a gradient, but
            with a margin that bends only on the reference (NotImplementedError elsewhere).
        normalize: divide rows of both sides by their norm, of any length (of the weight 1e-36 to
            1e36 on GPU backends); zero rows stay zero and get gradient zero. False: the products
            are taken for cosines as they are.
        bias: [C], added to the logits after the scale.
        label_smoothing: in [0, 1]; torch's meaning, the uniform part over the classes that take
            part.
        class_weight: [C] >= 0; torch's meaning.
        row_weight: [N] >= 0, without gradient: what a row counts for, in the mean's divisor, too; 0
            is as if it were ignored.
        classes: [K] distinct ids of the classes that take part (PartialFC); every label must be
            among them. Rows of `weight` are read in place, nothing is gathered.
        z_loss: >= 0; z_loss (log sum_j e^{z_j})^2 is added to each row's loss (PaLM).
        softcap: > 0; z becomes softcap tanh(z / softcap) (Gemma 2), that of the target after its
            margin, which may have no bend. Then the rule is PyTorch on tiles, as in `class_loss`.
        precision: "fp32", "tf32", "mixed" or "bf16"; see `fused_losses.functional`.
        memory_budget: at most so many bytes of scores the forward keeps to spare the backward their
            recomputation, or "auto": an eighth of the memory that is free on a CPU
            (docs/row_statistics.md). The "cpu" backend keeps them, with 0 those of a call that has
            at most 1 MiB of them, others none; the results are the same bits.
        gradient: "exact", or "straight_through": the slope of the margin on the target taken for
            1 (insightface); bends of other classes keep theirs.
        reduction: "mean" over the rows that are not ignored (weighted by class_weight; 0 if there
            are none, or none of a weight above 0), "sum", "none" [N].
        return_stats: also return `MarginSoftmaxStats`; "grad": its logsumexp and target_cosine with
            gradients. `softmax_outputs` has those of entropy and of chosen log-probabilities.

    Returns the loss in float32 (float64 for float64 inputs).
    Raises ValueError, TypeError, IndexError for bad arguments; RuntimeError when the backend
    cannot run the call. A NaN row has a NaN loss and leaves the other rows' losses alone.
    Time O(N C D). Memory beyond inputs and gradients: O(N D) plus a tile, plus memory_budget.
    Each thread owns a run of classes: the same bits in every run on one number of threads.
    Papers: see `fused_losses.margins`; PartialFC: An et al., 2022.
    """
    check_plain(label_smoothing=label_smoothing)
    is_class = inspect.isclass(margin)
    of_class = isinstance(getattr(margin, "rule", None), str)
    adaptive = hasattr(margin, "scale_of")
    if is_class or not (of_class or adaptive):
        check_margin(margin)
    several = isinstance(weight, Tensor) and weight.dim() == 3
    several = several or (isinstance(labels, Tensor) and labels.dim() == 2)
    check_floats(check_parameter, z_loss=z_loss)
    check_parameter("z_loss", z_loss, 0)
    room = room_of(memory_budget, weight)
    check_return_stats(return_stats)
    if of_class or several or adaptive or softcap is not None:
        _refuse_others(
            bias=bias is not None,
            label_smoothing=label_smoothing != 0 and (of_class or adaptive),
            class_weight=class_weight is not None,
            gradient=gradient != "exact" and (of_class or adaptive),
            return_stats=return_stats is not False,
            scale=isinstance(scale, Tensor) and not (of_class or adaptive),
            z_loss=z_loss != 0 and (of_class or adaptive),
            softcap=softcap is not None and (of_class or adaptive),
        )
        shared: dict[str, Any] = dict(
            normalize=normalize, ignore_index=ignore_index, classes=classes, precision=precision,
            row_weight=row_weight, reduction=reduction, backend=backend,
        )  # fmt: skip
        if adaptive:
            return adaptive_margin_softmax(embeddings, weight, labels, margin=margin, **shared)
        if not of_class:
            assert not isinstance(scale, Tensor)  # refused above
            capped: dict[str, Any] = dict(z_loss=z_loss, softcap=softcap)
            smoothing = checked_smoothing(label_smoothing)
            if smoothing:
                margin = SmoothedSoftmax(margin, scale, gradient, smoothing=smoothing, **capped)
            else:
                margin = Softmax(margin, scale, gradient, **capped)
        # what is free is asked once
        shared |= dict(memory_budget=0 if room is None else room.left)
        return class_loss(embeddings, weight, labels, margin, **shared)
    validation.check_pair("embeddings", embeddings, "weight", weight)
    n, c = embeddings.shape[0], weight.shape[0]
    labels = one_label(labels, embeddings, c, ignore_index)
    validation.check_choice("precision", precision, validation.PRECISIONS)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    validation.check_choice("gradient", gradient, GRADIENTS)
    scale = checked_scale(scale, embeddings)
    label_smoothing = checked_smoothing(label_smoothing)
    for name, vector in (("bias", bias), ("class_weight", class_weight)):
        if vector is not None:
            validation.check_vector(name, vector, c, "one value a class [C]", weight)
    check_row_weight(row_weight, n, embeddings)
    embeddings = meet(embeddings, weight)
    classes = validation.increasing_classes(classes, embeddings)
    if row_weight is not None:
        labels = torch.where(row_weight > 0, labels, NO_TARGET)
    name, _ = backends.choose(
        backend, embeddings.device, weight.dtype, precision, "row_statistics", embeddings.shape[-1]
    )

    with no_autocast(embeddings.device):
        if name == "reference":
            if classes is not None and not torch.compiler.is_compiling():
                validation.check_classes(classes, c)
                validation.check_labels_in_classes(labels, classes)
            row_loss, cosine, logits = losses_reference.margin_softmax(
                embeddings,
                weight,
                labels,
                margin=margin,
                scale=scale,
                normalize=normalize,
                bias=bias,
                label_smoothing=label_smoothing,
                class_weight=class_weight,
                classes=classes,
                gradient=gradient,
                z_loss=z_loss,
            )
            stats = None
            if return_stats:
                attached = return_stats == "grad"
                stats = reference_stats(cosine, logits, labels, classes, scale, bias, attached)
        else:
            row_loss, stats = _streamed(
                embeddings,
                weight,
                labels,
                margin=margin,
                scale=scale,
                normalize=normalize,
                bias=bias,
                label_smoothing=label_smoothing,
                class_weight=class_weight,
                classes=classes,
                precision=precision,
                room=room,
                gradient=gradient,
                z_loss=z_loss,
                return_stats=return_stats,
                reduction="none" if row_weight is not None else reduction,
                backend=name,
            )
        loss = row_loss  # which some kernels reduce at once
        if row_loss.dim() > 0:
            loss = mean_of(row_loss, labels, class_weight, reduction, row_weight)
    return (loss, stats) if return_stats and stats is not None else loss


def _refuse_others(**given: bool) -> None:
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"{name}: expected its default (scale: a number) beside sub-centres, several "
                "labels a row, a softcap, a ClassLoss or AdaptiveScale"
            )


def _streamed(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: Margin | None,
    scale: float | Tensor,
    normalize: bool,
    bias: Tensor | None,
    label_smoothing: float,
    class_weight: Tensor | None,
    classes: Tensor | None,
    precision: str,
    room: Room | None,
    gradient: str,
    z_loss: float,
    return_stats: bool | str,
    reduction: str,
    backend: str,
) -> tuple[Tensor, MarginSoftmaxStats | None]:
    """Per-row losses from one sweep over the classes; the margin is autograd on [N] vectors.

    [N], or [] where a kernel has reduced them.
    """
    taking_part = weight.shape[0] if classes is None else classes.shape[0]
    accumulate = accumulate_dtype(weight.dtype)
    x = embeddings.to(accumulate)
    compiled = helpers(embeddings, labels)
    if compiled is None or not compiled.all_labelled(labels):
        # an ignored row must not reach the gradients, not even with NaN
        x = torch.where((labels != NO_TARGET)[:, None], x, 0)
    asks = getattr(margin, "uses_norm", False) or hasattr(margin, "penalty")
    norm = torch.linalg.vector_norm(x, dim=1) if asks else None
    if normalize:
        x = unit(x)
    short = counts_as_zero(backend)
    bend = score_bend(x, weight, labels, margin, scale, normalize, short)
    if isinstance(scale, Tensor):
        scale = scale.to(accumulate)
        x = x * (scale[:, None] if scale.dim() else scale)
        scale = torch.where(scale == 0, 1, scale)
    elif scale != 1:
        x = x * scale
    stats = row_statistics(
        x,
        weight,
        labels,
        classes=classes,
        bias=None if bias is None else bias.to(accumulate),
        column_weight=None if class_weight is None else class_weight.to(accumulate),
        normalize=normalize,
        weighted=label_smoothing > 0,
        precision=precision,
        bend=bend,
        kept_classes=kept_classes(room, x, weight, taking_part, backend=backend),
        backend=backend,
    )
    norm = None if norm is None else norm.to(stats.target.dtype)
    # else nothing is more than a target's loss
    bare = bias is None and class_weight is None and accumulate == torch.float32
    reduced = None
    if bare and not (label_smoothing or z_loss or hasattr(margin, "penalty")):
        reduced = at_once(stats.lse, stats.target, labels, margin, scale, gradient, reduction)
        if reduced is not None and not return_stats:
            return reduced, None
    valid = labels != NO_TARGET
    target_cosine = stats.target / scale
    of_target = lambda vector: vector.to(accumulate)[torch.where(valid, labels, 0)]
    moved = apply_margin(margin, target_cosine, norm, gradient, valid)
    target = scale * moved
    target_bias = 0.0
    if bias is not None:
        target_bias = of_target(bias)
        target = target + target_bias
    loss = against_target(target, stats.lse)
    row_weight = 1.0 if class_weight is None else of_target(class_weight)
    asked = label_smoothing or z_loss or return_stats
    logsumexp = joined(target, stats.lse) if asked else stats.lse
    if label_smoothing > 0:
        loss = smoothed(
            loss, logsumexp, target, row_weight, stats, class_weight, classes, label_smoothing,
            taking_part,
        )  # fmt: skip
    elif class_weight is not None:
        loss = loss * row_weight
    if hasattr(margin, "penalty"):
        loss = loss + row_weight * penalty_of(margin, norm)
    if z_loss:
        loss = loss + row_weight * z_loss * logsumexp**2
    loss = torch.where(valid, loss, 0).to(accumulate) if reduced is None else reduced
    if not return_stats:
        return loss, None
    attached = return_stats == "grad"
    with torch.set_grad_enabled(torch.is_grad_enabled() and attached):
        hardest_bias = 0.0 if bias is None else bias.to(accumulate)[stats.hardest.clamp_min(0)]
        told = blanked(
            valid,
            attached,
            logsumexp,
            target_cosine,
            stats.hardest,
            (stats.hardest_score - hardest_bias) / scale,
            stats.target + target_bias > stats.hardest_score,
        )
        told = MarginSoftmaxStats(*(c.to(accumulate) if c.is_floating_point() else c for c in told))
    return loss, told


examples(
    margin_softmax,
    lambda f, t: f(t.x, t.w, t.targets),
    {
        "": dict(margin=ArcFace(0.5)),
        "classes": lambda t: dict(
            margin=CosFace(0.35),
            classes=torch.cat([t.targets, torch.arange(0, len(t.w), 3).to(t.targets)]).unique(),
        ),
        "smoothing": dict(label_smoothing=0.1),
        "MV-Softmax": dict(margin=MVSoftmax("am"), scale=16.0),
    },
)
examples(
    margin_softmax,
    lambda f, t: f(
        t.x, t.w[: len(t.w) // 3 * 3].unflatten(0, (-1, 3)), t.targets % (len(t.w) // 3)
    ),
    {"sub-centres": dict(scale=16.0)},
)

"""`class_loss`: a loss over classes by its rule, whole or on a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.class_labels import class_labels
from fused_losses.base.examples import examples
from fused_losses.base.memory_budget import MemoryBudget, Room, room_of
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced
from fused_losses.base.parameters import check_row_weight
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import NO_TARGET, describe, meet
from fused_losses.functions.class_rows import ClassOptions, ClassRows
from fused_losses.functions.class_values import (
    MLCD,
    ClassLoss,
    MergedRows,
    SFace,
    Softmax,
    SphereFace2,
    count_negatives,
)
from fused_losses.functions.difference_values import WestonWatkins
from fused_losses.functions.normalized_values import ActivePassive
from fused_losses.functions.positions import over_positions
from fused_losses.functions.probability_values import GCE, MAE
from fused_losses.primitives.class_rules.bounded import targets
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.op import class_statistics, class_targets, is_reference


@over_positions
def class_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: ClassLoss,
    *,
    normalize: bool = True,
    classes: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """A class loss of the rows against all classes, without the N x C cosines.

    Args:
        embeddings: [N, D] float32, bfloat16, float16 or float64.
        weight: [C, D] class centres, or [C, K, D] with K of each class, of the same dtype (under
            torch.autocast the embeddings take the weight's).
        labels: [N] or [N, L] int64 in [0, C), or `ignore_index`: nothing there.
        loss: a value of this module.
        normalize: divide rows of both sides by their norm, of any length (of the weight 1e-36 to
            1e36 on GPU backends); zero rows stay zero and get gradient zero. False: the products
            are taken for cosines as they are.
        classes: [M] distinct ids of the classes that take part; every label must be among them.
            Rows of `weight` are read in place, nothing but a tile is gathered.
        ignore_index: a row all of whose labels are this has loss 0 and leaves gradients alone.
        row_weight: [N] >= 0, without gradient: what a row counts for, in the mean's divisor, too; 0
            is as if it had no label.
        reduction: "mean" over the rows with a label (0 if there are none), "sum", "none" [N].
        precision: "fp32", "tf32", "mixed" or "bf16"; see `fused_losses.functional`.
        memory_budget: as in `margin_softmax`; of the one hardest negative nothing is kept.

    Returns the loss in float32 (float64 for float64 inputs). Differentiable in embeddings and
    weight (and the tensors that a loss holds); any number of times on backend "reference", else
    once. Raises ValueError, TypeError, IndexError for bad arguments; RuntimeError when the
    backend cannot run the call. Time O(N C K D); memory beyond inputs and gradients O(N D) and a
    few tiles of classes, plus memory_budget. The same bits in every run on one number of threads.
    """
    if not isinstance(loss, ClassLoss):
        raise TypeError(f"loss: expected a ClassLoss, got {type(loss).__name__}")
    _check(embeddings, weight, reduction)
    validation.check_choice("precision", precision, validation.PRECISIONS)
    labels = class_labels(labels, embeddings, weight.shape[0], ignore_index)
    centers = weight.shape[1] if weight.dim() == 3 else 1
    room = room_of(memory_budget, weight)
    embeddings = meet(embeddings, weight)
    classes = validation.increasing_classes(classes, embeddings)
    check_row_weight(row_weight, embeddings.shape[0], embeddings)
    if row_weight is not None:
        labels = torch.where(row_weight[:, None] > 0, labels, NO_TARGET)
    present = labels != NO_TARGET
    valid = present.any(dim=1)
    with no_autocast(embeddings.device):
        # an ignored row must not reach the gradients, not even with NaN
        x = torch.where(valid[:, None], embeddings.to(accumulate_dtype(weight.dtype)), 0)
        norms = torch.linalg.vector_norm(x, dim=1)
        x = unit(x) if normalize else x
        inputs = ClassInputs(
            x,
            weight.flatten(0, -2),
            labels,
            classes,
            rule=loss.rule,
            params=loss.params(),
            centers=centers,
            softness=loss.softness,
            normalize=normalize,
            precision=precision,
        )
        plain = centers == 1 and labels.shape[1] == 1 and loss.softness == 0
        if loss.asks_hardest:
            merged = _hardest(inputs, present, backend)
        elif plain and loss.rule == "softmax":
            options = ClassOptions(normalize, ignore_index, classes, precision, reduction, backend)
            options = options._replace(room=room)
            seen = ClassRows(x, weight.flatten(0, -2), labels[:, 0], valid, norms, options)
            merged = _compiled(seen, loss, present)
            if loss.counts:
                merged = merged._replace(negatives=count_negatives(labels, inputs.taking_part))
        else:
            merged = _by_rule(inputs, loss, present, room, backend)
        rows = loss.row_loss(merged._replace(norms=norms))
        return reduced(rows, valid, reduction, x.dtype, row_weight)


def _by_rule(
    inputs: ClassInputs, loss: ClassLoss, present: Tensor, room: Room | None, backend: str | None
) -> MergedRows:
    """Of any rule, by `class_statistics`."""
    negatives = count_negatives(inputs.labels, inputs.taking_part) if loss.counts else None

    def sweep(rule: str, params: list[float], values: Tensor | None) -> Tensor:
        # a streamed rule takes what is made of it without gradient, the reference with all of it
        with torch.set_grad_enabled(torch.is_grad_enabled() and reference):
            of = inputs._replace(rule=rule, params=params, values=values)
            found = class_statistics(of, backend=backend).statistics
        return found if reference else found.detach()  # forward mode heeds no no_grad

    reference = is_reference(inputs, backend)
    cosines = _targets(inputs, inputs.labels) if reference else class_targets(inputs)
    values = loss.swept_values(sweep, cosines, present, negatives)
    if values is not None:  # as the rule takes them: a loss may correct for that
        values = values.to(inputs.dtype).to(values.dtype)
    found = class_statistics(inputs._replace(values=values), room=room, backend=backend)
    rows = MergedRows(found.statistics, found.targets, present, of_values=True)
    return rows._replace(negatives=negatives, values=values)


def _hardest(inputs: ClassInputs, present: Tensor, backend: str | None) -> MergedRows:
    """The targets and the best negative: a sweep without gradient finds it."""
    with torch.no_grad():
        found = class_statistics(inputs, backend=backend)
    both = torch.cat([inputs.labels, found.hardest[:, None]], dim=1)
    scores = _targets(inputs, both)
    hardest = torch.where(found.hardest < 0, -torch.inf, scores[:, -1])
    # a score that is NaN is no best one, but shows in the sum of all
    hardest = torch.where(found.statistics[0].isnan(), torch.nan, hardest)
    return MergedRows(found.statistics, scores[:, :-1], present, hardest=hardest)


def _targets(p: ClassInputs, classes: Tensor) -> Tensor:
    """Cosines with chosen classes [N, L], -1: none, in PyTorch that autograd follows."""
    return targets(p.x, p.weight, classes, p.centers, p.softness, p.normalize)


def _compiled(rows: ClassRows, loss: ClassLoss, present: Tensor) -> MergedRows:
    """Of a softmax over classes of one centre, one label a row: `row_statistics` has kernels."""
    p, weight = rows.options, rows.weight
    name, _ = backends.choose(
        p.backend, weight.device, weight.dtype, p.precision, "row_statistics", weight.shape[1]
    )
    rows = rows._replace(options=p._replace(backend=name))
    (scale,) = loss.params()
    margin = loss.margin if isinstance(loss, Softmax) else None
    lse, target = rows.statistics(scale, margin)
    return MergedRows(lse[None], (target / scale)[:, None], present)


def _check(embeddings: Tensor, weight: Tensor, reduction: str) -> None:
    if isinstance(weight, Tensor) and weight.dim() == 3:
        if weight.shape[1] == 0:
            raise ValueError(f"weight: expected [C, K >= 1, D], got {describe(weight)}")
        validation.check_pair("embeddings", embeddings, "weight", weight[:, 0])
    else:
        validation.check_pair("embeddings", embeddings, "weight", weight)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)


_LOSSES = {
    "GCE": GCE(scale=16.0),
    "ActivePassive": ActivePassive(MAE(), scale=16.0),
    "SFace": SFace(),
    "SphereFace2": SphereFace2(0.3),
    "WestonWatkins": WestonWatkins(scale=16.0),
    "class_loss": Softmax(),
    "capped": Softmax(None, 16.0, z_loss=0.01, softcap=8.0),
}
for _name, _loss in _LOSSES.items():
    examples(class_loss, lambda f, t: f(t.x, t.w, t.targets), {"": {"loss": _loss}}, name=_name)
examples(
    class_loss,
    lambda f, t: f(t.x, t.w, t.targets, memory_budget=1 << 20),
    {"kept": {"loss": SphereFace2(0.3)}, "kept tiles": {"loss": GCE(scale=16.0)}},
)
examples(
    class_loss,
    lambda f, t: f(t.x, t.w, torch.stack([t.targets, (t.targets + 1) % len(t.w)], dim=1)),
    {"several labels": {"loss": MLCD(16.0)}},
)

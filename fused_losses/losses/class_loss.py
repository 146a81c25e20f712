"""`class_loss`: a loss over classes by its rule, whole or on a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.class_labels import class_labels
from fused_losses.base.examples import examples
from fused_losses.base.numerics import accumulate_dtype, no_autocast, unit_rows
from fused_losses.base.validation import NO_TARGET, describe, meet
from fused_losses.losses.class_rows import ClassOptions, ClassRows
from fused_losses.losses.class_values import (
    MLCD,
    ClassLoss,
    MergedRows,
    SFace,
    Softmax,
    SphereFace2,
)
from fused_losses.losses.positions import over_positions
from fused_losses.losses.probability_values import GCE
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.op import class_statistics, class_targets


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
    reduction: str = "mean",
    precision: str = "fp32",
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
        reduction: "mean" over the rows with a label (0 if there are none), "sum", "none" [N].
        precision: "fp32", "tf32", "mixed" or "bf16"; see `fused_losses.functional`.

    Returns the loss in float32 (float64 for float64 inputs). Differentiable in embeddings and
    weight (and the tensors that a loss holds); any number of times on backend "reference", else
    once. Raises ValueError, TypeError, IndexError for bad arguments; RuntimeError when the
    backend cannot run the call. Time O(N C K D); memory beyond inputs and gradients O(N D) and a
    few tiles of classes.
    """
    if not isinstance(loss, ClassLoss):
        raise TypeError(f"loss: expected a ClassLoss, got {type(loss).__name__}")
    _check(embeddings, weight, reduction)
    labels = class_labels(labels, embeddings, weight.shape[0], ignore_index)
    centers = weight.shape[1] if weight.dim() == 3 else 1
    embeddings = meet(embeddings, weight)
    classes = validation.increasing_classes(classes, embeddings)
    present = labels != NO_TARGET
    valid = present.any(dim=1)
    with no_autocast(embeddings.device):
        # an ignored row must not reach the gradients, not even with NaN
        x = torch.where(valid[:, None], embeddings.to(accumulate_dtype(weight.dtype)), 0)
        norms = torch.linalg.vector_norm(x, dim=1)
        x = unit_rows(x) if normalize else x
        plain = centers == 1 and labels.shape[1] == 1 and loss.softness == 0
        if plain and loss.rule == "softmax":
            options = ClassOptions(normalize, ignore_index, classes, precision, reduction, backend)
            seen = ClassRows(x, weight.flatten(0, -2), labels[:, 0], valid, norms, options)
            merged = _compiled(seen, loss, present)
        else:
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
            values = loss.values(class_targets(inputs), present)
            found = class_statistics(inputs._replace(values=values), backend=backend)
            merged = MergedRows(found.statistics, found.targets, present, norms, of_values=True)
        rows = loss.row_loss(merged)
        rows = torch.where(valid, rows, 0).to(x.dtype)
        if reduction == "none":
            return rows
        total = rows.sum()
        return total if reduction == "sum" else total / valid.sum().clamp_min(1)


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
    return MergedRows(lse[None], (target / scale)[:, None], present, rows.norm)


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
    "SFace": SFace(),
    "SphereFace2": SphereFace2(0.3),
    "class_loss": Softmax(),
}
for _name, _loss in _LOSSES.items():
    examples(class_loss, lambda f, t: f(t.x, t.w, t.targets), {"": {"loss": _loss}}, name=_name)
examples(
    class_loss,
    lambda f, t: f(t.x, t.w, torch.stack([t.targets, (t.targets + 1) % len(t.w)], dim=1)),
    {"several labels": {"loss": MLCD(16.0)}},
)

"""The compiled form of a fold over classes; the targets are PyTorch's, as on every backend."""

from __future__ import annotations

from torch import Tensor

from fused_losses.backends.cpu.capability import extension
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.class_rules.bounded import targets, targets_workspace
from fused_losses.primitives.class_rules.inputs import (
    ClassInputs,
    ClassNeeds,
    ClassStatistics,
    check_ids,
    places,
)
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS

LABEL_BYTES = 24  # of a sorted one in C++


def workspace(p: ClassInputs, needs: ClassNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    n, d = p.x.shape
    value_rows = 0 if p.values is None else p.values.shape[0]
    scratch = extension().class_rules_workspace(
        n, d, p.taking_part, p.centers, p.weight.dtype.itemsize, p.rule, value_rows,
        p.precision != "fp32", needs is not None,
    )  # fmt: skip
    wide = accumulate_dtype(p.weight.dtype).itemsize
    statistics, labels = len(CLASS_FOLDS[p.rule].kinds), p.labels.numel()
    # sorted labels, their places and what finds these; the centres of `classes`; copies as read
    calls = labels * (LABEL_BYTES + 40) + (value_rows + 2 * statistics) * n * wide
    if p.classes is not None:
        calls += p.taking_part * p.centers * 8
    if needs is None:
        return max(scratch + calls, targets_workspace(p.x, p.labels, p.centers))
    return scratch + calls + labels * wide


def forward(p: ClassInputs, kept: Tensor) -> ClassStatistics:
    """kept: room for what the backward reads."""
    check_ids(p)
    of_labels = targets(p.x, p.weight, p.labels, p.centers, p.softness, p.normalize)
    found = extension().class_rules_forward(p.x, p.weight, places(p), *_rest(p), kept)
    statistics, hardest, score = found
    return ClassStatistics(statistics, of_labels, hardest, score)


def backward(
    grad_statistics: Tensor,
    grad_targets: Tensor,
    statistics: Tensor,
    p: ClassInputs,
    compact: bool,
    need_x: bool,
    need_weight: bool,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    check_ids(p)
    given = grad_statistics, grad_targets, statistics, p.x, p.weight, places(p), *_rest(p)
    return extension().class_rules_backward(*given, kept, compact, need_x, need_weight)


def _rest(p: ClassInputs) -> tuple:
    return (
        p.classes, p.values, p.rule, list(p.params), p.centers, p.softness, p.normalize,
        p.precision,
    )  # fmt: skip

"""Labels checked and renamed at once, where PyTorch's operators take thirteen passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.compiled import helpers
from fused_losses.base.validation import (
    NO_TARGET,
    assert_async,
    asserted,
    check_labels,
    label_text,
)


class LabelForm(NamedTuple):
    """A device's kernel: (labels, classes, ignored, dtype) -> labels, whether all are fine [1]."""

    takes: Callable[[Tensor], bool]
    run: Callable[[Tensor, int, int, torch.dtype], tuple[Tensor, Tensor]]


def no_target(labels: Tensor, ignore_index: int) -> Tensor:
    """ignore_index -> NO_TARGET, while a stray -1 stays an error (it becomes -2)."""
    if ignore_index == NO_TARGET:
        return labels
    stray = torch.where(labels == NO_TARGET, NO_TARGET - 1, labels)
    return torch.where(labels == ignore_index, NO_TARGET, stray)


# of GPUs: entered by the backend that has some
FORMS: list[LabelForm] = []


def checked_labels(
    labels: Tensor,  # [N] int64
    num_classes: int,
    ignore_index: int = NO_TARGET,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Labels as `no_target` has them, in `dtype`; errors as of `check_labels`."""
    if labels.is_cuda and asserted(labels):
        form = next((form for form in FORMS if form.takes(labels)), None)
        if form is not None:
            named, fine = form.run(labels, num_classes, ignore_index, dtype)
            assert_async(fine, label_text("labels", num_classes, ignore_index))
            return named
    compiled = helpers(labels)
    if compiled is not None and dtype in (torch.int64, torch.int32):
        named = compiled.label_names(labels, num_classes, ignore_index, dtype == torch.int32)
        if named is not None:
            return named
    check_labels(labels, num_classes, ignore_index=ignore_index)
    return no_target(labels, ignore_index).to(dtype)

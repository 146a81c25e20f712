"""The front of labels over classes: rows of any shape, one label a row, several, and none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.checked_labels import checked_labels, no_target
from fused_losses.base.validation import check_index_vector, check_labels, describe


def flattened(rows: Tensor, labels: Tensor, *beside: Any) -> tuple[Any, ...]:
    """Rows [..., D] as [N, D], labels [...] or [..., L] as [N] or [N, L], and others [...] as [N].

    Where labels do not fit all is as it was, and `check_positions` refuses it.
    """
    if not isinstance(rows, Tensor) or rows.dim() <= 2 or not _fit(labels, rows):
        return rows, labels, *beside
    shape = rows.shape[:-1]
    flat = (t.flatten() if isinstance(t, Tensor) and t.shape == shape else t for t in beside)
    return rows.flatten(0, -2), labels.flatten(0, len(shape) - 1), *flat


def check_positions(
    rows: Tensor, labels: Tensor, rows_name: str = "embeddings", labels_name: str = "labels"
) -> None:
    """ValueError where rows of more than two dimensions were left, for labels of other shapes."""
    if not isinstance(rows, Tensor) or rows.dim() <= 2 or _fit(labels, rows):
        return
    shape = tuple(rows.shape[:-1])
    got = describe(labels) if isinstance(labels, Tensor) else type(labels).__name__
    raise ValueError(
        f"{labels_name}: expected shape {shape} or {shape} and more, as {rows_name} has "
        f"{tuple(rows.shape)}, got {got}"
    )


def _fit(labels: Tensor, rows: Tensor) -> bool:
    return isinstance(labels, Tensor) and labels.shape[: rows.dim() - 1] == rows.shape[:-1]


def one_label(labels: Tensor, rows: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels [N] of rows [N, D] as [N] int64, NO_TARGET where there is none; raises as below."""
    check_index_vector("labels", labels, len(rows), rows)
    labels = labels.long()
    if torch.compiler.is_compiling():
        return no_target(labels, ignore_index)
    return checked_labels(labels, num_classes, ignore_index)


def class_labels(labels: Tensor, rows: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels [N] or [N, L] of rows [N, D] as [N, L] int64, NO_TARGET where there is none.

    Raises TypeError, ValueError, or IndexError for what is neither in [0, num_classes) nor
    `ignore_index`; on a GPU as `check_labels`.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 2 or len(labels) != len(rows):
        return one_label(labels, rows, num_classes, ignore_index)[:, None]
    check_index_vector("labels", labels.flatten(), None, rows)
    labels = labels.long()
    if not torch.compiler.is_compiling():
        _check_ids(labels, num_classes)
        check_labels(labels, num_classes, ignore_index=ignore_index)
    return no_target(labels, ignore_index)


def _check_ids(labels: Tensor, num_classes: int) -> None:
    """One-hot rows [N, C] would be taken for many labels of classes 0 and 1."""
    if labels.shape[1] != num_classes or num_classes <= 2 or not labels.numel():
        return
    if labels.device.type == "cpu" and bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(
            "labels: expected class ids, [N] or [N, L], got one column a class with 0 and 1: "
            "labels.argmax(dim=1) of one-hot rows"
        )

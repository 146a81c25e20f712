"""Checks at the door: every message names the argument, what came and what was expected."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PRECISIONS = ("fp32", "tf32", "mixed", "bf16")
REDUCTIONS = ("mean", "sum", "none")
NO_TARGET = -1  # what the primitives take for "this row has no target here"


def describe(tensor: Tensor) -> str:
    """`shape (3, 4), torch.float32, cpu`: how a tensor is named in an error."""
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    """A two-dimensional floating point tensor, or a TypeError / ValueError that says what came."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected a floating point tensor {shape} (float32, bfloat16, float16 or "
            f"float64), got {describe(tensor)}"
        )
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected two dimensions {shape}, got {describe(tensor)}")


def check_pair(rows_name: str, rows: Tensor, weight_name: str, weight: Tensor) -> None:
    """Two matrices that meet in a product: same width, same device; dtypes are checked apart."""
    check_matrix(rows_name, rows, "[N, D]")
    check_matrix(weight_name, weight, "[C, D]")
    if rows.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{weight_name}: expected [C, {rows.shape[1]}] to match {rows_name} [N, "
            f"{rows.shape[1]}], got {describe(weight)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{weight_name}: expected at least one class, got {describe(weight)}")
    check_device(rows_name, rows, weight_name, weight)


def check_device(first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(
            f"{name}: expected the device of {first_name} ({first.device}), got {describe(tensor)}"
        )


def check_same_dtype(rows_name: str, rows: Tensor, weight_name: str, weight: Tensor) -> None:
    if rows.dtype != weight.dtype:
        raise TypeError(
            f"{weight_name}: expected the dtype of {rows_name} ({rows.dtype}), got "
            f"{describe(weight)}; cast one of them, or call under torch.autocast, where "
            f"{rows_name} takes the dtype of {weight_name}"
        )


def check_vector(name: str, tensor: Tensor, size: int, what: str, like: Tensor) -> None:
    """A floating point vector of a known length on the device of `like`."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = describe(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a floating point tensor {what}, got {got}")
    if tuple(tensor.shape) != (size,):
        raise ValueError(f"{name}: expected shape ({size},) {what}, got {describe(tensor)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {describe(tensor)}")


def check_index_vector(name: str, tensor: Tensor, size: int | None, like: Tensor) -> None:
    """An int64 (or int32) vector of class ids on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected an int64 tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 class ids, got {describe(tensor)}")
    if tensor.dim() != 1 or (size is not None and tensor.shape[0] != size):
        wanted = "one dimension" if size is None else f"shape ({size},)"
        raise ValueError(f"{name}: expected {wanted}, got {describe(tensor)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {describe(tensor)}")


def label_error(name: str, num_classes: int, low: int, high: int, extra: str = "") -> str:
    return (
        f"{name}: expected class ids in [0, {num_classes}){extra}, got values from {low} to {high}"
    )


def check_labels(
    labels: Tensor, num_classes: int, *, ignore_index: int = NO_TARGET, name: str = "labels"
) -> None:
    """Labels in [0, num_classes) or equal to ignore_index, found before any kernel reads them.

    On a GPU this is an asynchronous device assertion (no host sync) unless
    FUSED_LOSSES_VALIDATE=1 asks for the eager check with the values in its text.
    """
    if labels.numel() == 0:
        return
    bad = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    extra = "" if ignore_index == NO_TARGET else f" or ignore_index={ignore_index}"
    if labels.is_cuda and os.environ.get("FUSED_LOSSES_VALIDATE") != "1":
        torch._assert_async(~bad.any(), f"{name}: expected class ids in [0, {num_classes}){extra}")
    elif bool(bad.any()):
        wrong = labels[bad]
        raise IndexError(
            label_error(name, num_classes, int(wrong.min()), int(wrong.max()), extra)
            + f" in {wrong.numel()} of {labels.numel()} rows"
        )


def check_classes(classes: Tensor, num_classes: int) -> None:
    """Strictly increasing ids in [0, num_classes): what the primitives take for `classes`."""
    if classes.numel() == 0:
        raise ValueError("classes: expected at least one class id, got an empty tensor")
    if int(classes[0]) < 0 or int(classes[-1]) >= num_classes:
        raise IndexError(
            label_error("classes", num_classes, int(classes.min()), int(classes.max()))
        )
    if not bool((classes[1:] > classes[:-1]).all()):
        raise ValueError("classes: expected distinct class ids, got duplicates")


def check_labels_in_classes(labels: Tensor, classes: Tensor) -> None:
    """Each label (or NO_TARGET) is one of `classes`: a sampled softmax needs its positives."""
    found = classes[torch.searchsorted(classes, labels).clamp_max(classes.numel() - 1)] == labels
    missing = ~found & (labels != NO_TARGET)
    if bool(missing.any()):
        raise ValueError(
            f"classes: expected every label among the classes that take part, but "
            f"{int(missing.sum())} labels are not, for example class "
            f"{int(labels[missing][0])}"
        )

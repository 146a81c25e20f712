"""Embeddings in more than two dimensions: a row for each position."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from fused_losses.base.class_labels import check_positions, flattened
from fused_losses.base.validation import describe

LossFunction = TypeVar("LossFunction", bound=Callable[..., Any])


def over_positions(loss: LossFunction) -> LossFunction:
    """A loss of rows [N, D], a weight and labels [N] or [N, L] that takes them [..., D] and [...].

    What it returns for each row comes in the rows' shape [...]; a scale or a weight for each row
    goes so, too.
    """
    names = list(inspect.signature(loss).parameters)

    @functools.wraps(loss)
    def call(*args: Any, **options: Any) -> Any:
        rows = args[0] if args else options.get(names[0])
        if not isinstance(rows, Tensor) or rows.dim() <= 2:
            return loss(*args, **options)
        options |= dict(zip(names, args, strict=False))
        # one dimension more a row: several labels, or probabilities
        shape = rows.shape[:-1]
        labels: Any = options.get(names[2])
        check_positions(rows, labels, names[0], names[2])
        beside = [name for name in ("scale", "row_weight") if name in options]
        rows, labels, *flat = flattened(rows, labels, *(options[name] for name in beside))
        options |= {names[0]: rows, names[2]: labels, **dict(zip(beside, flat, strict=True))}
        chosen = options.get("selected")
        if isinstance(chosen, Tensor) and chosen.shape[:-1] == shape:
            options["selected"] = chosen.flatten(0, -2)
        return _unflattened(loss(**options), shape)

    return call  # pyright: ignore[reportReturnType]


def over_two_positions(loss: LossFunction) -> LossFunction:
    """A loss of a student's and a teacher's rows [N, ...] that takes both [..., D] alike.

    The teacher may be a tuple of such; labels and scales for each row come [...], and so do losses.
    """
    names = list(inspect.signature(loss).parameters)

    @functools.wraps(loss)
    def call(*args: Any, **options: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | options
        student = given.get("student")
        if not isinstance(student, Tensor) or student.dim() <= 2:
            return loss(*args, **options)
        shape = student.shape[:-1]
        given["student"] = student.flatten(0, -2)
        teacher = given.get("teacher")
        fields = getattr(teacher, "_fields", None)
        if teacher is not None and fields is not None:
            parts = zip(fields, teacher, strict=True)
            flat = (_flat_rows(f"teacher.{name}", part, shape) for name, part in parts)
            given["teacher"] = type(teacher)(*flat)
        else:
            given["teacher"] = _flat_rows("teacher", teacher, shape)
        for name in ("labels", "student_scale", "teacher_scale"):
            value = given.get(name)
            if not isinstance(value, Tensor) or (value.numel() == 1 and name != "labels"):
                continue
            if value.shape != shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(shape)}, as student has "
                    f"{tuple(student.shape)}, got {describe(value)}"
                )
            given[name] = value.flatten()
        return _unflattened(loss(**given), shape)

    return call  # pyright: ignore[reportReturnType]


def _flat_rows(name: str, rows: Any, shape: tuple[int, ...]) -> Any:
    if not isinstance(rows, Tensor) or rows.shape[:-1] != shape:
        got = describe(rows) if isinstance(rows, Tensor) else type(rows).__name__
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected [{wanted}, ...] beside such a student, got {got}")
    return rows.flatten(0, -2)


def _unflattened(found: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(found, Tensor):
        return found.view(*shape, *found.shape[1:]) if found.dim() else found
    if found is None:
        return None
    parts = [_unflattened(part, shape) for part in found]
    return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)

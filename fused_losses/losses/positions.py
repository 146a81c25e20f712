"""Embeddings in more than two dimensions: a row for each position."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from fused_losses.base.validation import describe

LossFunction = TypeVar("LossFunction", bound=Callable[..., Any])


def over_positions(loss: LossFunction) -> LossFunction:
    """A loss of rows [N, D], a weight and labels [N] or [N, L] that takes them [..., D] and [...].

    What it returns for each row comes in the rows' shape [...]; a scale for each row goes so, too.
    """
    names = list(inspect.signature(loss).parameters)

    @functools.wraps(loss)
    def call(*args: Any, **options: Any) -> Any:
        rows = args[0] if args else options.get(names[0])
        if not isinstance(rows, Tensor) or rows.dim() <= 2:
            return loss(*args, **options)
        options |= dict(zip(names, args, strict=False))
        # one dimension more a row: several labels, or probabilities
        shape, labels = rows.shape[:-1], options.get(names[2])
        if not isinstance(labels, Tensor) or labels.shape[: len(shape)] != shape:
            got = describe(labels) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"{names[2]}: expected shape {tuple(shape)} or {tuple(shape)} and more, as "
                f"{names[0]} has {tuple(rows.shape)}, got {got}"
            )
        options[names[0]] = rows.flatten(0, -2)
        options[names[2]] = labels.flatten(0, len(shape) - 1)
        scale = options.get("scale")
        if isinstance(scale, Tensor) and scale.shape == shape:
            options["scale"] = scale.flatten()
        return _unflattened(loss(**options), shape)

    return call  # pyright: ignore[reportReturnType]


def _unflattened(found: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(found, Tensor):
        return found.view(shape) if found.dim() else found
    parts = [_unflattened(part, shape) for part in found]
    return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)

"""Embeddings in more than two dimensions: a row for each position."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from fused_losses.base.class_labels import check_positions, flattened

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


def _unflattened(found: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(found, Tensor):
        return found.view(*shape, *found.shape[1:]) if found.dim() else found
    if found is None:
        return None
    parts = [_unflattened(part, shape) for part in found]
    return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)

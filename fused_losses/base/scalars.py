"""Numbers that scores are scaled by."""

from __future__ import annotations

from torch import Tensor

from fused_losses.base.compiled import helpers
from fused_losses.base.validation import number


def inverse(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """1 / value as float64 [], of a temperature > 0: `number`'s reciprocal, and what it raises."""
    compiled = helpers(value, like) if isinstance(value, Tensor) else None
    found = None if compiled is None else compiled.inverse(value)
    return number(name, value, like).reciprocal() if found is None else found

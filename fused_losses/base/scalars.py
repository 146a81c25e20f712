"""Numbers that scores are scaled by."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.compiled import helpers
from fused_losses.base.validation import check_positive, number


def inverse(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """1 / value as float64 [], of a temperature > 0: `number`'s reciprocal, and what it raises."""
    if not isinstance(value, Tensor):
        check_positive(name, value)
        return torch.full((), 1 / float(value), dtype=torch.float64, device=like.device)
    compiled = helpers(value, like)
    found = None if compiled is None else compiled.inverse(value)
    return number(name, value, like).reciprocal() if found is None else found

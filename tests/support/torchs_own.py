"""What torch has itself, and what it is where an older torch has it not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def _of_logits(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    **options: Any,
) -> Tensor:
    ignored = -100 if ignore_index is None else ignore_index
    logits = F.linear(input, linear_weight, linear_bias)
    return F.cross_entropy(logits, target, ignore_index=ignored, **options)


# torch 2.11 has none
torch_lce: Callable[..., Tensor] = getattr(F, "linear_cross_entropy", _of_logits)

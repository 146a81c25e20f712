"""A small call of margin softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fused_losses

N, D, C = 6, 5, 9


def good() -> dict[str, Any]:
    return {
        "embeddings": torch.randn(N, D),
        "weight": torch.randn(C, D),
        "labels": torch.tensor([0, 3, 8, 3, 1, 5]),
    }


def call(backend: str | None, **changes: Any) -> Tensor:
    arguments = {**good(), **changes}
    tensors = [arguments.pop(name) for name in ("embeddings", "weight", "labels")]
    return fused_losses.margin_softmax(*tensors, backend=backend, **arguments)

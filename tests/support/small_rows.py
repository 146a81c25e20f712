"""Small inputs of margin softmax."""

from __future__ import annotations

import torch
from torch import Tensor

N, D, C = 7, 5, 13


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    w = torch.randn(C, D, dtype=dtype, requires_grad=True)
    return x, w, torch.tensor([0, 3, 12, 3, -100, 5, 7])

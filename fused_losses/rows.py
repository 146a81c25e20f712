"""Row-wise pieces, O(N D), that the losses share around the streamed primitives."""

from __future__ import annotations

import torch
from torch import Tensor

ZERO_NORM = 1e-12


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_dtype(device: torch.device) -> torch.dtype:
    """What the statistics of a row come in: float64 where the device has it."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| a row; a row with |x| <= 1e-12 becomes zero and gets gradient zero. [N, D]"""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # `not <=` and not `>`: a NaN norm must stay NaN
    alive = ~(norm <= ZERO_NORM)
    return torch.where(alive, x / torch.where(alive, norm, 1), 0)


def root(v: Tensor) -> Tensor:
    """The square root, 0 (with gradient 0) where v <= 0; a NaN stays one."""
    positive = ~(v <= 0)
    return torch.where(positive, torch.where(positive, v, 1).sqrt(), 0)

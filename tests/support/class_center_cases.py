"""A small head and its batches, for every test of `ClassCenters` in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.centers import ClassCenters

N, C, D = 13, 57, 6


def data(dtype: torch.dtype = torch.float64, labels: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    y = torch.randint(0, C, (N, labels) if labels else (N,))
    y[3] = -100
    return x, y


def head(**options: Any) -> ClassCenters:
    defaults = dict(dtype=torch.float64, scale=16.0, chunk_bytes=10 * D * 8)
    return ClassCenters(C, D, **{**defaults, **options})


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        a = a.to_dense() if a.is_sparse else a
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

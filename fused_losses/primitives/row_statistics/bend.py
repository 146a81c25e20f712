"""Bent scores of a block, in PyTorch that autograd follows: for all but kernels and the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def bent(raw: Tensor, bend: Tensor) -> Tensor:
    """raw up to the row's threshold, p + q raw + r raw^2 above it. [N, T], [4, N, 1] -> [N, T]"""
    t, p, q, r = bend
    # in place, or three blocks more would be alive
    above = (r * raw).add_(q).mul_(raw).add_(p)
    return torch.where(raw > t, above, raw)


def bent_slope(raw: Tensor, bend: Tensor) -> Tensor:
    """The derivative of `bent` in raw. [N, T]"""
    t, _, q, r = bend
    above = (2 * r * raw).add_(q)
    return torch.where(raw > t, above, 1)


def steepest_bend(values: Tensor | None) -> Tensor | float:
    """A bound on |psi'| of each row, [N], for cosines; of none 1."""
    if values is None:
        return 1.0
    _, _, q, r = values
    return (q.abs() + 2 * r.abs()).clamp_min(1)

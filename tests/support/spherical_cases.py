"""An exact head beside its dense formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses import SphericalHead

C, D, N = 50, 8, 12
RATES = {"z": 0.3, "mse": 3e-3, "taylor": 0.1}
ALL = torch.arange(C)


def dense(loss: str, table: Tensor, h: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """The definition on all outputs; labels [N, K], -1: none."""
    o = h @ table.T
    each = []
    for row, named in zip(o, labels, strict=True):
        own = named[named >= 0]
        if not len(own):
            continue
        if loss == "mse":
            wanted = torch.zeros_like(row).index_add(0, own, torch.ones_like(row[own]))
            # a class named twice is wanted once for each: (o - 2)^2 has 4, the two targets 2
            each.append(((row - wanted) ** 2).sum() - (wanted**2).sum() + len(own))
            continue
        if loss == "z":
            z = (row - row.mean()) / row.std(unbiased=False)
            each.append(torch.log1p(torch.exp(-z))[own].mean())
        else:
            t = 1 + row + row**2 / 2
            each.append(-(t / t.sum()).log()[own].mean())
    return torch.stack(each).mean() if reduction == "mean" else torch.stack(each).sum()


def head_of(loss: str, dtype: torch.dtype = torch.float64, **options: Any) -> SphericalHead:
    return SphericalHead(C, D, loss, lr=RATES[loss], dtype=dtype, **options)


def batch(n: int = N, k: int = 1) -> tuple[Tensor, Tensor]:
    h = torch.randn(n, D, dtype=torch.float64)
    return h.requires_grad_(), torch.randint(0, C, (n, k))

"""Distances of pairs in float64, by their definitions."""

from __future__ import annotations

from torch import Tensor


def distances(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Smaller is nearer, float64."""
    x, y = x.double(), y.double()
    if metric == "cosine":
        x, y = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
        return 1 - (x[:, None] * y).sum(dim=2)
    if metric == "dot":
        return -(x[:, None] * y).sum(dim=2)
    apart = x[:, None] - y
    return apart.abs().sum(dim=2) if metric == "cityblock" else apart.square().sum(dim=2).sqrt()

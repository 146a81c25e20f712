"""Sums and means of segments, and sums of atoms, for the draws."""

from __future__ import annotations

from typing import Any

import torch
from pair_cases import Case
from pair_rows import Inputs
from torch import Tensor

import fused_losses.functional as fl


def segments(n: int, m: int, d: int) -> Inputs:
    return Inputs(x=torch.randn(n, d) / d**0.5, segment=torch.randint(0, n // 3 + 1, (n,)))


def count(t: Inputs) -> int:
    """Of segments, the last ones empty."""
    return 3 + (int(t.segment.max()) if len(t.segment) else 0)


def segment_sum(t: Inputs) -> Tensor:
    return torch.stack([t.x[t.segment == c].sum(dim=0) for c in range(count(t))])


def segment_mean(t: Inputs) -> Tensor:
    sizes = [int((t.segment == c).sum()) for c in range(count(t))]
    return segment_sum(t) / torch.tensor(sizes).clamp_min(1)[:, None]


def summed(function: Any) -> Any:
    return lambda t, **_: function(t.x, t.segment, count(t))


def atoms(n: int, m: int, d: int) -> Inputs:
    x, w = torch.randn(n, d) / d**0.5, torch.randn(m, d) / d**0.5
    return Inputs(x=x, w=w, index=torch.randint(0, m, (n, d)))


def decoded(t: Inputs) -> Tensor:
    return (t.x[:, :, None] * t.w[t.index]).sum(dim=1) + t.w[:1].sum(dim=0)


DRAWN = [
    Case(
        "sparse_decode",
        atoms,
        lambda t, **_: fl.sparse_decode(t.x, t.index, t.w, bias=t.w[:1].sum(dim=0)),
        decoded,
        ("x", "w"),
        function=fl.sparse_decode,
    ),
    Case("segment_sum", segments, summed(fl.segment_sum), segment_sum, function=fl.segment_sum),
    Case("segment_mean", segments, summed(fl.segment_mean), segment_mean, function=fl.segment_mean),
]

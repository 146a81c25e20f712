"""Batches to mine, and what a choice must be."""

from __future__ import annotations

import pytest
import torch

from fused_losses.mining import batch as mining_batch


def grid(n: int, d: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple:
    """Few distinct points, so that distances tie exactly, in every dtype."""
    return torch.randint(0, 3, (n, d)).to(dtype), torch.randint(0, classes, (n,))


@pytest.fixture(params=[1, 1 << 30], ids=["row by row", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(mining_batch, "BLOCK_BYTES", request.param)
    return request.param


X, LABELS = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])

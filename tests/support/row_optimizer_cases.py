"""Tables, rows and steps for the tests of the lazy row optimisers, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import require
from torch import Tensor

from fused_losses import backends
from fused_losses.centers import lazy_rows
from fused_losses.centers.optimizers import RowOptimizer
from fused_losses.primitives.row_update import bounded

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
C, D = 23, 5


@pytest.fixture(params=["reference", "bounded", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backends.use_backend(require(request.param)):
        yield request.param


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ragged blocks also at these sizes."""
    monkeypatch.setattr(bounded, "BLOCK_BYTES", 3 * D * 8)
    monkeypatch.setattr(lazy_rows, "ROWS", 7)


def a_table(*shape: int, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(*(shape or (C, D))).to(dtype)


def some_rows(count: int = C) -> Tensor:
    """Distinct rows in any order; often few, at times none or all."""
    part = min(1.0, float(torch.rand(())) ** 3 * 1.3)
    return torch.randperm(count)[: int(part * count)]


def dense(weight: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    return torch.zeros_like(weight).index_copy_(0, rows, grad)


def sparse(weight: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    given = torch.sparse_coo_tensor(rows[None], grad, weight.shape, check_invariants=True)
    return given.coalesce()


def assert_close(got: Tensor, want: Tensor) -> None:
    """To float64's 1e-12, of each row's largest element."""
    size = want.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    assert bool((((got - want) / size).abs() < 1e-12).all())


def take_step(ours: RowOptimizer, rows: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
    """As a head does: the rows catch up, then step by tiles."""
    ours.catch_up(rows)
    ours.begin(group)
    half = len(rows) // 2
    ours.update(rows[:half], grad[:half])
    ours.update(rows[half:], grad[half:])
    ours.end()


RULES = {
    "sgd": dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "adamw": dict(lr=0.1, weight_decay=0.1),
    "adagrad": dict(lr=0.1, weight_decay=0.1),
}
rules = pytest.mark.parametrize("rule", RULES)

"""Scores that small calls over classes keep without a room, in the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import require
from torch import Tensor

from fused_losses import functional as f
from fused_losses.base.memory_budget import Room
from fused_losses.functions import linear_cross_entropy, margin_softmax
from fused_losses.primitives.row_statistics import inputs
from fused_losses.primitives.row_statistics.inputs import SMALL, kept_classes


def rows(n: int, c: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, w = (torch.randn(size, 8, dtype=dtype).requires_grad_() for size in (n, c))
    return x, w


def kept(
    n: int, c: int, room: Room | None = None, backend: str = "cpu", **given: torch.dtype
) -> int:
    return kept_classes(room, *rows(n, c, **given), c, backend=backend)


def test_all_of_a_small_call_or_none() -> None:
    # rows in whole vectors
    most = SMALL // 4 // 256
    assert kept(250, most) == most and kept(256, most) == most
    assert kept(257, most) == kept(256, most + 1) == 0
    assert kept(256, most // 2, dtype=torch.float64) == most // 2
    assert kept(256, most // 2 + 1, dtype=torch.float64) == 0
    assert kept(9, 7, Room(8)) == 0  # what is told holds
    assert kept(9, 7, backend="bounded") == kept(9, 7, backend="triton") == 0
    with torch.no_grad():
        assert kept(9, 7) == 0


def arcface(x: Tensor, w: Tensor) -> Tensor:
    return f.margin_softmax(x, w, torch.arange(len(x)) % len(w), backend="cpu")


def probabilities(x: Tensor, w: Tensor) -> Tensor:
    share = torch.full((len(x), len(w)), 1 / len(w))
    return f.linear_cross_entropy(x, w, share, backend="cpu")


@pytest.mark.parametrize(
    ("loss", "module"), ((arcface, margin_softmax), (probabilities, linear_cross_entropy))
)
@pytest.mark.parametrize("n", (7, 100))
def test_what_is_kept_changes_no_bit(
    n: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    module: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("cpu")
    given, ran = rows(n, 500), []

    def counted(*of, **options) -> int:
        ran.append(kept_classes(*of, **options))
        return ran[-1]

    def outcome() -> tuple[Tensor, ...]:
        value = loss(*given)
        return value, *torch.autograd.grad(value, given)

    monkeypatch.setattr(module, "kept_classes", counted)
    got = outcome()
    monkeypatch.setattr(inputs, "SMALL", 0)
    for a, b in zip(got, outcome(), strict=True):
        assert torch.equal(a, b)
    assert ran == [500, 0]


def test_compiled_code_keeps_none() -> None:
    require("cpu")
    x, w = rows(20, 30)
    plan = lambda x, w: kept_classes(None, x, w, 30, backend="cpu") + x.sum()
    assert torch.compile(plan, backend="eager", fullgraph=True)(x, w) == x.sum()

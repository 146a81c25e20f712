"""A sweep over classes in plain eager code: the op's own bits, its gradient by a node in C++."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_losses.base import compiled
from fused_losses.primitives.row_statistics import op
from fused_losses.primitives.row_statistics.op import RowStatistics, row_statistics

N, C, D = 9, 31, 12
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unit rows": dict(normalize=True),
    "kept": dict(normalize=True, kept_classes=C),
    "bias": dict(bias=torch.randn(C)),
    "weighted": dict(weighted=True, column_weight=torch.rand(C)),
    "some classes": dict(classes=torch.arange(0, C, 2), bias=torch.randn(C)),
    "bent": dict(normalize=True, bend=torch.tensor([[0.1], [0.0], [1.5], [0.2]]).repeat(1, N)),
    "all": dict(
        classes=torch.arange(0, C, 2), bias=torch.randn(C), column_weight=torch.rand(C),
        weighted=True, normalize=True, kept_classes=5,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def built() -> None:
    if compiled.helpers() is None:
        pytest.skip("the helpers are not built")


def leaves(name: str, needs: str = "xwb") -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, D, generator=make) for n in (N, C))
    found = dict(x=x.requires_grad_("x" in needs), weight=weight.requires_grad_("w" in needs))
    if "bias" in CALLS[name]:
        found["bias"] = CALLS[name]["bias"].clone().requires_grad_("b" in needs)
    return found


def swept(name: str, given: dict[str, Tensor]) -> RowStatistics:
    labels = (2 * torch.arange(N)).index_fill(0, torch.tensor([4]), -1)
    return row_statistics(**{**CALLS[name], **given}, labels=labels, backend="cpu")


def total(found: RowStatistics, of: str = "ltw") -> Tensor:
    mix = torch.linspace(-1, 1, N, dtype=torch.float64)
    parts = {"l": found.lse, "t": 2 * found.target, "w": found.weighted_sum}
    kept = [parts[k].double() for k in of if parts[k].numel()]
    return torch.stack([(mix * part).sum() for part in kept]).sum()


@pytest.mark.parametrize("of", ("ltw", "l", "t"))
@pytest.mark.parametrize("needs", ("xwb", "x", "w", "b", ""))
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits(name: str, needs: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome() -> list[Tensor]:
        given = leaves(name, needs)
        found, moving = swept(name, given), [t for t in given.values() if t.requires_grad]
        assert [t.requires_grad for t in found[:2]] == [bool(moving)] * 2
        assert not found.hardest.requires_grad and not found.hardest_score.requires_grad
        slopes = torch.autograd.grad(total(found, of), moving) if moving else ()
        return [*(t.detach() for t in found), *slopes]

    got = outcome()
    monkeypatch.setattr(op, "helpers", lambda *_: None)
    for a, b in zip(got, outcome(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_who_has_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    apply = op.ROW_STATISTICS.__class__.__call__
    monkeypatch.setattr(op.RowStatisticsOp, "__call__", lambda *of: ran.append(of[1]) or apply(*of))
    given = leaves("plain")
    swept("plain", given)
    assert not ran
    labels = torch.zeros(N, dtype=torch.int64)
    row_statistics(given["x"], given["weight"], labels, backend="bounded")
    with Mode():
        swept("plain", given)
    assert ran == ["bounded", "cpu"]


def test_no_second_derivative() -> None:
    given = leaves("unit rows")
    (slope,) = torch.autograd.grad(
        total(swept("unit rows", given)), [given["x"]], create_graph=True
    )
    with pytest.raises(NotImplementedError, match="second derivative"):
        slope.sum().backward()


def test_a_graph_that_is_walked_twice_and_a_checkpoint() -> None:
    given = leaves("bias")
    value = total(swept("bias", given))
    of = list(given.values())
    first = torch.autograd.grad(value, of, retain_graph=True)
    found = [torch.autograd.grad(value, of)]
    for reentrant in (False, True):
        run = lambda x, weight, bias: total(swept("bias", dict(x=x, weight=weight, bias=bias)))
        again = checkpoint(run, *of, use_reentrant=reentrant)
        assert isinstance(again, Tensor)
        again.backward()
        found.append(tuple(t.grad for t in of if t.grad is not None))
        for t in of:
            t.grad = None
    for slopes in found:
        assert all(torch.equal(a, b) for a, b in zip(slopes, first, strict=True))


def test_rows_that_changed_are_noticed_and_nothing_is_kept_alive() -> None:
    given = leaves("kept")
    value = total(swept("kept", given))
    with torch.no_grad():
        given["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    alive = weakref.ref(given["x"])
    del given, value
    gc.collect()
    assert alive() is None

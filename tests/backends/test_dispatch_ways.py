"""Which way an op is called: plain, seen by a mode, transformed, compiled; forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses import backends
from fused_losses.primitives import op


class Doubled(op.StreamedOp):
    """x -> 2 x, whose registered op says which it was, and whether autograd is passed by."""

    name, primitive = "doubled", "pairs"
    schema = backward_schema = "(Tensor x) -> Tensor"

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bool]] = []

    def op(self, backend: str, direction: str = "") -> Any:
        def registered(x: Tensor) -> Tensor:
            key = torch._C.DispatchKey.AutogradFunctionality
            below = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
            self.calls.append((backend, direction, below))
            return 2 * x

        return registered

    def setup_context(self, ctx: Any, inputs: tuple, output: Any) -> None: ...

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        return (backward_op(*grads),)

    def tangents(self, direction: str, arguments: tuple, moves: tuple, output: tuple) -> tuple:
        return (2 * moves[0],)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The autograd Functions that were applied."""
    applied: list[str] = []
    for function in (op._PlainFunction, op.StreamedFunction, op._BackwardFunction):
        known = function.apply

        def apply(*given: Any, known: Callable = known, name: str = function.__name__) -> Any:
            applied.append(name)
            return known(*given)

        monkeypatch.setattr(function, "apply", apply)
    return applied


def test_plain_calls_go_below_autograd(classes: list[str]) -> None:
    doubled, x = Doubled(), torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(doubled("cpu", x).sum(), x)
    assert classes == ["_PlainFunction"] and torch.equal(grad, torch.full((2,), 2.0))
    assert doubled.calls == [("cpu", "", True), ("cpu", "_backward", True)]
    # without a gradient there is no Function
    classes.clear()
    doubled("bounded", x.detach())
    with torch.no_grad():
        assert not doubled("bounded", x).requires_grad
    assert classes == [] and doubled.calls[2:] == [("bounded", "", True)] * 2


def test_a_mode_finds_the_registered_op(classes: list[str]) -> None:
    doubled, x = Doubled(), torch.ones(2, requires_grad=True)
    with Mode():
        doubled("cpu", x)
        with torch.no_grad():
            doubled.run_backward("cpu", x)
    assert classes == [] and doubled.calls == [("cpu", "", False), ("cpu", "_backward", False)]


def test_a_gradient_that_is_differentiated_is_the_registered_op(classes: list[str]) -> None:
    doubled, x = Doubled(), torch.ones(2)
    doubled.run_backward("cpu", x)
    with torch.no_grad():
        doubled.run_backward("cpu", x)
    assert classes == []
    assert doubled.calls == [("cpu", "_backward", False), ("cpu", "_backward", True)]


def test_transforms_have_functions_of_their_own(classes: list[str]) -> None:
    doubled, x = Doubled(), torch.ones(2)
    torch.func.grad(lambda t: doubled("cpu", t).sum())(x)
    # a level of torch.func applies them once more
    assert {*classes} == {"StreamedFunction", "_BackwardFunction"}
    classes.clear()
    with forward_ad.dual_level():
        moved = doubled("cpu", forward_ad.make_dual(x, x))
        doubled.run_backward("cpu", x)
        assert torch.equal(forward_ad.unpack_dual(moved).tangent, 2 * x)
    assert {*classes} == {"StreamedFunction", "_BackwardFunction"}


def test_compiled_code_calls_the_registered_op(
    classes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    doubled, x = Doubled(), torch.ones(2, requires_grad=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with forward_ad.dual_level():
        doubled("cpu", x)
        doubled.run_backward("cpu", x)
    with torch.no_grad():
        doubled("cpu", x)
        doubled.run_backward("cpu", x)
    assert classes == [] and not any(below for *_, below in doubled.calls)
    assert [way for _, way, _ in doubled.calls] == ["", "_backward"] * 2


def test_an_op_without_a_gradient_is_called_as_it_is(classes: list[str]) -> None:
    doubled, x = Doubled(), torch.ones(2)
    doubled.backward_schema = None
    doubled("cpu", x)
    with forward_ad.dual_level():
        doubled("cpu", x)
    assert classes == [] and doubled.calls == [("cpu", "", False)] * 2


def test_names_of_ops_and_forms() -> None:
    known = op.OPS["pair_statistics"]
    assert known.op("bounded") is torch.ops.fused_losses.pair_statistics_bounded.default
    backward = torch.ops.fused_losses.pair_statistics_bounded_backward.default
    assert known.op("bounded", "_backward") is backward
    assert known.form("bounded") is backends.module("pairs", "bounded")
    assert known.form("bounded").__name__ == "fused_losses.primitives.pairs.bounded"
    # what is compiled has no kernel in Python behind it, which a tensor elsewhere would reach
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("fused_losses::pair_statistics_bounded", "CompositeExplicitAutograd")
    assert not has("fused_losses::pair_statistics_cpu", "CompositeExplicitAutograd")

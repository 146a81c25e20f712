"""`memory_budget` of the modules: which have it, that it is passed on, and what survives."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from types import FrameType
from typing import Any

import pytest
import torch
from catalogue_table import CASES, answered, built, drawn, leaves
from conftest import require

import fused_losses
from fused_losses import losses
from fused_losses.losses.module import Loss
from fused_losses.primitives.pairs.keeping import SMALL

MODULES = {e.name: e.module for e in losses.catalogue() if issubclass(e.module, Loss)}
KEEPERS = [name for name in sorted(MODULES) if MODULES[name].keeps]
OTHERS = [name for name in sorted(MODULES) if not MODULES[name].keeps]
# whose function takes no budget, though one that it calls does
THROUGH_OTHERS = {"DEPICTLoss", "HardContrastiveLoss"}
# of the one hardest negative nothing is kept
HARDEST = {"CrammerSingerLoss"}
D, N = 8, 300


def reached(name: str) -> bool:
    """Whether a call comes to a function of `functions` that has a budget."""
    module, call = built(name, D), drawn(name, 19, D)
    found = False

    def look(frame: FrameType, event: str, _: Any) -> None:
        nonlocal found
        code = frame.f_code
        own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        of_functions = "fused_losses/functions/" in code.co_filename.replace("\\", "/")
        found = found or (event == "call" and of_functions and "memory_budget" in own)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        module(*call.arguments, **call.options)
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_all_have_it_whose_function_has(name: str) -> None:
    assert reached(name) == (MODULES[name].keeps or name in THROUGH_OTHERS)


def kept(name: str, budget: int) -> int | None:
    module = built(name, D, torch.float32, backend=require("cpu"), memory_budget=budget)
    call, _ = leaves(module, drawn(name, N, D), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fused_losses.explain(module, *call.arguments, **call.options).kept_bytes


@pytest.mark.parametrize("name", [n for n in KEEPERS if CASES[n].explains and n not in HARDEST])
def test_it_is_passed_on_and_is_a_bound(name: str) -> None:
    small = kept(name, 0)  # of a small call its scores, whatever is asked for
    assert small is not None and small <= SMALL
    whole = kept(name, 1 << 26)
    assert whole is not None and 0 < whole <= 1 << 26
    less = kept(name, whole // 2)
    assert less is not None and less <= whole // 2


@pytest.mark.parametrize("name", KEEPERS)
def test_it_changes_no_bit(name: str) -> None:
    found = []
    for budget in (0, 1 << 14, 1 << 26):
        module = built(name, D, torch.float32, backend=require("cpu"), memory_budget=budget)
        call, held = leaves(module, drawn(name, 67, D), torch.float32)
        found.append(answered(module, call, held))
    (want, slopes), *rest = found
    for got, its in rest:
        assert torch.equal(got, want)
        for which in slopes:
            assert torch.equal(its[which], slopes[which]), which


@pytest.mark.parametrize("name", KEEPERS)
def test_it_is_an_option_and_no_state(name: str) -> None:
    module = built(name, D)
    assert "memory_budget" not in repr(module)
    assert not any("memory_budget" in key for key in module.state_dict())
    module.memory_budget = 1 << 20
    assert "memory_budget=1048576" in repr(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.memory_budget == 1 << 20
    # pickled before there was one
    del module.memory_budget
    assert pickle.loads(pickle.dumps(module)).memory_budget == 0


@pytest.mark.parametrize("name", sorted(MODULES))
def test_it_is_given_to_the_constructor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Loss.__init__
    asked: dict[str, Any] = {}

    def init(self: Loss, **options: Any) -> None:
        plain(self, **options, **asked)

    monkeypatch.setattr(Loss, "__init__", init)
    for wrong, kind in ((-1, ValueError), (True, TypeError), ("all", TypeError)):
        asked["memory_budget"] = wrong
        with pytest.raises(kind, match=r"memory_budget: expected bytes"):
            CASES[name].build(D)
    asked["memory_budget"] = "auto"
    if MODULES[name].keeps:
        assert CASES[name].build(D).memory_budget == "auto"
    else:
        with pytest.raises(ValueError, match=r"memory_budget: expected 0 for .*; got 'auto'"):
            CASES[name].build(D)


def test_a_call_has_the_last_word() -> None:
    make = torch.Generator().manual_seed(0)
    x, y = (torch.randn(N, D, generator=make, requires_grad=True) for _ in range(2))
    labels = torch.arange(N) % 17
    backend = require("cpu")
    nce = losses.InfoNCELoss(backend=backend, memory_budget=1 << 26)
    arc = losses.ArcFaceLoss(17, D, backend=backend, memory_budget=1 << 26)
    taught = losses.KDLoss(backend=backend, memory_budget=1 << 26)
    for module, given in (
        (nce, (x, y)),
        (arc, (x, labels)),
        (taught, (x, y, x.detach(), y.detach())),
    ):
        assert fused_losses.explain(module, *given).kept_bytes
        assert not fused_losses.explain(module, *given, memory_budget=1).kept_bytes


def test_widths_from_one_sweep_keep_nothing() -> None:
    make = torch.Generator().manual_seed(0)
    x, y = (torch.randn(N, D, generator=make, requires_grad=True) for _ in range(2))
    labels = torch.arange(N) % 17
    nce = losses.InfoNCELoss(backend=require("cpu"), memory_budget=1 << 26)
    clip = losses.ClipLoss(backend=require("cpu"), memory_budget=1 << 26)
    arc = losses.ArcFaceLoss(17, D, backend=require("cpu"), memory_budget=1 << 26)
    for module, given, rows in ((nce, (x, y), 2), (clip, (x, y), 2), (arc, (x, labels), 1)):
        nested = losses.MatryoshkaLoss(module, [4, 8], rows=rows)
        plain = copy.deepcopy(nested)
        plain.loss.memory_budget = 0
        assert torch.equal(nested(*given), plain(*given))

"""Lazy row optimisers (`fused_losses.centers.optimizers`) against torch.optim on whole tables."""

from __future__ import annotations

from typing import Any

import pytest
import row_optimizer_cases as cases
import torch
from row_optimizer_cases import (
    FP64,
    RULES,
    C,
    D,
    a_table,
    assert_close,
    dense,
    rules,
    some_rows,
    sparse,
    take_step,
)
from torch import Tensor

from fused_losses import backends
from fused_losses.centers import lazy_rows
from fused_losses.centers.optimizers import make_row_optimizer

backend, _small_blocks = cases.backend, cases._small_blocks  # fixtures

# ---- sgd ----------------------------------------------------------------------------------------

SGD = [
    [dict(lr=0.1)],
    [dict(lr=0.1, weight_decay=0.3)],
    [dict(lr=0.1, momentum=0.9)],
    [dict(lr=0.05, momentum=0.9, weight_decay=0.2)],
    [dict(lr=0.05, momentum=0.9, weight_decay=0.2, maximize=True)],
    [dict(lr=0.05, momentum=0.8, weight_decay=0.2, dampening=0.4)],
    [dict(lr=0.05, momentum=0.9, weight_decay=0.2, nesterov=True)],
    # changed between steps: everything, at times no momentum, and a first step without
    [
        dict(lr=0.05, momentum=0.9, weight_decay=0.2, dampening=0.3),
        dict(lr=0.02, momentum=0.5, weight_decay=0.0, dampening=0.3),
        dict(lr=0.1, momentum=0.0, weight_decay=0.1, dampening=0.3),
    ],
    [
        dict(lr=0.1, momentum=0.0, weight_decay=0.1, dampening=0.3),
        dict(lr=0.1, momentum=0.7, weight_decay=0.1, dampening=0.3),
    ],
    [
        dict(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        dict(lr=0.1, momentum=0.0, weight_decay=0.1, nesterov=True),
        dict(lr=0.01, momentum=0.95, weight_decay=0.3, nesterov=True),
    ],
]


def name_of(groups: list[dict[str, Any]]) -> str:
    changing = f"{len(groups)}-groups-" if len(groups) > 1 else ""
    return changing + "-".join(name for name, value in groups[0].items() if value)


@pytest.mark.parametrize("groups", SGD, ids=name_of)
@pytest.mark.parametrize("history", [5, 4096])
def test_sgd_is_torchs_step_for_step(
    groups: list[dict[str, Any]], history: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_rows, "HISTORY", history)
    weight = a_table()
    whole = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.SGD([whole], **groups[0])
    ours = make_row_optimizer("sgd", weight, **groups[0])
    for step in range(40):
        group = {**groups[step // 6 % len(groups)]}
        group["lr"] *= 0.97**step
        rows = some_rows()
        grad = torch.randn(len(rows), D, dtype=FP64)
        whole.grad = dense(whole, rows, grad)
        theirs.param_groups[0].update(group)
        theirs.step()
        take_step(ours, rows, grad, group)
        read = some_rows()
        ours.catch_up(read)
        assert_close(weight[read], whole.detach()[read])
        assert len(ours._history) < history
    ours.settle(block_rows=4)
    assert_close(weight, whole.detach())
    if ours.states:
        assert_close(ours.states["momentum_buffer"], theirs.state[whole]["momentum_buffer"])
    assert ours.steps == 40
    assert ours.last.tolist() == [40] * C


def test_a_row_that_was_away_for_long() -> None:
    options = dict(lr=0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)
    weight = a_table(2, 3)
    whole = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.SGD([whole], **options)
    ours = make_row_optimizer("sgd", weight, **options)
    everyone, nobody = torch.arange(2), torch.arange(0)
    for step in range(1000):
        rows = nobody if step else everyone
        grad = torch.ones(len(rows), 3, dtype=FP64)
        whole.grad = dense(whole, rows, grad)
        theirs.step()
        take_step(ours, rows, grad, {})
    assert ours.last.tolist() == [1, 1]
    ours.settle()
    assert_close(weight, whole.detach())


def test_float32_is_rounded_once_however_long_a_row_was_away() -> None:
    """A decay of 1e-7 a step is below float32's half unit: step by step it would be lost."""
    weight = torch.linspace(1, 2, 64)[:, None].repeat(1, D)
    old = weight.double()
    ours = make_row_optimizer("sgd", weight, lr=1e-3, weight_decay=1e-5)
    for _ in range(1000):
        take_step(ours, torch.arange(0), torch.zeros(0, D), {})
    ours.settle()
    assert float((weight / (old * (1 - 1e-8) ** 1000) - 1).abs().max()) < 1e-7


# ---- adamw and adagrad --------------------------------------------------------------------------

RATES = (0.1, 0.03, 0.07)


def with_decay(whole: Tensor, lr: float, weight_decay: float) -> None:
    with torch.no_grad():
        whole.mul_(1 - lr * weight_decay)


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_is_sparse_adam_with_decoupled_decay(decay: float, maximize: bool) -> None:
    weight, betas, eps = a_table(), (0.8, 0.95), 1e-3
    whole = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.SparseAdam([whole], betas=betas, maximize=maximize)
    ours = make_row_optimizer(
        "adamw", weight, betas=betas, eps=eps, weight_decay=decay, maximize=maximize
    )
    for step in range(1, 25):
        rows, lr = some_rows(), RATES[step % 3]
        grad = torch.randn(len(rows), D, dtype=FP64)
        with_decay(whole, lr, decay)
        whole.grad = sparse(whole, rows, grad)
        # SparseAdam adds eps before v is corrected, AdamW after
        theirs.param_groups[0].update(lr=lr, eps=eps * (1 - betas[1] ** step) ** 0.5)
        theirs.step()
        take_step(ours, rows, grad, dict(lr=lr))
        assert_close(weight[rows], whole.detach()[rows])
    ours.settle()
    assert_close(weight, whole.detach())
    for name in ("exp_avg", "exp_avg_sq"):
        assert_close(ours.states[name], theirs.state[whole][name])


def test_adamw_with_every_row_is_torchs() -> None:
    weight = a_table()
    whole = torch.nn.Parameter(weight.clone())
    options = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    theirs = torch.optim.AdamW([whole], **options)
    ours = make_row_optimizer("adamw", weight, **options)
    for _ in range(20):
        whole.grad = torch.randn(C, D, dtype=FP64)
        theirs.step()
        ours.catch_up(slice(None))
        ours.begin({})
        ours.update(slice(0, 9), whole.grad[:9])
        ours.update(slice(9, C), whole.grad[9:])
        ours.end()
    assert_close(weight, whole.detach())


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("maximize", [False, True])
def test_adagrad_is_torchs_with_decoupled_decay(decay: float, maximize: bool) -> None:
    weight = a_table()
    whole = torch.nn.Parameter(weight.clone())
    options = dict(lr_decay=0.1, initial_accumulator_value=0.3, eps=1e-4, maximize=maximize)
    theirs = torch.optim.Adagrad([whole], **options)
    ours = make_row_optimizer("adagrad", weight, weight_decay=decay, **options)
    for step in range(24):
        rows, lr = some_rows(), RATES[step % 3]
        grad = torch.randn(len(rows), D, dtype=FP64)
        with_decay(whole, lr / (1 + step * 0.1), decay)
        whole.grad = sparse(whole, rows, grad)
        theirs.param_groups[0]["lr"] = lr
        theirs.step()
        take_step(ours, rows, grad, dict(lr=lr))
    ours.settle()
    assert_close(weight, whole.detach())
    assert_close(ours.states["sum"] + 0.3, theirs.state[whole]["sum"])


@pytest.mark.parametrize("forced", ["triton", "cuda"])
def test_a_backend_that_is_forced_for_the_loss_is_no_hindrance(forced: str) -> None:
    found = []
    for name in (forced, "bounded"):
        weight = torch.ones(C, D)
        ours = make_row_optimizer("adagrad", weight, weight_decay=0.1)
        with backends.use_backend(name):
            for rows in (torch.arange(3), torch.arange(2, 5)):
                take_step(ours, rows, torch.ones(3, D), {})
            ours.settle()
        found.append(weight)
    assert torch.allclose(*found, rtol=1e-6)


# ---- what is read and written -------------------------------------------------------------------


@rules
def test_sub_centres_are_rows_of_their_class(rule: str) -> None:
    flat = a_table(C, 6)
    deep = flat.view(C, 2, 3).clone()
    flat_ours = make_row_optimizer(rule, flat, **RULES[rule])
    deep_ours = make_row_optimizer(rule, deep, **RULES[rule])
    for _ in range(5):
        rows = some_rows()
        grad = torch.randn(len(rows), 6, dtype=FP64)
        take_step(flat_ours, rows, grad, {})
        take_step(deep_ours, rows, grad.view(-1, 2, 3), {})
    deep_ours.settle()
    flat_ours.settle()
    assert torch.equal(deep.view(C, 6), flat)
    assert all(state.shape == deep.shape for state in deep_ours.states.values())


@rules
@pytest.mark.parametrize("choosing", [("cpu",), ()], ids=["picked", "all-as-on-a-gpu"])
def test_a_row_catches_up_once_and_not_within_its_own_step(
    rule: str, choosing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_rows, "CHOOSING", choosing)
    weight = a_table()
    ours = make_row_optimizer(rule, weight, **RULES[rule])
    take_step(ours, torch.arange(C), torch.randn(C, D, dtype=FP64), {})
    take_step(ours, torch.tensor([3]), torch.ones(1, D, dtype=FP64), {})
    ours.catch_up(slice(0, 4))
    ours.begin({})
    ours.update(torch.tensor([2]), torch.ones(1, D, dtype=FP64))
    before = weight.clone()
    ours.catch_up(slice(0, 4))
    assert torch.equal(weight, before)
    ours.catch_up(torch.tensor([7, 2, 5]))
    changed = (weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [5, 7]
    assert ours.last[[2, 5, 9]].tolist() == [3, 2, 1]
    ours.end()
    assert ours.last[[2, 3, 5, 9]].tolist() == [3, 2, 2, 1]
    ours.settle()
    before = weight.clone()
    ours.settle()
    assert torch.equal(weight, before)


@rules
def test_without_decay_an_infinite_weight_stays(rule: str) -> None:
    weight = torch.full((2, D), torch.inf)
    ours = make_row_optimizer(rule, weight, **(RULES[rule] | dict(weight_decay=0.0)))
    take_step(ours, torch.arange(2), torch.ones(2, D), {})
    take_step(ours, torch.arange(0), torch.ones(0, D), {})
    ours.settle()
    assert bool((weight == torch.inf).all())


def test_steps_that_move_nothing_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without momentum and decay no row is visited, whatever the history's length."""
    monkeypatch.setattr(lazy_rows, "HISTORY", 4)
    monkeypatch.setattr(lazy_rows, "catch_up_rows_", None)
    weight = a_table()
    before = weight.clone()
    ours = make_row_optimizer("sgd", weight, lr=0.1)
    for _ in range(10):
        take_step(ours, torch.tensor([4]), torch.ones(1, D, dtype=FP64), {})
    assert ours.last.tolist() == [0] * 4 + [10] + [0] * (C - 5)
    ours.settle()
    before[4] -= 1
    assert torch.allclose(weight, before, rtol=1e-14)


@rules
def test_saved_and_loaded_goes_on_as_if_nothing_happened(rule: str) -> None:
    weight = a_table()
    ours = make_row_optimizer(rule, weight, **RULES[rule])
    parts = [some_rows() for _ in range(8)]
    steps = [(rows, torch.randn(len(rows), D, dtype=FP64)) for rows in parts]
    for step in steps[:5]:
        take_step(ours, *step, {})
    ours.settle()
    copy = torch.full_like(weight, torch.nan)
    loaded = make_row_optimizer(rule, copy, **RULES[rule])
    copy.copy_(weight)
    for name, state in loaded.states.items():
        state.copy_(ours.states[name])
    loaded.load(ours.steps)
    for step in steps[5:]:
        take_step(ours, *step, {})
        take_step(loaded, *step, {})
    ours.settle()
    loaded.settle()
    assert loaded.steps == 8
    assert torch.equal(copy, weight)


@rules
def test_an_empty_shard(rule: str) -> None:
    ours = make_row_optimizer(rule, torch.zeros(0, D), **RULES[rule])
    take_step(ours, torch.arange(0), torch.zeros(0, D), {})
    ours.settle()
    assert ours.steps == 1


# ---- bad input ----------------------------------------------------------------------------------

W = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("name", "given", "error", "words"),
    [
        ("rmsprop", {}, ValueError, "optimizer: expected one of sgd, adamw, adagrad"),
        ("sgd", dict(weight=torch.zeros(4)), ValueError, r"weight: expected a contiguous table"),
        ("sgd", dict(weight=torch.zeros(3, 4).T), ValueError, "weight: expected a contiguous"),
        ("sgd", dict(state_dtype=FP64), TypeError, "state_dtype: expected torch.float32 or"),
        ("sgd", dict(betas=(0.9, 0.9)), TypeError, "betas: expected one of lr, momentum"),
        ("sgd", dict(lr=-1), ValueError, "lr: expected a value >= 0, got -1"),
        ("sgd", dict(momentum=-0.1), ValueError, "momentum: expected a value >= 0"),
        ("sgd", dict(nesterov=True), ValueError, "nesterov: expected a momentum"),
        (
            "sgd",
            dict(nesterov=True, momentum=0.9, dampening=0.1),
            ValueError,
            "dampening: expected 0 with nesterov",
        ),
        ("adamw", dict(betas=(0.9, 1.0)), ValueError, "betas: expected two values in"),
        ("adamw", dict(eps=-1.0), ValueError, "eps: expected a value >= 0"),
        ("adagrad", dict(lr_decay=-1.0), ValueError, "lr_decay: expected a value >= 0"),
        (
            "adagrad",
            dict(allocate=lambda name, shape, dtype: torch.zeros(2, 3)),
            ValueError,
            r"allocate: expected a contiguous \(4, 3\)",
        ),
    ],
)
def test_bad_input(name: str, given: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        make_row_optimizer(name, **{"weight": W} | given)


def test_calls_out_of_order() -> None:
    ours = make_row_optimizer("sgd", W.clone(), momentum=0.9)
    with pytest.raises(RuntimeError, match="update: expected begin"):
        ours.update(slice(0, 1), torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="end: expected begin"):
        ours.end()
    ours.begin({})
    ours.update(slice(0, 1), torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="update: a row had its part in step 1"):
        ours.update(torch.tensor([2, 0]), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="begin: the step before"):
        ours.begin({})
    with pytest.raises(IndexError, match=r"rows: expected values in \[0, 4\)"):
        ours.update(torch.tensor([4]), torch.ones(1, 3))
    with pytest.raises(ValueError, match="rows: expected distinct"):
        ours.update(torch.tensor([1, 1]), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"rows: expected shape \(2,\)"):
        ours.update(torch.tensor([1]), torch.ones(2, 3))
    with pytest.raises(ValueError, match="steps: expected a count"):
        ours.load(-1)
    ours.end()
    take_step(ours, torch.arange(0), torch.ones(0, 3), {})
    ours.begin({})
    with pytest.raises(RuntimeError, match="update: expected catch_up.* stands at step 0 of 2"):
        ours.update(torch.tensor([2]), torch.ones(1, 3))

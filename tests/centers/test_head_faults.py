"""What goes wrong within a step: exceptions, numbers that are not finite, a scaler's factor."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from class_center_cases import Twin, batch, head
from torch import Tensor

from fused_losses.centers import ClassCenters
from fused_losses.centers.lazy_rows import RowOptimizer

BOTH = pytest.mark.parametrize("update", ["backward", "step"])


def take(found: ClassCenters, x: Tensor, y: Tensor) -> None:
    found(x, y).backward()
    found.optimizer.step()


@BOTH
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, ValueError])
def test_what_breaks_before_a_row_is_written_leaves_no_trace(
    update: str, rate: float, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = Twin(rate=rate, update=update)
    twin.steps(2)
    with monkeypatch.context() as patch:
        patch.setattr(RowOptimizer, "update", broken_after(0, error))
        with pytest.raises(error, match="in the middle"):
            take(twin.head, *batch(2))
    twin.head.optimizer.zero_grad()
    twin.steps(3)
    twin.check()


def test_a_heads_zero_grad_forgets_what_waits() -> None:
    found = head(update="step", optimizer="sgd")
    before = found.weight.clone()
    found(*batch(0)).backward()
    found.zero_grad()
    found.optimizer.step()
    assert torch.equal(found.weight, before) and found.step_count == 0


def broken_after(count: int, error: type[BaseException]) -> Any:
    real, left = RowOptimizer.update, [count]

    def update(self: RowOptimizer, *given: Any) -> None:
        if not left[0]:
            raise error("in the middle")
        left[0] -= 1
        real(self, *given)

    return update


@BOTH
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_what_breaks_later_is_a_step_of_the_rows_that_it_reached(
    update: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the first chunk step; to the others it is a step that they took no part in."""
    twin = Twin(rate=rate, update=update)
    twin.steps(2)
    twin.head.settle()
    with monkeypatch.context() as patch:
        patch.setattr(RowOptimizer, "update", broken_after(1, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            take(twin.head, *batch(2))
    twin.head.optimizer.zero_grad()
    assert twin.head.step_count == 3
    reached = twin.head._updates.rows.last == 3
    assert 0 < int(reached.sum()) < len(reached)
    twin.optimizer.zero_grad()
    twin.loss(*batch(2)).backward()
    twin.weight.grad[~reached] = 0
    twin.optimizer.step()
    twin.done += 1
    twin.steps(3)
    twin.check()


# ---- numbers that are not finite ----------------------------------------------------------------

BROKEN = ("a NaN in a row", "an infinite row", "a NaN in the gradient")


@BOTH
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("name", BROKEN)
def test_no_number_that_is_not_finite_is_written(
    name: str, nonfinite: str, clip: float | None, update: str
) -> None:
    found = head(optimizer="sgd", optimizer_options=dict(lr=0.1, momentum=0.9), update=update,
                 nonfinite=nonfinite, max_grad_norm=clip)  # fmt: skip
    take(found, *batch(0))
    before, buffer = found.weight.clone(), found.row_states()["momentum_buffer"].clone()
    x, y = batch(1)
    with torch.no_grad():
        if "row" in name:
            x[1, 2] = math.nan if "NaN" in name else math.inf

    def step() -> None:
        loss = found(x, y)
        (loss if "row" in name else loss * math.nan).backward()
        found.optimizer.step()

    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="no row was changed"):
            step()
        found.optimizer.zero_grad()
        assert found.skipped_steps == 0
    else:
        step()
        assert found.skipped_steps == 1
    assert found.step_count == 1 and torch.equal(found.weight, before)
    assert torch.equal(found.row_states()["momentum_buffer"], buffer)
    take(found, *batch(2))
    assert found.step_count == 2 and bool(found.weight.isfinite().all())


# ---- factors ------------------------------------------------------------------------------------


def test_a_factor_is_of_what_waits_and_goes_with_it() -> None:
    twin = Twin(update="step")
    found = twin.head
    assert found.grad_norm() == 0
    found.scale_grad(3.0)  # of nothing
    found(*batch(0)).backward()
    found.scale_grad(1 / 65536)
    found.optimizer.zero_grad()
    assert found.grad_norm() == 0
    twin.steps(2)
    (found(*batch(8)) * 4).backward()
    found.scale_grad(0.25)
    found(*batch(9)).backward()  # not scaled: it came later
    twin.optimizer.zero_grad()
    twin.loss(*batch(8)).backward()
    twin.loss(*batch(9)).backward()
    assert found.grad_norm() == pytest.approx(float(twin.weight.grad.norm()), rel=1e-10)
    found.optimizer.step()
    twin.optimizer.step()
    twin.done += 1
    twin.steps(2)
    twin.check()


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_steps_the_rows(unscale: bool) -> None:
    """Backward with 65,536 times the loss; an overflow is skipped and lowers the scale."""
    twin, scaler = Twin(update="step"), torch.amp.GradScaler("cpu")
    for step in range(4):
        x, y = batch(step)
        scaler.scale(twin.head(x, y)).backward()
        if unscale:
            scaler.unscale_(twin.head.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(
                [p for g in twin.head.optimizer.param_groups for p in g["params"]], 1.0
            )
            assert norm < 1e-6  # the table's own norm is max_grad_norm's or grad_norm()'s
        scaler.step(twin.head.optimizer)
        scaler.update()
        twin.head.optimizer.zero_grad()
        twin.optimizer.zero_grad()
        twin.loss(x, y).backward()
        twin.optimizer.step()
        twin.done += 1
    twin.check()
    (scaler.scale(twin.head(*batch(4))) * math.inf).backward()
    scaler.step(twin.head.optimizer)
    scaler.update()
    twin.head.optimizer.zero_grad()
    assert scaler.get_scale() == 32768
    twin.check()
    twin.steps(2)


def test_inside_backward_the_scale_is_known_or_refused() -> None:
    twin, scaler = Twin(), torch.amp.GradScaler("cpu")
    x, y = batch(0)
    before = twin.head.weight.clone()
    with pytest.raises(RuntimeError, match="expected the loss's own gradient, at most 1024, got"):
        scaler.scale(twin.head(x, y)).backward()
    assert torch.equal(twin.head.weight, before) and twin.head.step_count == 0
    twin.head.loss_scale = scaler.get_scale
    for _ in range(3):
        x, y = batch(twin.done)
        scaler.scale(twin.head(x, y)).backward()
        twin.optimizer.zero_grad()
        twin.loss(x, y).backward()
        twin.optimizer.step()
        twin.done += 1
    twin.check()
    with pytest.raises(TypeError, match="loss_scale: expected a number or a function"):
        twin.head.loss_scale = "65536"
    twin.head.loss_scale = 0.0
    with pytest.raises(ValueError, match="loss_scale: expected a value > 0"):
        twin.head(*batch(0)).backward()
    with pytest.raises(RuntimeError, match="loss_scale: expected an optimizer with update"):
        Twin(update="step").head.loss_scale = 2.0
    with pytest.raises(ValueError, match="nonfinite"):
        head(optimizer="sgd", nonfinite="ignore")


@pytest.mark.parametrize("clip", [None, 1e3])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_learns_of_steps_inside_backward(unscale: bool, clip: float | None) -> None:
    """They were taken or skipped by then; an overflow lowers the scale, and only once."""
    twin, scaler = Twin(), torch.amp.GradScaler("cpu", growth_interval=100)
    twin.head.loss_scale = scaler.get_scale
    twin.head.max_grad_norm = clip
    twin.head._updates.nonfinite = "skip"
    for step in range(6):
        overflow = step in (1, 3)
        x, y = batch(twin.done)
        loss = scaler.scale(twin.head(x, y))
        (loss * math.inf if overflow else loss).backward()
        if unscale:
            scaler.unscale_(twin.head.optimizer)
        scaler.step(twin.head.optimizer)
        scaler.update()
        if step == 1:  # a skipped step's word goes with zero_grad, or with the next backward
            twin.head.optimizer.zero_grad()
        if overflow:
            continue
        twin.optimizer.zero_grad()
        twin.loss(x, y).backward()
        twin.optimizer.step()
        twin.done += 1
    assert scaler.get_scale() == 65536 / 4
    assert twin.head.skipped_steps == 2 and twin.head.step_count == 4
    twin.check()
    scaler.scale(twin.head.eval()(*batch(0))).backward()  # no step: nothing to tell
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(twin.head.optimizer)


def test_a_grad_scaler_learns_of_an_overflow_that_raised() -> None:
    found, scaler = Twin().head, torch.amp.GradScaler("cpu")
    found.loss_scale = scaler.get_scale
    with pytest.raises(FloatingPointError, match="no row was changed"):
        (scaler.scale(found(*batch(0))) * math.nan).backward()
    scaler.step(found.optimizer)
    scaler.update()
    assert scaler.get_scale() == 32768 and found.step_count == 0


@BOTH
@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scale_that_overflows_the_tables_type_stays_out_of_it(
    update: str, clip: float | None, dtype: torch.dtype
) -> None:
    """65,536 is no number of float16; a power of two rounds nowhere: bitwise without the scale."""
    options = dict(optimizer="sgd", update=update, max_grad_norm=clip, dtype=dtype)
    plain, scaled = head(**options), head(**options)
    scaler = torch.amp.GradScaler("cpu", growth_interval=100)
    if update == "backward":
        scaled.loss_scale = scaler.get_scale
    for step in range(2):
        for part in range(1 if update == "backward" else 2):
            given, y = batch(2 * step + part)
            x, twin = (given.detach().float().requires_grad_() for _ in range(2))
            scaler.scale(scaled(x, y)).backward()
            plain(twin, y).backward()
            assert x.grad is not None and twin.grad is not None
            assert torch.equal(x.grad, twin.grad * 65536)
        scaler.step(scaled.optimizer)
        plain.optimizer.step()
        scaler.update()
        scaled.optimizer.zero_grad()
        plain.optimizer.zero_grad()
        assert torch.equal(scaled.weight, plain.weight)
    assert not torch.equal(scaled.weight, head(**options).weight)
    assert scaler.get_scale() == 65536 and bool(plain.weight.isfinite().all())


# ---- steps that are not what was meant ----------------------------------------------------------


def test_backwards_that_were_meant_to_add_up_are_told_once() -> None:
    found = head(optimizer="sgd")

    def steps(backwards: int) -> None:
        for step in range(backwards):
            found(*batch(step)).backward()
        found.optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            steps(1)
        found(*batch(0)).backward()
        found.optimizer.zero_grad()  # whoever clears in between adds nothing up
        steps(1)
        with torch.no_grad():
            found(*batch(0))
        steps(1)
    with pytest.warns(UserWarning, match="3 backwards since .* were as many steps.*update='step'"):
        steps(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(3)
        found = head(optimizer="sgd", update="step")
        steps(3)


UNFIT: dict[str, Any] = {
    "SGD(weight_decay=0.1)": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "Adagrad(weight_decay=0.1)": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "Adam(weight_decay=0)": torch.optim.Adam,
    "AdamW(weight_decay=0.01)": torch.optim.AdamW,
    "RMSprop(weight_decay=0)": torch.optim.RMSprop,
}
FIT: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "SparseAdam": torch.optim.SparseAdam,
}


@pytest.mark.parametrize("name", [*UNFIT, *FIT])
def test_an_optimizer_that_cannot_step_a_sample_is_told_what_can(name: str) -> None:
    """The head's own refusal, before another parameter of the same optimiser has moved."""
    for found in (head(sample_rate=0.4), copy.deepcopy(head(sample_rate=0.4))):
        other = torch.nn.Parameter(torch.ones(3))
        params = [found.weight, other][: 1 if name == "SparseAdam" else 2]
        optimizer = {**UNFIT, **FIT}[name](params)
        before = found.weight.detach().clone()
        other.grad = torch.ones(3)
        found(*batch(0)).backward()
        if name in FIT:
            optimizer.step()
            assert not torch.equal(found.weight, before)
            continue
        with pytest.raises(RuntimeError) as told:
            optimizer.step()
        assert str(told.value).startswith(f"{name} cannot step ClassCenters.weight")
        assert "without weight decay" in str(told.value)
        assert torch.equal(found.weight, before) and torch.equal(other, torch.ones(3))
        found.zero_grad()
        found.eval()(*batch(0)).backward()  # every row's
        optimizer.step()
        assert not torch.equal(found.weight, before)


def test_sparse_gradients_of_others_are_theirs() -> None:
    """An embedding's under SGD with weight decay: torch's own message."""
    head(sample_rate=0.4)(*batch(0)).backward()
    table = torch.nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse") as told:
        torch.optim.SGD(table.parameters(), lr=0.1, weight_decay=0.1).step()
    assert "ClassCenters" not in str(told.value)

"""Several backwards of one step: what they add up to, and in which type."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from class_center_cases import C, batch, head
from dense_head import MARGIN, SCALE, DenseHead
from torch import Tensor

from fused_losses.centers import ClassCenters
from fused_losses.centers.sampling import sample
from fused_losses.margins import CosFace

NARROW = [torch.bfloat16, torch.float16]


def narrow_head(dtype: torch.dtype, **more: Any) -> ClassCenters:
    """Its momentum after one step is the step's gradient, in float32."""
    settings = dict(lr=0.1, momentum=0.9)
    return head(optimizer="sgd", optimizer_options=settings, dtype=dtype, update="step", **more)


def gradient(dtype: torch.dtype, *steps: int, **more: Any) -> Tensor:
    found = narrow_head(dtype, **more)
    for step in steps:
        x, y = batch(step)
        found(x.detach().float().requires_grad_(), y).backward()
    found.optimizer.step()
    return found.row_states()["momentum_buffer"]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_gradients_of_16_bits_add_up_in_32(dtype: torch.dtype, rate: float) -> None:
    parts = [gradient(dtype, step, sample_rate=rate) for step in (0, 1)]
    if rate < 1:  # alike for both: the drawn classes are those of a step
        assert bool((parts[0] == 0).any())
    found, expected = gradient(dtype, 0, 1, sample_rate=rate), parts[0] + parts[1]
    assert torch.equal(found, expected)
    assert not torch.equal(expected, expected.to(dtype).float()), "a sum that 16 bits hold"


@pytest.mark.parametrize("dtype", NARROW)
def test_a_clipping_rounds_no_gradient_to_16_bits(dtype: torch.dtype) -> None:
    whole = gradient(dtype, 0)
    norm = float(whole.double().norm())
    found = gradient(dtype, 0, max_grad_norm=norm / 3)
    expected = whole * (norm / 3 / (norm + 1e-6))
    torch.testing.assert_close(found, expected, rtol=2**-22, atol=0)
    assert not torch.equal(found, found.to(dtype).float())


# ---- every=: inside backward --------------------------------------------------------------------

SETTINGS = dict(lr=0.5, momentum=0.9, weight_decay=0.01)


def counting(every: int, rate: float = 1.0, **more: Any) -> ClassCenters:
    return head(
        optimizer="sgd", optimizer_options=SETTINGS, every=every, sample_rate=rate, seed=3,
        margin=CosFace(MARGIN), scale=SCALE, **more,
    )  # fmt: skip


class Pair:
    """A head that steps at every third backward, and the whole table in float64."""

    def __init__(self, rate: float, **more: Any) -> None:
        self.found, self.rate = counting(3, rate, **more), rate
        self.dense = DenseHead(self.found.weight, "sgd", SETTINGS)

    def backward(self, number: int, scaler: torch.amp.GradScaler | None = None) -> None:
        x, y = batch(number)
        twin = x.detach().clone().requires_grad_()
        drawn = sample(0, C, self.rate, seed=3, step=self.dense.steps) if self.rate < 1 else None
        part = self.dense.taking_part(y, drawn)
        loss, expected = self.found(x, y) / 3, self.dense.loss(twin, y, part) / 3
        (loss if scaler is None else scaler.scale(loss)).backward()
        factor = 1.0 if scaler is None else scaler.get_scale()
        (d_twin,) = torch.autograd.grad(expected, twin, retain_graph=True)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, d_twin * factor, rtol=1e-10, atol=1e-10)
        self.dense.backward(expected, part)

    def check(self, steps: int) -> None:
        assert self.found.step_count == self.dense.steps == steps
        expected = self.dense.weight.detach()
        torch.testing.assert_close(self.found.weight, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_so_many_backwards_are_one_step(rate: float, clip: float | None) -> None:
    pair = Pair(rate, max_grad_norm=clip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of "as many steps"
        for step in range(4):
            for number in range(3):
                pair.check(step)
                pair.backward(3 * step + number)
            pair.dense.step(clip)
            pair.check(step + 1)
            pair.found.optimizer.step()  # nothing waits
    pair.check(4)


def test_a_step_before_the_last_backward_and_a_word_to_forget() -> None:
    pair = Pair(0.3)
    pair.backward(0)
    pair.backward(1)
    pair.found.optimizer.step()  # an epoch's end
    pair.dense.step()
    pair.check(1)
    pair.backward(2)
    pair.found.optimizer.zero_grad()
    pair.dense.forget()
    for number in range(3, 6):
        pair.check(1)
        pair.backward(number)
    pair.dense.step()
    pair.check(2)
    pair.backward(6)
    pair.found.every = 1  # what waits is of the next step
    pair.backward(7)
    pair.dense.step()
    pair.check(3)
    pair.backward(8)
    pair.dense.step()
    pair.check(4)


def test_a_scaler_over_accumulated_backwards() -> None:
    """Its factor leaves each gradient as it comes; an overflow of one leaves out all of a step."""
    pair, scaler = Pair(1.0, nonfinite="skip"), torch.amp.GradScaler("cpu", growth_interval=100)
    pair.found.loss_scale = scaler.get_scale
    for step in range(3):
        for number in range(3):
            overflow = step == 1 and number == 1
            if overflow:
                (scaler.scale(pair.found(*batch(0))) * math.inf).backward()
            else:
                pair.backward(3 * step + number, scaler)
        scaler.step(pair.found.optimizer)
        scaler.update()
        if step == 1:
            pair.dense.forget()
        else:
            pair.dense.step()
        pair.check(1 + step // 2)
    assert scaler.get_scale() == 32768 and pair.found.skipped_steps == 1


def test_an_accumulation_that_is_refused_is_over() -> None:
    pair = Pair(1.0)
    pair.backward(0)
    pair.backward(1)
    with pytest.raises(FloatingPointError, match="no row was changed"):
        (pair.found(*batch(2)) * math.nan).backward()
    pair.dense.forget()
    for number in range(3):
        pair.check(0)
        pair.backward(number)
    pair.dense.step()
    pair.check(1)


def test_what_every_stands_beside() -> None:
    for options in ({}, dict(optimizer="sgd", update="step")):
        with pytest.raises(ValueError, match="every: expected 1 beside"):
            head(every=2, **options)
        head(every=1, **options)
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="every: expected"):
            head(optimizer="sgd", every=wrong)

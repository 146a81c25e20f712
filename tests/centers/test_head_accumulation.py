"""Several backwards of one step: what they add up to, and in which type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from class_center_cases import batch, head
from torch import Tensor

from fused_losses.centers import ClassCenters

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

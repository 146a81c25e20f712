"""Lazy row optimisers over 16-bit tables: stochastic rounding, alike whatever the blocks."""

from __future__ import annotations

import pytest
import row_optimizer_cases as cases
import torch
from row_optimizer_cases import (
    BF16,
    FP16,
    FP64,
    RULES,
    D,
    rules,
    take_step,
)
from torch import Tensor

from fused_losses.base.rounding import random_bits, rounding_key, stochastic
from fused_losses.centers.optimizers import make_row_optimizer
from fused_losses.primitives.row_update import bounded

backend, _small_blocks = cases.backend, cases._small_blocks  # fixtures


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    x = torch.randn(60, 300) * torch.logspace(-11, 4, 300)
    total = torch.zeros(60, 300, dtype=FP64)
    for seed in range(200):
        bits = random_bits(rounding_key(seed), torch.arange(60), 0, 300)
        up_or_down = stochastic(x, dtype, bits)
        total += up_or_down.double()
        exact = x.to(dtype).float()
        assert torch.equal(stochastic(exact, dtype, bits), exact.to(dtype))
    least = 2.0**-14 if dtype == FP16 else 1e-38
    digits = 10 if dtype == FP16 else 7
    unit = (x.abs().clamp_min(least).log2().floor() - digits).exp2().double()
    assert float(((up_or_down.double() - x) / unit).abs().max()) < 1
    error = (total / 200 - x) / unit
    # a fair coin's deviation is at most 1/2
    assert abs(float(error.mean())) < 5 * 0.5 / (200 * x.numel()) ** 0.5
    assert float(error.abs().max()) < 6 * 0.5 / 200**0.5


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rounding_of_what_has_no_neighbours(dtype: torch.dtype) -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 65504.0, 2.0**-24, 1e-45]])
    bits = torch.full((1, 8), -1, dtype=torch.int32)
    got = stochastic(x, dtype, bits)[0]
    assert got[:2].tolist() == [torch.inf, -torch.inf]
    assert got[2].isnan()
    assert got[3:5].tolist() == [0, 0]
    assert got.signbit()[:5].tolist() == [False, True, False, False, True]
    assert bool(got[5:].isfinite().all())


def test_the_bits_are_fair_and_differ() -> None:
    for key, table in ((rounding_key(0, 1), 0), (rounding_key(-1, 5, 1), 2)):
        bits = random_bits(key, torch.arange(500) + (1 << 40), table, 64)
        for bit in range(32):
            assert abs(float((bits >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / 32000**0.5
        assert len(bits.unique()) > 0.9999 * bits.numel()


def run_narrow(rule: str, seed: int, *, shards: int = 1, tall: bool = True) -> list[Tensor]:
    """A table in bfloat16 after some steps, with its states; sharded, or in other blocks."""
    weight = torch.linspace(1, 2, 24 * D).view(24, D).to(BF16)
    found: list[list[Tensor]] = []
    for start in range(0, 24, 24 // shards):
        part = weight[start : start + 24 // shards].clone()
        ours = make_row_optimizer(rule, part, state_dtype=BF16, seed=seed, **RULES[rule])
        ours.row_offset = start
        for step in range(4):
            rows = torch.arange(24)[step::2]
            rows = rows[(rows >= start) & (rows < start + len(part))]
            grad = torch.sin(rows[:, None] * 7.0 + torch.arange(D) + step)
            order = torch.arange(len(rows)) if tall else torch.randperm(len(rows))
            take_step(ours, rows[order] - start, grad[order], {})
        ours.settle()
        found.append([part, *ours.states.values()])
    return [torch.cat(tables) for tables in zip(*found, strict=True)]


@rules
def test_the_bits_do_not_depend_on_blocks_or_shards(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = run_narrow(rule, seed=3)
    for other in (run_narrow(rule, 3, tall=False), run_narrow(rule, 3, shards=3)):
        assert all(torch.equal(a, b) for a, b in zip(once, other, strict=True))
    monkeypatch.setattr(bounded, "BLOCK_BYTES", 1)
    again = run_narrow(rule, 3)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], run_narrow(rule, 4)[0])


def test_small_steps_add_up_in_bfloat16() -> None:
    """Each is a hundredth of a unit in the last place: rounded to nearest nothing would move."""
    start, count, width = 1.5, 200, 400
    for option, moved in ((None, 1.0), (False, 0.0)):
        weight = torch.full((4, width), start, dtype=BF16)
        ours = make_row_optimizer("sgd", weight, lr=2.0**-7 / 100, stochastic_rounding=option)
        for _ in range(count):
            take_step(ours, torch.arange(4), torch.ones(4, width, dtype=BF16), {})
        mean = float((start - weight.double()).mean()) / (count * 2.0**-7 / 100)
        assert abs(mean - moved) < 0.06

"""Hard data where every block's float32 factors are split, however small: CPUs with tile registers.

Blocks of draws are too small for it as a rule; `split_test.cpp` has the products by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from draws import CASES, calls, judge, unjudged
from fuzz_settings import draws_of

from fused_losses import backends, info_nce, linear_cross_entropy
from fused_losses.backends.cpu import capability as cpu

if not backends.unavailable("cpu"):
    built = cpu.extension()
THREADS = torch.get_num_threads()
splits = not backends.unavailable("cpu") and built.capability() == "amx_bf16"
pytestmark = pytest.mark.skipif(not splits, reason="no CPU with AMX, or no kernels for it")


@pytest.fixture(autouse=True)
def all_split() -> Iterator[None]:
    built.split_blocks(1)
    yield
    built.split_blocks(None)


@pytest.mark.parametrize("name", list(CASES))
def test_hard_data(name: str) -> None:
    case = CASES[name]
    for draw in draws_of(name, 2, lambda draw: not unjudged(case, draw)):
        compiled = [call for call in calls(case, draw) if call.backend == "cpu"]
        for verdict in judge(case, draw, compiled):
            assert verdict.share <= 1, (draw, verdict)


def test_no_other_kernels_split() -> None:
    built.force_capability("avx512")
    try:
        with pytest.raises(ValueError, match="avx512 splits no factors"):
            built.split_blocks(1)
    finally:
        built.force_capability(None)


def test_the_same_bits_on_any_number_of_threads() -> None:
    """A block's parts, and what they are scaled by, are its own."""
    made = torch.Generator().manual_seed(0)
    x, y = (torch.randn(700, 130, generator=made) * 1e-12 for _ in "xy")
    found = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            loss = info_nce(a, b, temperature=1e-22, symmetric=True, backend="cpu")
            loss.backward()
            found.append((loss.detach(), a.grad, b.grad))
    finally:
        torch.set_num_threads(THREADS)
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_spoils_no_other(value: float) -> None:
    made = torch.Generator().manual_seed(0)
    x, w = torch.randn(80, 70, generator=made), torch.randn(300, 70, generator=made)
    labels = torch.randint(300, (80,), generator=made)
    clean = linear_cross_entropy(x, w, labels, reduction="none", backend="cpu")
    x[5, 66] = value
    spoilt = linear_cross_entropy(x, w, labels, reduction="none", backend="cpu")
    assert not spoilt[5].isfinite()
    others = torch.arange(80) != 5
    torch.testing.assert_close(spoilt[others], clean[others], rtol=1e-6, atol=1e-6)

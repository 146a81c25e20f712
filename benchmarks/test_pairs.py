"""pytest-benchmark rows of the cases over pairs, as test_margin_softmax.py."""

from __future__ import annotations

import pytest
from test_margin_softmax import DEVICE, benchmark_step

from fused_losses.bench.micro import pair_cases

N, D = 2048, 256
CASES = {name: make(N, D, DEVICE) for name, make in pair_cases.BY_SHAPE.items()}
CASES["maxsim"] = pair_cases.maxsim(q=32, lq=32, b=128, ld=128, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "provider"), [(name, p) for name, case in CASES.items() for p in case.providers]
)
def test_pairs(benchmark, name: str, provider: str) -> None:
    benchmark_step(benchmark, CASES[name], provider)

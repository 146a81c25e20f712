"""pytest-benchmark rows of the cases over distances, as test_margin_softmax.py."""

from __future__ import annotations

import pytest
from test_margin_softmax import DEVICE, benchmark_step

from fused_losses.bench.micro import distance_cases

N, D = 1024, 128
SLOW = ("scipy", "torchpairwise", "N^3")
CASES = {
    name: make(n=N, d=D, device=DEVICE)
    for name, make in {**distance_cases.MATRICES, **distance_cases.BATCHES}.items()
}
CASES["topk"] = distance_cases.topk(n=256, m=20_000, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        (name, provider)
        for name, case in CASES.items()
        for provider in case.providers
        if not any(word in provider for word in SLOW)
    ],
)
def test_distances(benchmark, name: str, provider: str) -> None:
    benchmark_step(benchmark, CASES[name], provider)

"""pytest-benchmark rows of the same cases as `fused-losses bench`, one group a case.

The paired ratios are `fused-losses bench`'s; these rows give the spread of each provider.
"""

from __future__ import annotations

import pytest
import torch

from fused_losses.bench import measure
from fused_losses.bench.heads import cases as head_cases
from fused_losses.bench.micro import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(256, 20_000, 512), (64, 50_000, 128)]
CASES = {f"B{n}-C{c}-D{d}": cases.margin_softmax(n, c, d, DEVICE) for n, c, d in SHAPES}


def benchmark_step(benchmark, case: cases.Case, provider: str) -> None:
    step = case.providers[provider]
    case.clear()
    step()
    case.clear()
    benchmark.group = case.title
    benchmark.extra_info["extra_mib"] = max(0.0, measure.peak_mib(step) - case.gradients_mib)
    benchmark.extra_info["flops_floor"] = case.flops
    benchmark.extra_info["bytes_floor"] = case.bytes
    benchmark.pedantic(step, setup=case.clear, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(
    ("shape", "provider"), [(s, p) for s, case in CASES.items() for p in case.providers]
)
def test_margin_softmax(benchmark, shape: str, provider: str) -> None:
    benchmark_step(benchmark, CASES[shape], provider)


HEAD = head_cases.class_centers(256, 20_000, 512, DEVICE)


@pytest.mark.parametrize("provider", HEAD.providers)
def test_class_centers(benchmark, provider: str) -> None:
    benchmark_step(benchmark, HEAD, provider)

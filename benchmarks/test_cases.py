"""The table of `fused-losses bench` at small sizes: a group a case, a row a provider.

Nothing is measured in a second way: the first row of a case has all its providers measured in turn
(`measure.paired`), and each row hands pytest-benchmark the times that were found then, beside the
memory, the floor with the share of it that was reached by this machine's peaks (measured first, and
told in the record's machine information), and, of ours, the paired ratio against every rival.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fused_losses.bench import host, measure, small
from fused_losses.bench.table import CASES, SIZES, title

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 5
MADE = {
    title(name, shape): entry.case(shape, DEVICE)
    for name, entry in CASES.items()
    for shape in SIZES[entry.sizes].small
}
# the suite of small batches, at two of its sizes
MADE |= {
    title(name, shape): small.chosen(CASES[name].case(shape, DEVICE))
    for name, shape in small.SHAPES
    if shape[0] in (64, 256)
}
NOW = [0.0]


def clock() -> float:
    """Stands still, but for the times that were measured."""
    return NOW[0]


@cache
def results(name: str) -> dict[str, measure.Result]:
    """Of every provider of a case."""
    host.peaks(DEVICE)
    found = measure.paired(MADE[name], ROUNDS, device=DEVICE)
    return {result.name: result for result in found}


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(
    ("name", "provider"), [(name, p) for name, case in MADE.items() for p in case.providers]
)
def test_case(benchmark: BenchmarkFixture, name: str, provider: str) -> None:
    case, found = MADE[name], results(name)
    result = found[provider]
    assert result.error is None, result.error
    benchmark.group = case.title
    low = host.in_low(case.title, provider)
    floor = host.floor_ms(host.peaks(DEVICE), case.flops, case.bytes, low)
    benchmark.extra_info |= {
        "extra_mib": result.extra_mib,
        "flops_floor": case.flops,
        "bytes_floor": case.bytes,
        "floor_ms": floor,
        "share_of_floor": floor / result.median_ms,
    }
    if provider in case.ours:
        rivals = (r for r in found.values() if r.name not in case.ours and not r.error)
        benchmark.extra_info["ratios"] = {r.name: measure.paired_ratio(result, r) for r in rivals}
    times = iter(result.times_ms)

    def pass_by() -> None:
        NOW[0] += next(times) / 1e3

    benchmark.pedantic(pass_by, rounds=len(result.times_ms))

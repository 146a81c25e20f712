"""Fits and cliffs on times that are known, and every primitive's steps."""

from __future__ import annotations

import pytest
import torch
from places import ROOT

from fused_losses.bench import growth
from fused_losses.bench.growth_cases import SWEEPS, GrowthSweep

PRIMITIVES = {at.parent.name for at in (ROOT / "fused_losses" / "primitives").glob("*/op.py")}


def test_every_primitive_grows() -> None:
    assert set(SWEEPS) == PRIMITIVES


@pytest.mark.parametrize("name", SWEEPS)
def test_a_step_runs_at_both_ends_of_ragged_sizes(name: str) -> None:
    sweep = SWEEPS[name]
    for axis in sweep.ragged:
        (_, small), *_, (_, large) = sweep.points(axis)
        for sizes in (small, large):
            fewer = {"C": min(sizes.get("C", 0), 50), "M": min(sizes.get("M", 0), 100)}
            step = sweep.make(sizes | {k: v for k, v in fewer.items() if k in sizes}, "cpu")
            step()
            step()


def test_a_power_is_fitted() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    slope, residual, _ = growth.fit(sizes, [3 * s**1.5 for s in sizes])
    assert slope == pytest.approx(1.5) and residual == pytest.approx(0, abs=1e-9)
    assert growth.fit(sizes, [5 + 2 * s for s in sizes])[2] == pytest.approx(5)
    assert growth.fit(sizes, [1, 2, 4, 16])[1] > 0.2


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ([1.0, 2.0, 3.0, 4.0], []),
        ([1.0, 1.0, 1.0, 1.0], []),
        # within, at the first and at the last
        ([1.0, 3.1, 3.0, 4.0], [1]),
        ([3.1, 2.0, 3.0, 4.0], [0]),
        ([1.0, 2.0, 3.0, 6.1], [3]),
        ([1.0, 2.0, 3.0, 5.9], []),
    ],
)
def test_a_cliff_is_out_of_line_with_its_neighbours(times: list[float], found: list[int]) -> None:
    assert growth.cliffs([1, 2, 3, 4], times) == found


def test_a_doubtful_time_is_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    # the third time is disturbed at first, the last is a cliff
    first, again = iter([1.0, 2.0, 30.0, 4.0, 50.0]), {i: float(i) for i in range(1, 5)} | {5: 50.0}
    seen: list[int] = []

    def least_ms(step: object) -> float:
        at = step()  # pyright: ignore[reportCallIssue]
        seen.append(at)
        return next(first, again[at])

    monkeypatch.setattr(growth, "least_ms", least_ms)
    sweep = GrowthSweep(lambda sizes, device: lambda: sizes["N"], {}, {"N": (1, 2, 3, 4, 5)})
    threads = torch.get_num_threads()
    (found,) = growth.swept("cpu", ["one"], lambda text: None, {"one": sweep})
    assert torch.get_num_threads() == threads
    curve = found["curves"][0]
    assert seen[:9] == [1, 2, 3, 4, 5, 2, 3, 4, 5]
    assert [p["ms"] for p in curve["points"]] == [1.0, 2.0, 3.0, 4.0, 50.0]
    assert curve["cliffs"] == [5]

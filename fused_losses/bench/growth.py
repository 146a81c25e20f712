"""`fused-losses bench --growth`: how time grows with the work, and where it jumps.

For each primitive, on one thread and on all: the time of a step against C, N·M or M, against D, and
at ragged sizes. Of each a slope, that of ln(time) against ln(size) by least squares, with its
largest residual, and a straight line's constant. A cliff is a size at which a step takes more than
CLIFF times what a straight line between its neighbours gives (at the ends: than the neighbour's
time, or above it that time by the ratio of the sizes), after a second look. A time is the least of
its turns: what disturbs only adds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fused_losses.bench import measure
from fused_losses.bench.growth_cases import SWEEPS, GrowthSizes, GrowthStep, GrowthSweep

CLIFF = 1.5
TURNS, MOST_TURNS = 5, 50
SPENT_MS = 30.0  # on the turns of a point, if so many are allowed


def least_ms(step: GrowthStep) -> float:
    """The least time of a few turns, and of more where a turn is short."""
    step()
    times: list[float] = []
    while len(times) < TURNS or (len(times) < MOST_TURNS and sum(times) < SPENT_MS):
        times.append(measure.timed_ms(step))
    return min(times)


def fit(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """The slope of the logarithms, the largest residual of the time, relative, and a constant.

    The constant is that of a straight line of times against sizes, in their unit.
    """
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    line = statistics.linear_regression(x, y)
    off = (abs(b - line.intercept - line.slope * a) for a, b in zip(x, y, strict=True))
    return line.slope, math.expm1(max(off)), statistics.linear_regression(sizes, times).intercept


def cliffs(sizes: Sequence[float], times: Sequence[float]) -> list[int]:
    """The places of sizes, which increase, whose time is out of line with the neighbours'."""
    found = []
    last = len(sizes) - 1
    for i in range(len(sizes)):
        if i == 0:
            expected = times[1]
        elif i == last:
            expected = times[i - 1] * sizes[i] / sizes[i - 1]
        else:
            share = (sizes[i] - sizes[i - 1]) / (sizes[i + 1] - sizes[i - 1])
            expected = times[i - 1] + share * (times[i + 1] - times[i - 1])
        if times[i] > CLIFF * expected:
            found.append(i)
    return found


def _curve(sweep: GrowthSweep, axis: str, device: str, threads: int) -> dict[str, Any]:
    """Times along an axis on so many threads."""
    points: list[dict[str, float]] = []
    every: list[GrowthSizes] = []
    for value, sizes in sweep.points(axis):
        points.append({"size": value, "ms": least_ms(sweep.make(sizes, device))})
        every.append(sizes)

    def out_of_line() -> list[int]:
        return cliffs([p["size"] for p in points], [p["ms"] for p in points])

    # of a doubtful size and of its neighbours
    again = {j for i in out_of_line() for j in (i - 1, i, i + 1) if 0 <= j < len(points)}
    for i in sorted(again):
        points[i]["ms"] = min(points[i]["ms"], least_ms(sweep.make(every[i], device)))
    slope, residual, constant = fit([p["size"] for p in points], [p["ms"] for p in points])
    return {
        "threads": threads,
        "points": points,
        "slope": slope,
        "residual": residual,
        "fixed_ms": constant,
        "cliffs": [points[i]["size"] for i in out_of_line()],
    }


def swept(
    device: str,
    names: Sequence[str],
    say: Callable[[str], None],
    sweeps: dict[str, GrowthSweep] = SWEEPS,
) -> Iterator[dict[str, Any]]:
    """Each primitive's sweeps as they are done; torch's number of threads is as before after."""
    threads = torch.get_num_threads()
    counts = sorted({1, threads}) if device == "cpu" else [threads]
    for name in names:
        sweep = sweeps[name]
        for axis in sweep.axes:
            curves = []
            for count in counts:
                say(f"growth: {name} against {axis}, threads {count}")
                torch.set_num_threads(count)
                try:
                    curves.append(_curve(sweep, axis, device, count))
                finally:
                    torch.set_num_threads(threads)
            varied = "N" if axis == "N·M" else axis.partition(",")[0]
            at = ", ".join(f"{k}={v:,}" for k, v in sweep.sizes.items() if k != varied)
            yield {
                "primitive": name,
                "axis": axis,
                "at": at,
                "fitted": axis not in sweep.ragged,
                "curves": curves,
            }


HEAD = [
    "Slope: of ln(ms) against ln(size); residual: the largest of that fit; a time is the least of "
    f"its turns. A cliff: above {CLIFF}x a straight line between its neighbours, looked at twice.",
    "",
    "| primitive | against | at | threads | slope | residual | ms | over one thread | cliffs |",
    "|---|---|---|---|---|---|---|---|---|",
]


def table(sweep: dict[str, Any]) -> list[str]:
    """Under HEAD, a row for each number of threads."""
    lines = []
    alone = [p["ms"] for p in sweep["curves"][0]["points"]]
    for curve in sweep["curves"]:
        times = [p["ms"] for p in curve["points"]]
        faster = statistics.median(a / b for a, b in zip(alone, times, strict=True))
        sizes = ", ".join(f"{at:,}" for at in curve["cliffs"]) or "none"
        fitted = (f"{curve['slope']:.2f}", f"{curve['residual']:.0%}")
        slope, residual = fitted if sweep["fitted"] else ("", "")
        lines.append(
            f"| {sweep['primitive']} | {sweep['axis']} | {sweep['at']} | {curve['threads']} "
            f"| {slope} | {residual} | {times[0]:.3g} to {times[-1]:.3g} "
            f"| {faster:.2f}x | {sizes} |"
        )
    return lines

"""Records of benchmarks that were never run, whose verdicts are known."""

from __future__ import annotations

from typing import Any

from fused_losses.bench import history, host
from fused_losses.bench.host import Peaks

PEAKS = Peaks(2, "by hand", 5e9, 10e9, 20e9, 40e9, 4e9, 8e9, 3e-10, 1e-10)
# times of ours and of a rival that drifts with it
OURS, DRIFT = [10.0, 10.1, 9.9, 10.0, 10.2, 9.8, 10.0], [1.0, 1.5, 0.8, 1.2, 1.0, 2.0, 1.1]


def record(ours: float = 1.0, machine: float = 1.0, rounds: int = 7) -> dict[str, Any]:
    """A run in which ours is slower by a factor, and the machine by another."""
    drift = [machine * d for d in DRIFT[:rounds]]
    times = {
        "fused fp32": [ours * t * d for t, d in zip(OURS, drift, strict=False)],
        "eager": [30 * d for d in drift],
        "broken <peer>": [],
    }
    results = [
        {"name": name, "times_ms": ms, "extra_mib": 1.0 if ms else None, "difference": 1e-7,
         "error": None if ms else "ValueError: <no>", "floor_ms": 5.0, "share_of_floor": 0.5}
        for name, ms in times.items()
    ]  # fmt: skip
    case = {"title": "A case, N=3 & M=4", "ours": ["fused fp32"], "results": results}
    head = {"format": history.FORMAT, "version": "1.2.3", "host": host.state("cpu", PEAKS)}
    return head | {"cases": [case]}

"""Paired timing: every provider once a round, in turn: a machine that drifts drifts for all."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

Step = Callable[[], None]
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Result:
    """One provider's times over the rounds, and what it needed beyond its inputs and gradients."""

    name: str
    times_ms: list[float] = field(default_factory=list)
    extra_mib: float | None = None
    error: str | None = None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms) if self.times_ms else float("nan")


def resident_mib(key: str) -> float:
    """VmRSS or VmHWM of this process, MiB; NaN where /proc does not say."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return float("nan")


def give_back_memory() -> None:
    """Freed memory back to the system, so that every provider starts from the same place."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass


def peak_mib(step: Step) -> float:
    """Growth of the resident set's high-water mark over one step (the mark is reset first)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    give_back_memory()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return float("nan")
    before = resident_mib("VmRSS")
    step()
    return resident_mib("VmHWM") - before


def timed_ms(step: Step) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def paired(
    providers: dict[str, Step],
    rounds: int,
    gradients_mib: float,
    clear: Callable[[], None],
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Warm each provider up (its memory is read then), then `rounds` rounds of all in turn.

    A turn is one untimed step and one timed: what a training loop sees, where the step before was
    the same; without it a provider pays for the page faults of its predecessor's freed gigabytes.
    `clear` drops the gradients before each step; a provider that fails is reported, not hidden.
    """
    results = {name: Result(name) for name in providers}
    for name, step in providers.items():
        say(f"warm-up: {name}")
        try:
            clear()
            step()
            clear()
            results[name].extra_mib = max(0.0, peak_mib(step) - gradients_mib)
        except Exception as error:  # a rival's failure is a result too
            results[name].error = f"{type(error).__name__}: {error}"
    for index in range(rounds):
        say(f"round {index + 1} of {rounds}")
        for name, step in providers.items():
            if results[name].error is None:
                clear()
                step()
                clear()
                results[name].times_ms.append(timed_ms(step))
    clear()
    return list(results.values())


def paired_ratio(ours: Result, theirs: Result) -> float:
    """Median over the rounds of their time over ours in the same round."""
    if not ours.times_ms or not theirs.times_ms:
        return float("nan")
    both = zip(theirs.times_ms, ours.times_ms, strict=True)
    return statistics.median(b / a for b, a in both)

"""Paired timing: every provider once a round, in turn: a machine that drifts drifts for all."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

# a way to compute a case: forward and backward; the loss, or what else is computed
Provider = Callable[[], Tensor]
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMORY = Path("/proc/meminfo")
SAMPLED = 1 << 20  # elements of a result or gradient that are compared
TOLERANCE = 2e-3  # relative L2, of float32 accuracy
LOWERED = 5e-2
LOW = ("bf16", "mixed", "knob")  # in the names of providers with rounded products
FLOAT64 = "float64"
ROOM = 0.5  # of what is free, that a truth may take


@dataclass
class Result:
    """One provider's times over the rounds, and what it needed beyond its inputs and gradients."""

    name: str
    times_ms: list[float] = field(default_factory=list)
    extra_mib: float | None = None
    error: str | None = None
    difference: float | None = None  # of result and gradients from those of held_to, relative L2
    held_to: str | None = None  # FLOAT64, or the provider that judges
    # where the case asks for them: the result's worst relative error, the gradients' in L2
    errors: list[float] | None = None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms) if self.times_ms else float("nan")


class Measured(Protocol):
    """What is asked of a case (`cases.Case`)."""

    providers: dict[str, Provider]
    ours: list[str]
    leaves: list[Tensor]
    unlike: tuple[str, ...]
    tolerance: dict[str, float]
    turns: dict[str, int]
    differ: Callable[[list[Tensor], list[Tensor]], float] | None
    truth: Callable[[], list[Tensor]] | None
    tells_errors: bool

    @property
    def gradients_mib(self) -> float: ...

    def clear(self) -> None: ...


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
    with suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_mib(step: Callable[[], object], device: str = "cpu") -> float:
    """Growth of the resident set's high-water mark over one step (the mark is reset first).

    On a GPU of what is allocated there.
    """
    if torch.device(device).type == "cuda":
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


def free_bytes(device: str = "cpu") -> int:
    """What the system, or the GPU, could still give."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        for line in _MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 1 << 62


def timed_ms(step: Callable[[], object], device: str = "cpu") -> float:
    """Of one step: by the clock, or on a GPU between two events of its stream."""
    if torch.device(device).type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def _sampled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of each so many elements at most; a whole one could be gigabytes."""
    flat = [t.reshape(-1) for t in tensors]
    return [t[:: max(1, t.numel() // SAMPLED)].double() for t in flat]


def _found(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """A sample of the result and of each gradient."""
    told = [loss]
    for leaf in leaves:
        assert leaf.grad is not None, "a leaf has no gradient"
        told.append(leaf.grad)
    return _sampled(told)


def _errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    worst = float(((found[0] - truth[0]).abs() / truth[0].abs().clamp_min(1e-300)).max())
    return [worst, difference(found[1:], truth[1:])]


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """The worst of loss and gradients, relative L2."""
    pairs = zip(got, want, strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs)


def judges(case: Measured) -> list[str]:
    """Who may judge the others, the first that can: rivals of float32 as written, then ours."""
    other = (*case.ours, *case.unlike)
    written = [name for name in case.providers if name not in other and "compile" not in name]
    return [*(name for name in written if not _low(name)), *case.ours[:1]]


def _low(name: str) -> bool:
    return any(word in name for word in LOW)


def _truth(case: Measured, judge: Result, device: str) -> list[Tensor] | None:
    """In float64, where there is room for twice what the judge took, beside the leaves'."""
    if case.truth is None:
        return None
    held = judge.extra_mib
    if held is None or held != held:
        return None
    needed = 2 * (held + 2 * case.gradients_mib) * 2**20
    return _sampled(case.truth()) if needed < ROOM * free_bytes(device) else None


def _warmed(case: Measured, name: str, device: str) -> tuple[Result, list[Tensor]]:
    """A provider's time and memory of its first steps, and what it found; nothing if it failed."""
    result, step = Result(name), case.providers[name]
    try:
        case.clear()
        once: list[Tensor] = []
        if case.turns.get(name) == 0:
            # its warm-up is all that it gets: time and memory of that
            start = time.perf_counter()
            result.extra_mib = peak_mib(lambda: once.append(step()), device)
            result.times_ms.append((time.perf_counter() - start) * 1e3)
        found = _found(once[0] if once else step(), case.leaves)
        case.clear()
        if result.extra_mib is None:
            result.extra_mib = peak_mib(step, device)
        result.extra_mib = max(0.0, result.extra_mib - case.gradients_mib)
    except Exception as error:  # a rival's failure is a result too
        result.error = f"{type(error).__name__}: {error}"
        found = []
    return result, found


def paired(
    case: Measured,
    rounds: int,
    say: Callable[[str], None] = lambda text: None,
    device: str = "cpu",
) -> list[Result]:
    """Warm each provider up (its memory is read then), then `rounds` rounds of all in turn.

    Before any is timed, each provider's result and gradients are held to the case's own formula in
    float64, or where there is none or no room for it to the first rival as it is written: who
    computes something else, ours not excepted, has failed and is not timed. A turn is one untimed
    step and one timed: what a training loop sees, where the step before was the same; without it a
    provider pays for the page faults of its predecessor's freed gigabytes. A provider that fails is
    reported, not hidden.
    """
    results: dict[str, Result] = {}
    want: list[Tensor] = []
    held_to = ""
    for held_to in judges(case):
        say(f"warm-up: {held_to}")
        results[held_to], want = _warmed(case, held_to, device)
        if results[held_to].error is None:
            say("float64")
            truth = _truth(case, results[held_to], device)
            _judge(case, results[held_to], want, truth or want, FLOAT64 if truth else held_to)
            held_to, want = (FLOAT64, truth) if truth else (held_to, want)
            break
    for name in case.providers:
        if name not in results:
            say(f"warm-up: {name}")
            results[name], found = _warmed(case, name, device)
            _judge(case, results[name], found, want, held_to)
    for index in range(rounds):
        say(f"round {index + 1} of {rounds}")
        for name, step in case.providers.items():
            if results[name].error is None and index < case.turns.get(name, rounds):
                case.clear()
                step()
                case.clear()
                results[name].times_ms.append(timed_ms(step, device))
    case.clear()
    return [results[name] for name in case.providers]


def _judge(
    case: Measured, result: Result, found: list[Tensor], want: list[Tensor], held_to: str
) -> None:
    """Notes how far a provider is from what it is held to; one that is too far has failed."""
    if result.error is not None or not want:
        return
    if case.tells_errors and held_to == FLOAT64:
        result.errors = _errors(found, want)
    if result.name in case.unlike:
        return
    result.held_to = held_to
    usual = LOWERED if _low(result.name) else TOLERANCE
    try:
        result.difference = (case.differ or difference)(found, want)
        # written so that NaN disagrees
        if not result.difference <= case.tolerance.get(result.name, usual):
            raise ValueError(f"differs from {held_to} by {result.difference:.1e}")
    except Exception as error:  # also of another shape
        result.error = f"{type(error).__name__}: {error}"
        result.times_ms = []


def paired_ratio(ours: Result, theirs: Result) -> float:
    """Median over the rounds of their time over ours in the same round.

    A slow provider has fewer rounds, the first ones.
    """
    if not ours.times_ms or not theirs.times_ms:
        return float("nan")
    both = zip(theirs.times_ms, ours.times_ms, strict=False)
    return statistics.median(b / a for b, a in both)

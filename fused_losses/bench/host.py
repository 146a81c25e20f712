"""What this machine can do: the peaks that a case's floor is made of, measured before the cases.

Of the CPU: multiply-adds that never leave the registers, on one thread and on torch's number of
them, in float32 and in bfloat16 where the CPU multiplies it; a copy of a tensor that no cache
holds; the first touch of fresh memory. Of a GPU: the library's products and a copy.
Each is the best of a few tries: what is asked for is what can be reached. About two seconds.
"""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

from fused_losses.backends.cpu import capability as cpu
from fused_losses.version import __version__

TRIES = 5
SECONDS = 0.02  # of a try in registers
COPIED = 128 << 20  # bytes, beyond any cache
FRESH = 64 << 20
PAGE = 4096
SIDE = 1024  # of the products by torch
SIDE_ON_GPU = 8192
PACKAGES = (
    "numpy",
    "triton",
    "scipy",
    "pytorch-metric-learning",
    "faiss-cpu",
    "maxsim-cpu",
    "sentence-transformers",
    "liger-kernel",
)


@dataclass(frozen=True)
class Peaks:
    """FLOP/s and bytes/s, at most; None: there is no such thing here."""

    threads: int
    how: str  # the products were done
    fp32_one: float | None
    fp32: float  # on all threads
    bf16_one: float | None
    bf16: float | None
    copy_one: float | None
    copy: float  # bytes read and written
    fresh: float | None = None  # seconds a byte, beyond those of writing it
    fresh_huge: float | None = None  # where large pages are asked for

    def flops(self, low: bool) -> float:
        """Of products in bfloat16, or of float32 where there are none."""
        return self.bf16 if low and self.bf16 else self.fp32


def _least(run: Callable[[], float], tries: int = TRIES) -> float:
    return min(run() for _ in range(tries))


def _timed(run: Callable[[], object], device: str = "cpu") -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_registers(precision: str, threads: int) -> float:
    """FLOP/s of the extension's own loop, the sum over threads that start together."""
    multiply: Callable[[str, int], float] = cpu.extension().multiply_registers
    steps = 1 << 14
    while _timed(partial(multiply, precision, steps)) < SECONDS:
        steps *= 2
    gate = Barrier(threads)

    def once() -> tuple[float, float, float]:
        gate.wait()
        start = time.perf_counter()
        done = multiply(precision, steps)
        return start, time.perf_counter(), done

    def rate() -> float:
        with ThreadPoolExecutor(threads) as pool:
            found = [f.result() for f in [pool.submit(once) for _ in range(threads)]]
        begin, end = min(f[0] for f in found), max(f[1] for f in found)
        return sum(f[2] for f in found) / (end - begin)

    return max(rate() for _ in range(TRIES))


def by_library(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of torch.mm."""
    side = SIDE if device == "cpu" else SIDE_ON_GPU
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2.0 * side**3 / _least(lambda: _timed(lambda: torch.mm(a, b), device))


def copied(device: str) -> float:
    """Bytes/s, each byte counted as read and as written."""
    a, b = (torch.ones(COPIED // 4, device=device) for _ in range(2))
    b.copy_(a)
    return 2.0 * COPIED / _least(lambda: _timed(lambda: b.copy_(a), device))


def fresh_memory(huge: bool) -> float | None:
    """Seconds a byte that its first touch takes, a byte of each page, less a second touch."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

    def once() -> float:
        with mmap.mmap(-1, FRESH, flags=flags) as room:
            if huge:
                room.madvise(mmap.MADV_HUGEPAGE)
            pages = torch.frombuffer(room, dtype=torch.uint8)[::PAGE]
            first, second = (_timed(partial(pages.fill_, 1)) for _ in range(2))
            # a room that something looks at is not closed
            del pages
        return max(first - second, 0.0) / FRESH

    if huge and not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        return _least(once)
    except OSError:  # a kernel without large pages
        return None


def measured(device: str) -> Peaks:
    """The peaks of this process's threads, or of the GPU."""
    threads = torch.get_num_threads()
    if device != "cpu":
        low = by_library(torch.bfloat16, device)
        full = by_library(torch.float32, device)
        name = "torch.mm"
        return Peaks(threads, name, None, full, None, low, None, copied(device))
    built = cpu.extension()

    def one(run: Callable[[], float]) -> float:
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(threads)

    low = False
    if built is not None:
        low = built.has_bf16()
        how = f"multiply-adds in registers, {built.capability()}"
        full_one, full = (in_registers("fp32", count) for count in (1, threads))
    else:
        how = "torch.mm: the extension is not built"
        full_one = one(lambda: by_library(torch.float32, device))
        full = by_library(torch.float32, device)
    return Peaks(
        threads,
        how,
        full_one,
        full,
        in_registers("bf16", 1) if low else None,
        in_registers("bf16", threads) if low else None,
        one(lambda: copied(device)),
        copied(device),
        fresh_memory(huge=False),
        fresh_memory(huge=True),
    )


@cache
def peaks(device: str) -> Peaks:
    """As `measured`, once a process."""
    return measured(device)


def load() -> list[float]:
    """Processes that ran or waited, over 1, 5 and 15 minutes."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else []


def cpu_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def state(device: str, peaks: Peaks) -> dict[str, Any]:
    """What stands in the record of a run: versions, the machine, its load and its peaks."""
    versions = {"fused_losses": __version__, "torch": torch.__version__}
    versions["python"] = platform.python_version()
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "load_at_start": load(),
        "peaks": asdict(peaks),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """A paragraph on the state above, of Markdown."""
    p = Peaks(**found["peaks"])
    one = "" if p.fp32_one is None else f" ({p.fp32_one / 1e9:,.0f} on one)"
    parts = [f"products {p.fp32 / 1e9:,.0f} GFLOP/s in float32{one}"]
    if p.bf16:
        one = "" if p.bf16_one is None else f" ({p.bf16_one / 1e9:,.0f} on one)"
        parts.append(f"{p.bf16 / 1e9:,.0f} in bfloat16{one}")
    one = "" if p.copy_one is None else f" ({p.copy_one / 1e9:.1f} on one)"
    parts.append(f"a copy {p.copy / 1e9:.1f} GB/s read and written{one}")
    if p.fresh is not None:
        huge = "" if p.fresh_huge is None else f", {p.fresh_huge * 2**20 * 1e6:.0f} in large pages"
        parts.append(f"fresh memory {p.fresh * 2**20 * 1e6:.0f} us a MiB{huge}")
    told = "load " + ", ".join(f"{at:.2f}" for at in found["load_at_start"])
    return [f"{found['cpu']}, {p.threads} threads, {told}. Peaks ({p.how}): {'; '.join(parts)}."]


def in_low(case: str, row: str) -> bool:
    """Whether a row of a case multiplies in 16 bits, wholly or in part."""
    return "float16" in case or any(word in row for word in ("bf16", "mixed"))


def floor_ms(peaks: Peaks, flops: float, moved: float, low: bool) -> float:
    """No less can the products take, nor the bytes: the larger of the two."""
    return 1e3 * max(flops / peaks.flops(low), moved / peaks.copy)

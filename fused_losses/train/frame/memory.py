"""Peak memory of a stretch of work: what the process held at most, above what it held before."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress

import torch

MIB = 2**20
# what torch says of sizes that no memory has
TOLD = ("allocate memory", "out of memory", "Storage size calculation overflow", "Overflow when un")


def is_memory(error: Exception) -> bool:
    """Whether there was not enough memory."""
    first = str(error).partition("\n")[0]
    return isinstance(error, MemoryError) or any(told in first for told in TOLD)


class PeakMemory:
    """On CPU the peak resident set, on CUDA the peak of torch's allocations, from creation on.

    `method` says which: "VmHWM" (Linux, the high-water mark reset through clear_refs), "ru_maxrss"
    (cannot be reset: too small when the process was larger before) or "cuda".
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.method = "cuda"
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        _give_back_freed_memory()
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self.before = _status_bytes("VmRSS")
            self.method = "VmHWM"
        except OSError:
            self.before = _maximum_resident()
            self.method = "ru_maxrss"

    def mib(self) -> float:
        """MiB of growth at the peak so far."""
        if self.method == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        elif self.method == "VmHWM":
            peak = _status_bytes("VmHWM")
        else:
            peak = _maximum_resident()
        return max(0, peak - self.before) / MIB


def _give_back_freed_memory() -> None:
    """Pages that malloc keeps from earlier work would hide growth."""
    # a library other than glibc has none
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _maximum_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""What Triton would compile: the keys that its launcher looks kernels up by, without a GPU.

Fake CUDA tensors (`fake_gpu`) go through Triton's own launcher; a kernel that it does not have is
noted and taken for compiled, and none is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import fake_gpu
import pytest
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

LAUNCH = jit.KernelInterface.__getitem__
ALIGNED = 1 << 20  # where every storage begins: PyTorch's allocations are whole 512 bytes


class HopperDriver:
    """As much of a driver as the launcher asks."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class NothingRuns:
    """In the place of a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        return None


@contextmanager
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Within: cuda:0 and cuda:1, and how many kernels of each name Triton has had to compile."""
    found: Counter[str] = Counter()
    entered: list[tuple[dict[Any, Any], Any]] = []

    def compile_it(self: Any, key: Any, signature: Any, device: int, *rest: Any) -> NothingRuns:
        found[f"{self.fn.__module__}.{self.fn.__name__}"] += 1
        cache = self.device_caches[device][0]
        entered.append((cache, key))
        kernel = cache[key] = NothingRuns()
        return kernel

    def address(tensor: FakeTensor) -> int:
        return ALIGNED + int(tensor.storage_offset()) * tensor.element_size()

    active, hopper = driver._active, HopperDriver()
    try:
        driver.set_active(cast(Any, hopper))
        with fake_gpu.gpu(monkeypatch, ("triton", "cuda", "bounded")):
            monkeypatch.setattr(jit.KernelInterface, "__getitem__", LAUNCH)
            monkeypatch.setattr(jit.JITFunction, "_do_compile", compile_it)
            monkeypatch.setattr(FakeTensor, "data_ptr", address)
            yield found
    finally:
        driver._active = active
        for cache, key in entered:
            del cache[key]

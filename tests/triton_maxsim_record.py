"""`triton_record` for MaxSim: what its host code launches, compiled ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton_record as record
from triton_record import Compilation

from fused_losses.backends import triton_launch
from fused_losses.backends import triton_maxsim as backend


def launches(arch: str, run: Callable[[], Any]) -> list[Compilation]:
    """The distinct kernels that `run` launches."""
    found: dict[Compilation, None] = {}

    def launch(kernel: Any, programs: int, args: tuple, constants: dict, tile: Any) -> None:
        assert 0 < programs < 2**31
        found[record.specialise(kernel, args, constants, tile)] = None

    with record.on(arch, launch):
        run()
    return list(found)


def with_kernels(f: Callable, arch: str, key: Compilation) -> Any:
    """f(arch, key), which looks a kernel up among those that the launchers name."""
    saved = triton_launch.kernels
    triton_launch.kernels = lambda: (*saved(), backend.kernels())
    try:
        return f(arch, key)
    finally:
        triton_launch.kernels = saved


def steps(
    d: int,
    dtype: torch.dtype,
    precision: str = "fp32",
    shape: tuple[int, int, int, int] = (64, 32, 64, 256),  # queries, tokens, documents, tokens
) -> Callable[[], Any]:
    """A forward and a backward on tensors without data."""
    query_count, query_length, count, length = shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def run() -> None:
        texts = (
            empty(query_count * query_length, d, dtype=dtype),
            empty(count * length, d, dtype=dtype),
            empty(query_count + 1, dtype=torch.int64),
            empty(count + 1, dtype=torch.int64),
        )
        scores, index = backend.forward(*texts, precision)
        backend.backward(empty(*scores.shape), index, *texts, True, True)

    return run

"""`triton_record` for the sweep over pairs: what its host code launches, compiled ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton_record as record
from triton_record import Compilation, Resources

from fused_losses.backends import triton_launch
from fused_losses.backends import triton_pairs as backend
from fused_losses.pair_inputs import PairInputs, PairNeeds, Rule

record.TYPES.setdefault(torch.float64, "*fp64")


def specialise(kernel: Any, args: tuple, constants: dict, tile: Any) -> Compilation:
    """As `record.specialise`; a Python float is a float32."""
    key = record.specialise(kernel, args, constants, tile)
    given = dict(zip(kernel.arg_names, args, strict=False))
    signature = tuple(
        (name, "fp32" if isinstance(given.get(name), float) else kind)
        for name, kind in key.signature
    )
    return replace(key, signature=signature)


def launches(arch: str, run: Callable[[], Any]) -> list[Compilation]:
    """The distinct kernels that `run` launches."""
    found: dict[Compilation, None] = {}

    def launch(kernel: Any, programs: int, args: tuple, constants: dict, tile: Any) -> None:
        assert 0 < programs < 2**31
        found[specialise(kernel, args, constants, tile)] = None

    with record.on(arch, launch):
        run()
    return list(found)


def with_pair_kernels(f: Callable, arch: str, key: Compilation) -> Any:
    """f(arch, key), which looks a kernel up among those that the launchers name."""
    saved = triton_launch.kernels
    triton_launch.kernels = lambda: (*saved(), backend.kernels())
    try:
        return f(arch, key)
    finally:
        triton_launch.kernels = saved


def compiled(arch: str, key: Compilation) -> Any:
    return with_pair_kernels(record.compiled, arch, key)


def resources(arch: str, key: Compilation) -> Resources:
    return with_pair_kernels(record.resources, arch, key)


def steps(
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    precision: str = "fp32",
    reduction: str = "lse",
    cols: bool = False,
    triangle: bool = False,
    labels: bool = True,
    biases: bool = False,
    ids: bool = False,
    groups: bool = False,
    exclude: int = 0,
    windows: bool = False,
    root: bool = False,
    reach: float = float("inf"),
    skip_self: bool = False,
    attention: int = 0,  # width of the values; 0: statistics
    need_values: bool = True,
) -> Callable[[], Any]:
    """A forward and a backward on tensors without data."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def pair(wanted: bool, *head: int, dtype: torch.dtype = torch.float32) -> tuple:
        sides = empty(*head, n, dtype=dtype), empty(*head, m, dtype=dtype)
        return (sides[0], None if triangle else sides[1]) if wanted else (None, None)

    def run() -> None:
        x = empty(n, d, dtype=dtype)
        p = PairInputs(
            x,
            x if triangle else empty(m, d, dtype=dtype),
            empty(dtype=torch.float64),
            *pair(biases),
            *pair(labels, dtype=torch.int32),
            *pair(ids, dtype=torch.int32),
            *pair(groups, dtype=torch.int32),
            empty(n, exclude, dtype=torch.int32) if exclude else None,
            *pair(windows, 4),
            score="root" if root else "linear",
            positive=Rule(-1.5, 0.25, reach),
            negative=Rule(2.0, 0.75, reach),
            skip_self=skip_self,
            triangle=triangle,
            precision=precision,
        )
        if not cols:
            p = p._replace(y_window=None)
        needs = PairNeeds(True, not triangle, True, biases, biases and not triangle)
        wide = dict(dtype=torch.float64)
        if attention:
            values = empty(m, attention, dtype=dtype)
            out, lse = backend.attention(values, p, labels)
            grads = empty(*out.shape), empty(n, **wide)
            backend.attention_backward(*grads, out, lse, values, p, labels, need_values, needs)
            return
        rows, columns = backend.statistics(p, reduction, cols)
        grads = empty(2, 2, n, **wide), empty(2, 2, columns.shape[-1], **wide)
        backend.statistics_backward(*grads, rows, columns, p, reduction, cols, needs)

    return run

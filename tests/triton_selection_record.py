"""`triton_record` for distances and the top-k: what their host code launches, compiled ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton_record as record
from triton_record import Compilation, Resources

from fused_losses.backends import triton_distances, triton_launch, triton_topk

record.TYPES.setdefault(torch.int8, "*i8")


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


def _with_kernels(f: Callable, arch: str, key: Compilation) -> Any:
    """f(arch, key), which looks a kernel up among those that the launchers name."""
    saved = triton_launch.kernels
    modules = triton_distances.kernels(), triton_topk.kernels()
    triton_launch.kernels = lambda: (*saved(), *modules)
    try:
        return f(arch, key)
    finally:
        triton_launch.kernels = saved


def compiled(arch: str, key: Compilation) -> Any:
    return _with_kernels(record.compiled, arch, key)


def resources(arch: str, key: Compilation) -> Resources:
    return _with_kernels(record.resources, arch, key)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def distances(
    kind: str, d: int, dtype: torch.dtype, precision: str = "fp32", n: int = 4096, m: int = 8192
) -> Callable[[], Any]:
    """A forward and a backward on tensors without data."""

    def run() -> None:
        x, y = _empty(n, d, dtype=dtype), _empty(m, d, dtype=dtype)
        out = triton_distances.forward(x, y, None, kind, 2.0, precision)
        grad = _empty(*out.shape)
        options = (None, kind, 2.0, precision, True, True, False)
        triton_distances.backward(grad, out, x, y, *options)

    return run


def screens(
    keep: int,
    d: int,
    dtype: torch.dtype,
    precision: str = "fp32",
    y_dtype: torch.dtype | None = None,
    everything: bool = False,  # multipliers, labels, ids, exclusions
    match: str = "any",
    center: bool = False,
    n: int = 4096,
    m: int = 65536,
) -> Callable[[], Any]:
    """A screen of tensors without data."""

    def integers(wanted: bool, *shape: int) -> torch.Tensor | None:
        return _empty(*shape, dtype=torch.int32) if wanted else None

    def run() -> None:
        triton_topk.screen(
            _empty(n, d, dtype=dtype),
            _empty(m, d, dtype=y_dtype or dtype),
            _empty(m),
            _empty(m) if everything else None,
            keep,
            integers(match != "any", n),
            integers(match != "any", m),
            match,
            integers(everything, n),
            integers(everything, m),
            integers(everything, n, 3),
            everything,
            precision,
            _empty(d) if center else None,
        )

    return run

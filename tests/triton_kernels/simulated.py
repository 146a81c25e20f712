"""Executes a Triton kernel's PTX in the emulator beside the project; skips where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from places import SHARED

from fused_losses.backends.triton import launch as triton_launch
from tools.gpu_static import machine_code, record
from tools.gpu_static.machine_code import LANES

pytest.importorskip("triton")
if not (SHARED / "ptxsim").is_dir():
    pytest.skip("ptxsim is absent: the PTX is not executed here", allow_module_level=True)
if triton_launch.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)


def simulate(cc: int, reports: list) -> Any:
    sys.path.insert(0, str(SHARED))
    import ptxsim
    from ptxsim.core import Buf

    load = cache(ptxsim.load)

    def values(arguments: Any, types: Any) -> Iterator[Any]:
        """What the kernel is given when it runs: nothing for what it is compiled for."""
        for value, kind in zip(arguments, types, strict=True):
            if isinstance(value, tuple):
                yield from values(value, kind)
            elif isinstance(value, torch.Tensor):
                yield Buf(value)
            elif kind != "constexpr":
                yield np.float32(value) if kind == "fp32" else value

    def launch(kernel: Any, programs: int, args: tuple, constants: dict, tile: Any) -> None:
        key = record.specialise(kernel, args, constants, tile)
        binary = machine_code.compiled(f"sm_{cc}", key)
        given = list(values(args, [kind for _, kind in key.signature[: len(args)]]))
        threads, shared = LANES * binary.metadata.num_warps, binary.metadata.shared
        module = load(binary.asm["ptx"])
        report = ptxsim.run(module, binary.metadata.name, (programs,), threads, given, shared)
        assert not report.warnings, report.warnings
        reports.append((kernel.fn.__name__, report))

    return launch


@pytest.fixture(autouse=True)
def _on_the_path() -> Any:
    before = list(sys.path)
    yield
    sys.path[:] = before

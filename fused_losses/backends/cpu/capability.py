"""The compiled C++ kernels (csrc/cpu), reached through the ops that the extension registers."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

_BUILD_HINT = "the C++ extension is not built: run `pip install .` with a C++20 compiler"


@lru_cache
def _load() -> ModuleType | ImportError:
    """The compiled module, or why it cannot be imported. Importing it registers its ops."""
    try:
        return importlib.import_module("fused_losses._C")
    except ImportError as error:
        return error


def extension() -> Any:
    """The compiled module, or None where it was not built (and none of its ops can be called)."""
    loaded = _load()
    return None if isinstance(loaded, ImportError) else loaded


def unavailable() -> str | None:
    loaded = _load()
    return f"{_BUILD_HINT} ({loaded})" if isinstance(loaded, ImportError) else None


def reasons_against(device: torch.device, dtype: torch.dtype, precision: str) -> list[str]:
    reasons = []
    if device.type != "cpu":
        reasons.append(f"tensors are on {device}, the cpu kernels need them on the CPU")
    if precision == "tf32":
        reasons.append("precision='tf32': a CPU has no tf32 products; use 'fp32' or 'bf16'")
    if precision in ("bf16", "mixed"):
        if dtype == torch.float64:
            reasons.append(f"precision={precision!r}: float64 inputs are multiplied in float64")
        elif not extension().has_bf16():
            reasons.append(
                f"precision={precision!r}: this CPU (capability {extension().capability()}) has "
                "no AVX512_BF16 products; use 'fp32'"
            )
    return reasons

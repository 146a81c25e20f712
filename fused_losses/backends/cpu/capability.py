"""The compiled C++ kernels (csrc/cpu), reached through the ops that the extension registers."""

from __future__ import annotations

import torch

from fused_losses.base.compiled import extension, load

__all__ = ["extension", "reasons_against", "unavailable"]
_BUILD_HINT = "the C++ extension is not built: run `pip install .` with a C++20 compiler"


def unavailable() -> str | None:
    loaded = load()
    if isinstance(loaded, ModuleNotFoundError):
        return f"{_BUILD_HINT} ({loaded})"
    return f"the C++ extension is not used: {loaded}" if isinstance(loaded, ImportError) else None


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

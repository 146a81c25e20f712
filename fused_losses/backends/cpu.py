"""The compiled C++ kernels (csrc/cpu), reached through the ops that the extension registers."""

from __future__ import annotations

from types import ModuleType

import torch

_BUILD_HINT = "the C++ extension is not built: run `pip install .` with a C++20 compiler"


def extension() -> ModuleType | None:
    """The compiled module, or None where it was not built. Importing it registers its ops."""
    try:
        from fused_losses import _C
    except ImportError:
        return None
    return _C


def unavailable() -> str | None:
    if extension() is not None:
        return None
    try:
        from fused_losses import _C  # noqa: F401
    except ImportError as error:
        return f"{_BUILD_HINT} ({error})"
    return None


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


def extra_bytes(n: int, d: int, dtype: torch.dtype, precision: str) -> int:
    """Peak memory of forward and backward beyond inputs and gradients."""
    return extension().workspace_bytes(n, d, dtype == torch.float64, precision != "fp32")

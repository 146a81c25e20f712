"""Whether the Triton kernels can run here, and a call."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from fused_losses.backends.triton import launch as triton_launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why no call can run here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if triton_launch.interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA GPU (TRITON_INTERPRET=1 runs the kernels on CPU tensors)"
    return None


def reasons_against(device: torch.device, dtype: torch.dtype, precision: str) -> list[str]:
    """Why this call cannot run, one sentence a reason."""
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype}: the kernels take float32, bfloat16 and float16")
    if triton_launch.interpreted():
        if device.type != "cpu":
            reasons.append(f"device {device}: TRITON_INTERPRET=1 runs on CPU tensors only")
    elif device.type != "cuda":
        reasons.append(f"device {device}: the kernels run on a GPU (or TRITON_INTERPRET=1)")
    elif not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append("the kernels need tensor cores of compute capability 8.0 or newer")
    elif precision == "tf32" and torch.version.hip:
        reasons.append("precision='tf32': not on this GPU; use fp32, mixed or bf16")
    return reasons

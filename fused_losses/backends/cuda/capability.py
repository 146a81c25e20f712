"""Whether the CUDA C++ kernels can run here, and a call."""

from __future__ import annotations

import torch

from fused_losses.backends.cuda.launch import absent, no_code_on, on_host, path, unusable

OLDEST = (8, 0)  # compute capability

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why the kernels cannot run on this machine at all, or None."""
    if on_host():
        if not path().is_file():
            return "the host build of the CUDA kernels is missing; `make cuda-host` builds it"
        return None
    if not path().is_file():
        return absent()
    if not torch.cuda.is_available():
        return "no GPU; FUSED_LOSSES_CUDA_ON_HOST=1 executes the kernels on the CPU, slowly"
    return unusable()


def reasons_against(device: torch.device, dtype: torch.dtype, precision: str) -> list[str]:
    """Why the kernels cannot take such a call; empty when they can."""
    why = []
    kind = "cpu" if on_host() else "cuda"
    if device.type != kind:
        why.append(f"device {device}: the kernels run on {kind} tensors here")
    elif kind == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        why.append(f"device {device}: the kernels are built for sm_80 and later")
    elif kind == "cuda" and (missing := no_code_on(_index(device))):
        why.append(missing)
    if dtype not in (*DTYPES, torch.bool, torch.int8):
        why.append(f"{dtype}: expected float32, bfloat16 or float16")
    if precision == "tf32" and on_host():
        why.append("precision='tf32': the host has no tf32 products")
    return why


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index

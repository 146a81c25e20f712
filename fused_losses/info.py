"""`fused-losses info`: what is installed, what can run here, and why the rest cannot."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from typing import Any

import torch

from fused_losses import backends
from fused_losses.backends.cpu import capability as cpu
from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.version import __version__


def lines() -> list[str]:
    """The report, a line each."""
    built = cpu.extension()
    out = [
        f"fused_losses   {__version__}",
        f"python         {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch          {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton         {_triton_version()}",
        f"extension      {_built(built) if built else cpu.unavailable()}",
        f"cpu capability {built.capability() if built else 'none'}",
        f"cuda kernels   {cuda_launch.built()}",
        f"gpus           {_gpus()}",
        f"library's tf32 {_tf32()}",
        "backends:",
    ]
    out += [f"  {name:10s} {state}" for name, state in backends.available().items()]
    settings = {k: v for k, v in os.environ.items() if k.startswith("FUSED_LOSSES_")}
    out += [f"  {key}={value}" for key, value in sorted(settings.items())]
    return out


def _triton_version() -> str:
    if find_spec("triton") is None:
        return "not installed"
    import triton

    mode = " (interpreter)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return triton.__version__ + mode


def _built(built: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in built.build())


def _tf32() -> str:
    """Whether precision="tf32" finds its products in the library, too."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "allowed by this process" if allowed else "not allowed by this process"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    count = torch.cuda.device_count()
    return ", ".join(torch.cuda.get_device_name(i) for i in range(count))

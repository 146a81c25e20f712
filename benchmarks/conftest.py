"""What pytest-benchmark records of this machine: its peaks, versions and load besides."""

from __future__ import annotations

from typing import Any

import torch

from fused_losses.bench import host


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine_info["fused_losses"] = host.state(device, host.peaks(device))

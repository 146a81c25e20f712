"""What the machine is: versions, devices, clocks, peers."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from fused_losses import info
from fused_losses.first_hour.record import MEASURED, Outcome
from fused_losses.first_hour.setting import HourUnit, Setting

PEERS = (
    "cut-cross-entropy",
    "liger-kernel",
    "pytorch-metric-learning",
    "siglip-kernel",
    "faiss-gpu",
    "faiss-gpu-cu12",
    "faiss-cpu",
)
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
NOW = "clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"
SECONDS = 10


def smi(query: str) -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU; nothing where it is not there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    names = query.split(",")
    lines = (line.split(", ") for line in run.stdout.strip().splitlines())
    return [dict(zip(names, line, strict=True)) for line in lines if len(line) == len(names)]


def clocks() -> str:
    """Of every GPU now, in MHz, degrees and watts; empty without nvidia-smi."""
    return "; ".join(
        f"{g['clocks.sm']}/{g['clocks.mem']} MHz, {g['temperature.gpu']} C, {g['power.draw']} W"
        for g in smi(NOW)
    )


def identity(setting: Setting) -> dict[str, Any]:
    """What must be the same in every call that writes to a folder."""
    name = torch.cuda.get_device_name() if setting.device == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "rehearsal": setting.rehearsed}


def units(setting: Setting) -> list[HourUnit]:
    return [HourUnit("probe/machine", lambda: _machine(setting)), HourUnit("probe/peers", _peers)]


def _machine(setting: Setting) -> Outcome:
    told: list[dict[str, Any]] = []
    for line in info.lines():
        what, said = _split(line)
        told.append({"what": what, "told": said})
    told += [{"what": f"gpu {i}", "told": str(found)} for i, found in enumerate(smi(QUERY))]
    if setting.device == "cuda":
        for i in range(torch.cuda.device_count()):
            told.append({"what": f"cuda:{i}", "told": str(torch.cuda.get_device_properties(i))})
        told.append({"what": "a first product", "told": _product()})
    told.append({"what": "cpus", "told": str(os.cpu_count())})
    return Outcome(MEASURED, tuple(told))


def _split(line: str) -> tuple[str, str]:
    if line.startswith(" "):
        name, _, rest = line.strip().partition(" ")
        return name, rest.strip()
    return (line[:15].strip(), line[15:].strip()) if len(line) > 15 else (line, "")


def _product() -> str:
    """That the device computes at all."""
    ones = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    found = float((ones @ ones).double().mean())
    return f"mean of 256 x 256 products of ones: {found:g}, expected 256"


def _peers() -> Outcome:
    rows = []
    for name in PEERS:
        try:
            rows.append({"peer": name, "version": metadata.version(name)})
        except metadata.PackageNotFoundError:
            rows.append({"peer": name, "version": "not installed"})
    return Outcome(MEASURED, tuple(rows))

"""The CUDA C++ kernels of the library that nvcc built, target by target."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tools.gpu_static.gate import RESERVED
from tools.gpu_static.machine_code import (
    LANES,
    Figures,
    dump,
    functions,
    opcodes,
    read,
    tool,
    usage,
)
from tools.gpu_static.record import NVIDIA


def demangled(names: list[str]) -> dict[str, str]:
    """Names as the source has them; as they are where there is no c++filt."""
    if not names or shutil.which("c++filt") is None:
        return dict(zip(names, names, strict=True))
    command = ["c++filt", "--no-params"]
    run = subprocess.run(
        command, input="\n".join(names), capture_output=True, text=True, check=True
    )
    plain = [re.sub(r"fused_losses::(cuda::)?", "", n) for n in run.stdout.splitlines()]
    return dict(zip(names, (n.removeprefix("void ") for n in plain), strict=True))


def threads(library: Path) -> dict[str, int]:
    """The most threads a block of each kernel, as its source bounds them."""
    command = [tool("cuobjdump"), "-ptx", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"\.entry (\w+)\((?:[^)]*)\)\s*\.maxntid (\d+)"
    return {name: int(count) for name, count in re.findall(pattern, text)}


def sweep(library: Path, archs: tuple[str, ...] = NVIDIA) -> list[Figures]:
    """The figures of every kernel for every target the library has machine code for."""
    bounds, out = threads(library), []
    for arch in archs:
        text = dump(str(library), "-arch", arch)
        found, resources = dict(functions(text)), usage(text)
        names = demangled(list(found))
        for name, sass in found.items():
            figures = Figures(names[name], arch, language="cuda")
            figures.warps = bounds.get(name, 1024) // LANES
            # from sm_90 on the reserved kibibyte is counted, too, where there is any
            reserved = RESERVED if arch in ("sm_90", "sm_100", "sm_120") else 0
            figures.shared = max(0, resources[name]["SHARED"] - reserved)
            out.append(read(figures, opcodes(sass), resources[name]))
    return out

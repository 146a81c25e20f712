"""Faults planted in the project's own CUDA sources, one at a time, and whether a case notices.

python cuda_mutants.py SOURCE FOLDER prints the faults that no case of the source noticed, as JSON.
How a fault is tried: tests/support/mutants.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import cuda_harness
from mutants import DECLARATION, DEFINITION, Fault, Run, noticed, quickest_first

CUDA = cuda_harness.CSRC / "cuda"
# what a source's operations launch besides its own kernels
BESIDE = {
    "row_statistics": ("gather",),
    "pairs": ("distances/products", "distances/gradient"),
}
SEEDS = ("0", "1", "2")
PLATFORM = '#include "platform.h"\n'
VALUE = r"[A-Za-z_][\w.]*(?:->\w+|\[\w+\])*"
EXTENT = r"(?!k[A-Z]|N\b)" + VALUE  # not a constant: registers, which only a sanitizer sees
BARRIER = re.compile(r"(__syncthreads|__syncwarp)\(\);")
ACCESS = re.compile(r"(?<![\w.])(ld|st|ld_pack|st_pack|ld_many<\w+>|atomicAdd)\((?=[^)])")
BEFORE, AFTER = r"(?:(?<=\()|(?<=; )|(?<=&& )|(?<=\|\| ))", r"(?=;|\)| &&| \|\|| \?)"
LESS = re.compile(rf"{BEFORE}({VALUE}(?: [+*] {VALUE})*) < ({EXTENT}){AFTER}")
# of no kernel
HOST = re.compile(r"Stream stream|^inline|^int |^#|^FL_EXPORT|^FL_ARGUMENTS|^FL_PUBLIC")
COMPILE_TIME = ("constexpr", "static_assert", "template", "#", "//")


def plant(file: Path, faults: list[Fault]) -> str:
    """The file with all faults, added to those before: no barrier, one further, <= for <."""
    in_host = False
    lines = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line and not line[0].isspace() and not line.startswith("}"):
            in_host = bool(HOST.search(line))

        def note(kind: str, n: int = number, shown: str = line.strip()) -> int:
            faults.append(Fault(kind, file.name, n, shown))
            return len(faults) - 1

        if not in_host and not line.lstrip().startswith(COMPILE_TIME) and "constexpr" not in line:
            line = BARRIER.sub(lambda m: f"if (!planted({note('no barrier')})) {m[0]}", line)
            line = ACCESS.sub(lambda m: f"{m[0]}planted({note('one further')}) + ", line)
            line = LESS.sub(
                lambda m: f"(planted({note('<=')}) ? {m[1]} <= {m[2]} : {m[1]} < {m[2]})", line
            )
        lines.append(line)
    return "\n".join(lines) + "\n"


def build(source: str, folder: Path) -> tuple[Path, list[Fault]]:
    """The library of one source, a file or a folder of them, with all faults; and the faults."""
    faults: list[Fault] = []
    home = CUDA / source
    for file in sorted(home.iterdir()) if home.is_dir() else [home.with_suffix(".cu")]:
        (folder / file.name).write_text(plant(file, faults))
    declared, defined, out = folder / "declared.h", folder / "defined.cu", folder / "planted.so"
    declared.write_text(PLATFORM + DECLARATION)
    defined.write_text(DEFINITION.format(count=len(faults)))
    others = [CUDA / f"{name}.cu" for name in BESIDE.get(source, ())]
    # what a planted file includes from beside it is planted, too; the rest is where it was
    flags = (f"-I{home}", "-include", str(declared))
    cuda_harness.build([*folder.glob("*.cu"), *others], out, *flags)
    return out, faults


def seeded(check: Callable[[], None], seed: str) -> Callable[[], None]:
    """The case, with blocks and threads in this seed's order."""

    def run() -> None:
        import torch

        os.environ["FUSED_LOSSES_CUDA_SEED"] = seed
        torch.manual_seed(0)
        check()

    return run


def unnoticed(source: str, folder: Path) -> dict:
    path, faults = build(source, folder)
    os.environ |= {"FUSED_LOSSES_CUDA_ON_HOST": "1", "FUSED_LOSSES_CUDA_LIBRARY": str(path)}
    # a process whose autograd has threads for GPUs cannot be forked
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # small grids: blocks go round their loops
    os.environ["FUSED_LOSSES_CUDA_PROCESSORS"] = "1"
    import torch
    from cuda_cases import CASES

    from fused_losses.backends.cuda import launch as cuda_launch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is full of NaN
    library = cuda_launch.library()
    runs = [
        Run(seeded(case.check, seed)) for case in CASES if case.source == source for seed in SEEDS
    ]
    runs = quickest_first(runs, library, len(faults))
    left = [asdict(f) for i, f in enumerate(faults) if not noticed(i, runs, library)]
    return {"planted": len(faults), "unnoticed": left}


if __name__ == "__main__":
    print(json.dumps(unnoticed(sys.argv[1], Path(sys.argv[2]))))

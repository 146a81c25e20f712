"""Faults planted in the project's own CUDA sources, one at a time, and whether a case notices.

python cuda_mutants.py SOURCE FOLDER prints the faults that no case of the source noticed, as JSON.
All faults are built at once, each behind a test of one number; every fault runs in its own process,
since it may crash or hang.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import cuda_harness

CUDA = cuda_harness.CSRC / "cuda"
# what a source's operations launch besides its own kernels
BESIDE = {"row_statistics": ("gather",)}
SEEDS = ("0", "1", "2")
SECONDS = 20  # of a fault, or it hangs
PREAMBLE = """#include "platform.h"
extern "C" __attribute__((visibility("default"))) int fused_losses_mutant;
int fused_losses_mutant = -1;
static inline int planted(int fault) { return fused_losses_mutant == fault; }
"""
VALUE = r"[A-Za-z_][\w.]*(?:->\w+|\[\w+\])*"
EXTENT = r"(?!k[A-Z]|N\b)" + VALUE  # not a constant: registers, which only a sanitizer sees
BARRIER = re.compile(r"(__syncthreads|__syncwarp)\(\);")
ACCESS = re.compile(r"(?<![\w.])(ld|st|ld_pack|st_pack|ld_many<\w+>|atomicAdd)\((?=[^)])")
BEFORE, AFTER = r"(?:(?<=\()|(?<=; )|(?<=&& )|(?<=\|\| ))", r"(?=;|\)| &&| \|\|| \?)"
LESS = re.compile(rf"{BEFORE}({VALUE}(?: [+*] {VALUE})*) < ({EXTENT}){AFTER}")
# of no kernel
HOST = re.compile(r"Stream stream|^inline|^int |^#|^FL_EXPORT|^FL_ARGUMENTS|^FL_PUBLIC")
COMPILE_TIME = ("constexpr", "static_assert", "template", "#", "//")


@dataclass(frozen=True)
class Fault:
    kind: str
    line: int
    text: str


def plant(text: str) -> tuple[str, list[Fault]]:
    """The source with all faults, and what they are: no barrier, one further, <= for <."""
    faults: list[Fault] = []
    in_host = False
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if line and not line[0].isspace() and not line.startswith("}"):
            in_host = bool(HOST.search(line))

        def note(kind: str, n: int = number, shown: str = line.strip()) -> int:
            faults.append(Fault(kind, n, shown))
            return len(faults) - 1

        if not in_host and not line.lstrip().startswith(COMPILE_TIME) and "constexpr" not in line:
            line = BARRIER.sub(lambda m: f"if (!planted({note('no barrier')})) {m[0]}", line)
            line = ACCESS.sub(lambda m: f"{m[0]}planted({note('one further')}) + ", line)
            line = LESS.sub(
                lambda m: f"(planted({note('<=')}) ? {m[1]} <= {m[2]} : {m[1]} < {m[2]})", line
            )
        lines.append(line)
    return PREAMBLE + "\n".join(lines) + "\n", faults


def build(source: str, folder: Path) -> tuple[Path, list[Fault]]:
    text, faults = plant((CUDA / f"{source}.cu").read_text())
    planted, out = folder / f"{source}.cu", folder / f"lib{source}.so"
    planted.write_text(text)
    others = [str(CUDA / f"{name}.cu") for name in BESIDE.get(source, ())]
    files = [str(planted), *others, str(cuda_harness.SIMULATOR)]
    command = ["g++", *cuda_harness.FLAGS, "-shared", "-xc++", *files, "-o", str(out), "-ldl"]
    subprocess.run(command, check=True)
    return out, faults


def noticed(fault: int, cases: list) -> bool:
    """Whether a case fails, crashes or hangs with the fault; tried in a process of its own."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        from fused_losses.backends.cuda import launch as cuda_launch

        ctypes.c_int.in_dll(cuda_launch.library(), "fused_losses_mutant").value = fault
        for case in cases:
            for seed in SEEDS:
                os.environ["FUSED_LOSSES_CUDA_SEED"] = seed
                try:
                    case.check()
                except Exception:
                    os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def unnoticed(source: str, folder: Path) -> dict:
    library, faults = build(source, folder)
    os.environ |= {"FUSED_LOSSES_CUDA_ON_HOST": "1", "FUSED_LOSSES_CUDA_LIBRARY": str(library)}
    # small grids: blocks go round their loops
    os.environ["FUSED_LOSSES_CUDA_PROCESSORS"] = "1"
    import torch
    from cuda_cases import CASES

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is full of NaN
    cases = [case for case in CASES if case.source == source]
    assert cases and not noticed(-1, cases), "the cases fail without any fault"
    left = [asdict(f) for i, f in enumerate(faults) if not noticed(i, cases)]
    return {"planted": len(faults), "unnoticed": left}


if __name__ == "__main__":
    print(json.dumps(unnoticed(sys.argv[1], Path(sys.argv[2]))))

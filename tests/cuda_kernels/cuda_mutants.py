"""Faults planted in the project's own CUDA sources, one at a time, and whether a case notices.

python cuda_mutants.py SOURCE FOLDER prints the faults that no case of the source noticed, as JSON.
All faults are built at once, each behind a test of one number that also notes that it was asked.
Every fault runs in its own process, since it may crash or hang, and only on the cases that ask for
it: on the others the machine does the same as without it. The quickest case comes first.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cuda_harness

CUDA = cuda_harness.CSRC / "cuda"
# what a source's operations launch besides its own kernels
BESIDE = {
    "row_statistics": ("gather",),
    "pairs": ("distances/products", "distances/gradient"),
}
SEEDS = ("0", "1", "2")
SECONDS = 20  # of a fault, or it hangs
DECLARATION = """#include "platform.h"
extern "C" __attribute__((visibility("default"))) int fused_losses_mutant;
extern "C" __attribute__((visibility("default"))) char fused_losses_asked[];
static inline int planted(int fault) {
  fused_losses_asked[fault] = 1;
  return fused_losses_mutant == fault;
}
"""
DEFINITION = "int fused_losses_mutant = -1;\nchar fused_losses_asked[{count}];\n"
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
    file: str
    line: int
    text: str


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
    declared.write_text(DECLARATION)
    defined.write_text(DEFINITION.format(count=len(faults)))
    others = [CUDA / f"{name}.cu" for name in BESIDE.get(source, ())]
    # what a planted file includes from beside it is planted, too; the rest is where it was
    flags = (f"-I{home}", "-include", str(declared))
    cuda_harness.build([*folder.glob("*.cu"), *others], out, *flags)
    return out, faults


@dataclass(frozen=True)
class Run:
    """A case under one seed: without a fault, how long it takes and which faults it asks for."""

    check: Callable[[], None]
    seed: str
    seconds: float = 0.0
    asked: frozenset[int] = frozenset()

    def __call__(self) -> None:
        import torch

        os.environ["FUSED_LOSSES_CUDA_SEED"] = self.seed
        torch.manual_seed(0)
        self.check()


def traced(run: Run, library: ctypes.CDLL, count: int) -> Run:
    asked = (ctypes.c_char * count).in_dll(library, "fused_losses_asked")
    ctypes.memset(asked, 0, count)
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    return replace(
        run, seconds=seconds, asked=frozenset(i for i in range(count) if asked[i] != b"\0")
    )


def noticed(fault: int, runs: list[Run], library: ctypes.CDLL) -> bool:
    """Whether a run fails, crashes or hangs with the fault; tried in a process of its own."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        ctypes.c_int.in_dll(library, "fused_losses_mutant").value = fault
        for run in runs:
            if fault in run.asked:
                signal.alarm(SECONDS)
                try:
                    run()
                except Exception:
                    os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


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
    runs = [Run(case.check, seed) for case in CASES if case.source == source for seed in SEEDS]
    runs = [traced(run, library, len(faults)) for run in runs]
    runs.sort(key=lambda run: run.seconds)
    left = [asdict(f) for i, f in enumerate(faults) if not noticed(i, runs, library)]
    return {"planted": len(faults), "unnoticed": left}


if __name__ == "__main__":
    print(json.dumps(unnoticed(sys.argv[1], Path(sys.argv[2]))))

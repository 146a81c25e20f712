"""What an import costs beyond torch's own: CPU time on one thread, each in a process of its own.

    python benchmarks/imports.py [--processes 9]

The least and the median of the processes, in turn, and how many modules came. Of the least time
what is registered with torch's dispatcher is told apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

STATEMENTS = (
    "import fused_losses",
    "from fused_losses import info_nce",
    "from fused_losses import margin_softmax",
    "from fused_losses.losses import CircleLoss",
    "from fused_losses import ClassCenters",
    "from fused_losses import *",
)
TIMED = """
import sys, time, torch
from torch import library
spent, within = 0.0, False
def timed(function):
    def call(*given, **options):
        global spent, within
        if within:
            return function(*given, **options)
        within, start = True, time.process_time()
        try:
            return function(*given, **options)
        finally:
            within, spent = False, spent + time.process_time() - start
    return call
for name in ("register_fake", "register_autograd"):
    setattr(library, name, timed(getattr(library, name)))
for name in ("define", "impl"):
    setattr(library.Library, name, timed(getattr(library.Library, name)))
before, start = len(sys.modules), time.process_time()
exec(sys.argv[1])
print(time.process_time() - start, spent, len(sys.modules) - before)
"""


def once(statement: str) -> tuple[float, float, int]:
    command = [sys.executable, "-c", TIMED, statement]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, ops, modules = told.stdout.split()
    return float(seconds), float(ops), int(modules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=9)
    processes = parser.parse_args().processes
    found: dict[str, list[tuple[float, float, int]]] = {s: [] for s in STATEMENTS}
    for _ in range(processes):
        for statement in STATEMENTS:
            found[statement].append(once(statement))
    print("| import | least, ms | of it ops | median | modules |\n|---|---|---|---|---|")
    for statement, runs in found.items():
        least, ops, modules = min(runs)
        median = statistics.median(seconds for seconds, *_ in runs)
        times = " | ".join(f"{1e3 * value:.0f}" for value in (least, ops, median))
        print(f"| `{statement}` | {times} | {modules} |")


if __name__ == "__main__":
    main()

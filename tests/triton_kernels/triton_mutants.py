"""Faults planted in the Triton kernels, and whether their cases notice, in Triton's interpreter.

python triton_mutants.py [GROUP ...] [--one-in K] [--runs FOLDER] tries every fault of
`triton_planting` in the groups of `GROUPS` (K: those of every K-th place alone) by the group's
cases. Prints a line a group; fails if a fault that nothing notices is not among the
`triton_survivors`.

A process imports a copy of the package whose kernels have all faults, runs each case once without
one, which tells the faults that it asks for, and then forks for every fault, on the cases that ask
for it. What was tried is kept in runs/mutants, or FOLDER, until the kernels or the cases change: a
run that is ended goes on from there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cpu_mutants import drawn
from dispatch_mutants import Record, Warm
from mutants import Fault, unexplained
from places import ROOT, TESTS, search_path
from triton_planting import plant
from triton_survivors import SURVIVORS

PACKAGE = ROOT / "fused_losses"
OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "-p", "triton_patched_once", "-n", "0")


class Group(NamedTuple):
    """Files of kernels in the package, and those of their cases."""

    kernels: tuple[str, ...]
    cases: tuple[str, ...]

    def sources(self) -> list[Path]:
        found = [path for each in self.kernels for path in sorted(PACKAGE.glob(each))]
        return [path for path in found if "@triton.jit" in path.read_text()]

    def tests(self) -> list[Path]:
        return [TESTS / "triton_kernels" / f"triton_{name}.py" for name in self.cases]


GROUPS = {
    "row_statistics": Group(("primitives/row_statistics/triton_*.py",), ("cases",)),
    "class_rules": Group(("primitives/class_rules/triton_*.py",), ("class_cases",)),
    "divergence": Group(("primitives/divergence/triton_*.py",), ("divergence_cases",)),
    "pairs": Group(("primitives/pairs/triton_*.py",), ("pair_cases", "apart_cases", "drawn_cases")),
    "topk": Group(("primitives/topk/triton_*.py",), ("topk_cases",)),
    "distances": Group(("primitives/distances/triton_*.py",), ("distance_cases",)),
    "maxsim": Group(("primitives/maxsim/triton_*.py",), ("maxsim_cases",)),
    "vectors": Group(("backends/triton/triton_*.py",), ("target_cases", "unit_cases")),
    "shared": Group(("backends/triton/tile_math.py",), ("maxsim_cases", "class_cases")),
}


def planted(name: str, folder: Path | None = None) -> list[Fault]:
    """The faults of a group; folder: where a package with them is written."""
    faults: list[Fault] = []
    if folder:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored, symlinks=True)
    for path in GROUPS[name].sources():
        at = path.relative_to(PACKAGE)
        text = plant(path.read_text(), str(at), faults)
        if folder:
            (folder / PACKAGE.name / at).write_text(text)
    return faults


def record(name: str, faults: list[Fault], runs: Path) -> Record:
    files = [Path(__file__), Path(__file__).with_name("triton_planting.py")]
    files += [*GROUPS[name].sources(), *GROUPS[name].tests()]
    return Record(faults, runs, f"triton_{name}", files)


def try_all(name: str, one_in: int, runs: Path) -> int:
    """In the process whose package has the faults: records how each that is due shows."""
    # before pytest puts the checkout first on the path
    there = Path(str(importlib.import_module(PACKAGE.name).__file__))
    assert there.is_relative_to(runs), there
    faults = planted(name)
    known = record(name, faults, runs)
    due = [n for n, key in enumerate(known.keys) if drawn(key, one_in) and n not in known.known()]
    tests = [str(path) for path in GROUPS[name].tests()]
    return pytest.main([*OPTIONS, f"--rootdir={ROOT}", *tests], [Warm(due, faults, known)])


def run(name: str, one_in: int, runs: Path) -> int:
    """Tries what is due, and says what showed; 0: all that did not is explained."""
    faults = planted(name)
    known = record(name, faults, runs)
    asked = [n for n, key in enumerate(known.keys) if drawn(key, one_in)]
    if any(n not in known.known() for n in asked):
        folder = runs / f"triton_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        planted(name, folder)
        path = os.pathsep.join([str(folder), search_path()])
        environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}
        command = [sys.executable, __file__, name, "--one-in", str(one_in), "--runs", str(runs)]
        told = subprocess.run(
            [*command, "--here"], env=environment, capture_output=True, text=True, cwd=ROOT
        )
        if told.returncode:
            raise RuntimeError(f"{name} does not run without a fault:\n{told.stdout[-4000:]}")
    shown = {n: known.known()[n] for n in asked}
    counts = Counter(how or "unnoticed" for how in shown.values())
    noticed = sum(counts[how] for how in ("fails", "crashes", "hangs"))
    some = f", 1 place in {one_in}," if one_in > 1 else ""
    print(
        f"{name}: {noticed} of {len(shown)} faults{some} noticed "
        f"({100 * noticed / max(len(shown), 1):.1f} %), {counts['not asked']} not asked",
        flush=True,
    )
    left = [faults[n] for n, how in shown.items() if how in ("", "not asked")]
    left = unexplained(left, SURVIVORS.get(name, []))
    for fault in left:
        print(f"  {fault.kind}: {fault.file}:{fault.line}: {fault.text}", flush=True)
    return bool(left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], default=[])
    parser.add_argument("--one-in", type=int, default=1)
    # where what was tried is kept
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "mutants")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    runs = given.runs.resolve()
    if given.here:
        return try_all(given.groups[0], given.one_in, runs)
    return max(run(name, given.one_in, runs) for name in given.groups or GROUPS)


if __name__ == "__main__":
    raise SystemExit(main())

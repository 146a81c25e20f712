"""The Triton kernels under every Triton that a supported PyTorch pins (tritons.csv).

    python -m tools.tritons [VERSION ...]

Each is installed alone, into build/tritons, and stands before the daily one on the path of a
process that interprets the kernels' cases and of one that compiles them for every target. Prints a
line each; exits with 1 unless all pass. Known differences are in docs/gpu.md.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_suffix(".csv")
FOLDER = ROOT / "build" / "tritons"
CASES = ROOT / "tests" / "triton_kernels"
RUNS = {
    "interpreted": (["-p", "triton_patched_once"], {"TRITON_INTERPRET": "1"}),
    "compiled": (["-m", "gate", "tests/commands/test_gpu_static.py"], {"TRITON_INTERPRET": "0"}),
}


def versions() -> dict[str, list[str]]:
    """Each Triton, with the versions of PyTorch that pin it."""
    found: dict[str, list[str]] = {}
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["triton"], []).append(row["torch"])
    return found


def installed(version: str) -> Path:
    """The folder of a Triton, installed when first asked for."""
    folder = FOLDER / version
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), f"triton=={version}"], check=True)
    return folder


def results(version: str) -> Iterator[tuple[str, bool, str]]:
    """What ran, whether all of it passed, and pytest's last line."""
    tests = [str(ROOT / "tests"), str(ROOT / "tests" / "support"), str(CASES)]
    for name, (arguments, settings) in RUNS.items():
        path = os.pathsep.join([str(installed(version)), str(ROOT), *tests])
        cache = str(FOLDER / f"cache-{version}")
        environment = os.environ | settings | {"PYTHONPATH": path, "TRITON_CACHE_DIR": cache}
        files = sorted(map(str, CASES.glob("*_cases.py"))) if name == "interpreted" else []
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        command += [*arguments, *files]
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        told = [line for line in run.stdout.splitlines() if re.search(r"\d+ (passed|failed)", line)]
        yield name, run.returncode == 0, told[-1] if told else "no tests ran"


def main(asked: list[str]) -> int:
    known = versions()
    all_passed = True
    for version in asked or known:
        for name, passed, line in results(version):
            of = ", ".join(known.get(version, ["no PyTorch"]))
            print(f"triton {version} (torch {of}), {name}: {line}", flush=True)
            all_passed &= passed
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What need not run again while its files stay as they are: mutants, sanitizers, lower CPUs, what
Triton compiles for every target, and the PTX of all kernels in the emulator.

    python -m tools.proofs run NAME [--full] [--until TIME] COMMAND ...
    python -m tools.proofs hash

`run` runs the command unless NAME was proven on the same contents (--full: always; --until: until
that time, in seconds of the epoch, after which what is proven is not proven again), and records the
contents in tests/proven.json once it succeeds, with the tools that were there: where one is
absent the tests that need it are left out, and a machine that has more of them proves it again.
`hash` prints one hash over all proofs' files. NAME may carry what else the proof depends on, as in
ctest:avx2. Needs neither git nor torch.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).parent.parent
RECORD = Path("tests", "proven.json")
SUFFIXES = (".c", ".cpp", ".cu", ".h", ".py", ".txt", ".cmake")
KERNELS = ("csrc/*", "CMakeLists.txt", "setup.py")
# also the kernels' launchers in Python, and the cases and the harness that look for faults
CUDA = (
    *KERNELS,
    "fused_losses/*cuda*",
    "fused_losses/*gpu*",
    "tests/*cuda*",
    "tests/triton_kernels/*",  # whose cases the CUDA kernels share
    "tests/support/mutants.py",
    "tests/conftest.py",
)
# what decides which Triton kernels are launched and how they are compiled and read
TRITON = (
    *(f"fused_losses/{room}/*" for room in ("base", "backends", "primitives")),
    "fused_losses/bench/roofline/trace.py",
    "tools/gpu_static/*",
    "tests/commands/test_gpu_static.py",
    "requirements-tested.txt",
)
PTX = (*CUDA, *TRITON, "tests/support/*")
# each proof's files; a * also crosses folders
PROOFS = {"mutants": CUDA, "sanitizers": CUDA, "ctest": KERNELS, "gate": TRITON, "ptx": PTX}

# what a part of a proof's tests needs
TOOLS = {
    "mutants": ("triton",),
    "sanitizers": ("triton",),
    "gate": ("triton", "nvcc"),
    "ptx": ("triton", "nvcc", "emulator"),
}


def tools(name: str, root: Path = ROOT) -> list[str]:
    """Those of a proof's that this machine has."""
    there = {
        "triton": importlib.util.find_spec("triton") is not None,
        "nvcc": shutil.which("nvcc") is not None,
        "emulator": (root.parent / "shared" / "ptxsim").is_dir(),
    }
    return sorted(tool for tool in TOOLS.get(name.partition(":")[0], ()) if there[tool])


def files(name: str, root: Path = ROOT) -> list[Path]:
    """The proof's files, relative to the root, in one order everywhere."""
    patterns = PROOFS[name.partition(":")[0]]
    # only these folders are walked, and not .venv or build
    tops = {pattern.partition("/")[0] for pattern in patterns if "/" in pattern}
    found = [path for top in tops for path in (root / top).rglob("*")] + list(root.glob("*"))
    relative = (path.relative_to(root) for path in found if path.is_file())
    return sorted(
        path
        for path in relative
        if path.suffix in SUFFIXES
        and any(fnmatchcase(path.as_posix(), pattern) for pattern in patterns)
    )


def content_hash(names: Iterable[str], root: Path = ROOT) -> str:
    """Of the names and contents of these proofs' files."""
    return content_hash_of((path for name in names for path in files(name, root)), root)


def content_hash_of(paths: Iterable[Path], root: Path = ROOT) -> str:
    """Of the names, relative to the root, and contents of these files."""
    out = hashlib.sha256()
    for path in sorted({*paths}):
        body = (root / path).read_bytes()
        out.update(f"{path.as_posix()}\0{len(body)}\0".encode() + body)
    return out.hexdigest()[:16]


class Proof(TypedDict):
    """What a proof last succeeded on."""

    contents: str
    tools: list[str]


def proven(root: Path = ROOT) -> dict[str, Proof]:
    """The record; empty when there is none."""
    path = root / RECORD
    return json.loads(path.read_text()) if path.is_file() else {}


def run(
    name: str,
    command: list[str],
    full: bool = False,
    until: float = math.inf,
    root: Path = ROOT,
) -> int:
    """Runs the proof's command where it is due, and says so where it is not; its exit status."""
    now, there = content_hash([name], root), tools(name, root)
    before = proven(root).get(name)
    known = before is not None and before["contents"] == now and {*there} <= {*before["tools"]}
    late = time.time() > until
    if known and (late or not full):
        why = "no time is left to prove it again" if full else "FULL=1 runs it"
        print(f"{name}: not run, unchanged since proven ({now}); {why}", flush=True)
        return 0
    print(
        f"{name}: running, {'FULL=1' if full else 'its files or tools have changed'} ({now})",
        flush=True,
    )
    status = subprocess.run(command, cwd=root).returncode
    # one with fewer tools takes no place of one with more
    less = before is not None and known and before["tools"] != there
    if status == 0 and content_hash([name], root) == now and not less:
        proof = Proof(contents=now, tools=there)
        record = json.dumps(proven(root) | {name: proof}, indent=2, sort_keys=True)
        (root / RECORD).write_text(record + "\n")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="proofs", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("hash")
    runs = verbs.add_parser("run")
    runs.add_argument("name")
    runs.add_argument("--full", action="store_true")
    runs.add_argument("--until", type=float, default=math.inf)
    runs.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.verb == "hash":
        print(content_hash(PROOFS))
        return 0
    if given.name.partition(":")[0] not in PROOFS or not given.command:
        parser.error(f"expected one of {', '.join(PROOFS)} and a command")
    return run(given.name, given.command, given.full, given.until)


if __name__ == "__main__":
    raise SystemExit(main())

"""Faults planted in the Python that chooses who runs, and whether the tests of dispatch notice.

python dispatch_mutants.py [--one-in K] [--runs FOLDER] tries every fault of `dispatch_planting` in
`SOURCES` (K: those of every K-th place alone) by `TESTS`. Prints a line a file; fails if a fault
that nothing notices is not among the `dispatch_survivors`, or if fewer than `LEAST` are noticed.

A process imports torch and pytest. Its child imports the package with all faults in it, runs each
test once without one, which tells the faults that it asks for, and then forks for every fault, on
the tests that ask for it. What is asked while the package is imported is tried by all tests: of
tables and reasons in a child that loads the file again, of what is registered or kept in one that
imports the package anew. What was tried is kept in runs/mutants, or FOLDER, until the sources or
the tests change: a run that is ended goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import dispatch_planting
import pytest
from cpu_mutants import drawn, keys
from dispatch_planting import ASKED, plant
from dispatch_survivors import SURVIVORS
from mutants import Fault, unexplained
from places import ROOT

LEAST = 0.95
SECONDS = 20  # beyond what the tests take: it hangs
SECONDS_ANEW = 600  # all tests in a process of its own
# of each file the functions that choose; (): all of it
SOURCES: dict[str, tuple[str, ...]] = {
    "backends/__init__.py": (),
    "backends/table.py": (),
    "backends/reference/capability.py": (),
    "backends/bounded/capability.py": (),
    "backends/cpu/capability.py": (),
    "backends/triton/capability.py": (),
    "backends/cuda/capability.py": (),
    "backends/cuda/launch.py": ("on_host", "path", "absent", "built", "unusable", "no_code_on"),
    "base/compiled.py": (),
    "primitives/op.py": ("op", "form", "__call__", "run_backward", "define"),
    "primitives/pairs/op.py": ("_backend",),
    "primitives/distances/op.py": ("choose", "operation_of"),
    "primitives/row_update/op.py": ("_run",),
    "primitives/topk/op.py": ("select", "best_screen"),
}
TESTS = (
    "tests/backends/test_dispatch.py",
    "tests/backends/test_dispatch_choices.py",
    "tests/backends/test_dispatch_reasons.py",
    "tests/backends/test_dispatch_ways.py",
    "tests/cuda_kernels/test_cuda_capability.py",
    "tests/cuda_kernels/test_cuda_launch.py",
    "tests/primitives/test_plain_calls.py",
)
# what others read through the module alone, so that it may be loaded again
LOADED_AGAIN = ("table.py", "capability.py")
OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "-n", "0", "-m", "not (processes or slow)")

active = -1  # the fault that is there
asked: set[int] = set()


def planted(number: int) -> bool:
    asked.add(number)
    return number == active


# Dynamo asks while it traces, as it does of what backends.reasons_against says
planted._dynamo_marked_constant = True


class Loader(SourceFileLoader):
    """A module with its faults."""

    def __init__(self, name: str, path: str, code: Any) -> None:
        super().__init__(name, path)
        self.code = code

    def get_code(self, fullname: str) -> Any:
        return self.code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[ASKED] = planted
        super().exec_module(module)


def module_of(file: str) -> str:
    name = file.removesuffix(".py").removesuffix("/__init__")
    return f"fused_losses.{name.replace('/', '.')}"


class Planted(MetaPathFinder):
    """Finds the modules of SOURCES, and nothing else; all their faults."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.code = {}
        for at, within in SOURCES.items():
            path = ROOT / "fused_losses" / at
            tree = plant(path.read_text(), at, self.faults, within)
            self.code[module_of(at)] = path, compile(tree, str(path), "exec")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.code:
            return None
        file, code = self.code[name]
        folder = [str(file.parent)] if file.name == "__init__.py" else None
        loader = Loader(name, str(file), code)
        return spec_from_file_location(name, file, loader=loader, submodule_search_locations=folder)


def in_child(seconds: float, body: Callable[[], bool]) -> str:
    """How a child in which the body says whether all is well shows that it is not; "": it is."""
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        signal.alarm(int(seconds))
        status = 1
        try:
            status = 0 if body() else 1
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "hangs" if os.WTERMSIG(status) == signal.SIGALRM else "crashes"
    return "fails" if os.WEXITSTATUS(status) else ""


def set_active(fault: int) -> None:
    global active
    active = fault


class Record:
    """What is known of each fault, a line each; "" or "not asked": nothing notices it."""

    def __init__(self, faults: list[Fault], folder: Path, name: str, files: list[Path]) -> None:
        self.keys, self.folder = keys(faults), folder
        folder.mkdir(parents=True, exist_ok=True)
        contents = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
        self.path = folder / f"{name}.{contents}.jsonl"

    def known(self) -> dict[int, str]:
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        found = dict(json.loads(line) for line in lines)
        return {n: found[key] for n, key in enumerate(self.keys) if key in found}

    def add(self, fault: int, shown: str) -> None:
        with self.path.open("a") as out:
            out.write(json.dumps([self.keys[fault], shown]) + "\n")


class Warm:
    """In place of pytest's loop: the tests without a fault, then those that ask for each."""

    def __init__(self, due: list[int], faults: list[Fault], record: Record) -> None:
        self.due, self.faults, self.record = due, faults, record

    def run(self, session: pytest.Session, item: pytest.Item) -> bool:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return not session.testsfailed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        at_import = frozenset(asked)
        runs = []
        for item in session.items:
            asked.clear()
            begin = time.perf_counter()
            if not self.run(session, item):
                raise RuntimeError(f"{item.nodeid} fails without a fault")
            runs.append((time.perf_counter() - begin, frozenset(asked), item))
        runs.sort(key=lambda run: run[0])

        def tried(fault: int, asking: list, again: str = "") -> str:
            def body() -> bool:
                set_active(fault)
                if again:
                    importlib.reload(sys.modules[again])
                return all(self.run(session, item) for *_, item in asking)

            return in_child(SECONDS + 4 * sum(run[0] for run in asking), body)

        for fault in self.due:
            file = self.faults[fault].file
            asking = [run for run in runs if fault in run[1]]
            shown = tried(fault, asking) if asking else "not asked"
            if shown in ("", "not asked") and fault in at_import:
                again = module_of(file) if file.endswith(LOADED_AGAIN) else ""
                shown = tried(fault, runs, again) if again else "at import"
            if shown != "at import":
                self.record.add(fault, shown)
        return True


def tests() -> list[str]:
    return [*OPTIONS, f"--rootdir={ROOT}", *(str(ROOT / test) for test in TESTS)]


def try_all(due: list[int], faults: list[Fault], record: Record) -> None:
    """Records how each of these faults shows."""
    log = record.folder / "dispatch.log"
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os._exit(pytest.main(tests(), plugins=[Warm(due, faults, record)]))
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"the tests do not run without a fault:\n{log.read_text()[-4000:]}")
    known = record.known()
    for fault in [each for each in due if each not in known]:

        def anew(fault: int = fault) -> bool:
            set_active(fault)
            return pytest.main(tests()) == 0

        record.add(fault, in_child(SECONDS_ANEW, anew))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one-in", type=int, default=1)
    # where what was tried is kept
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "mutants")
    given: Any = parser.parse_args()
    os.chdir(ROOT)
    finder = Planted()
    sys.meta_path.insert(0, finder)
    files = [Path(__file__), *map(ROOT.joinpath, TESTS), Path(dispatch_planting.__file__)]
    files += [ROOT / "fused_losses" / at for at in SOURCES]
    record = Record(finder.faults, given.runs.resolve(), "dispatch", files)
    drawn_here = [n for n, key in enumerate(record.keys) if drawn(key, given.one_in)]
    due = [fault for fault in drawn_here if fault not in record.known()]
    if due:
        try_all(due, finder.faults, record)
    known = record.known()
    found = {fault: known[fault] for fault in drawn_here}
    counts: dict[str, Counter] = defaultdict(Counter)
    for fault, shown in found.items():
        counts[finder.faults[fault].file][shown or "unnoticed"] += 1
    some = f", 1 place in {given.one_in}," if given.one_in > 1 else ""
    noticed = 0
    for file, ways in counts.items():
        seen = sum(ways[how] for how in ("fails", "crashes", "hangs"))
        noticed += seen
        print(
            f"{file}: {seen} of {ways.total()} faults{some} noticed "
            f"({100 * seen / ways.total():.1f} %), {ways['not asked']} not asked"
        )
    left = [finder.faults[fault] for fault, shown in found.items() if shown in ("", "not asked")]
    left = unexplained(left, SURVIVORS)
    for fault in left:
        print(f"  {fault.kind}: {fault.file}:{fault.line}: {fault.text}")
    share = noticed / max(len(found), 1)
    print(f"dispatch: {noticed} of {len(found)} in all, {100 * share:.1f} %", flush=True)
    return bool(left) or (given.one_in == 1 and share < LEAST)


if __name__ == "__main__":
    import hypothesis  # noqa: F401 (imported before the children are made)
    import torch

    torch.set_num_threads(1)
    raise SystemExit(main())

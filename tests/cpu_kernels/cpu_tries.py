"""Tries the faults of one source: started by `cpu_mutants` where its extension is built.

python cpu_tries.py SOURCE ONE_IN, under AddressSanitizer, and with the package that has the faults
first on the path.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable

import torch
from cpu_mutants import EXTENSION, RUNS, SOURCES, built, contents, drawn, keys, tried
from drawn_runs import CASES, checks
from mutants import Run, noticed, quickest_first

from fused_losses import _C

MOST_CALLS = 40  # functions that are called for a fault: the quickest of those that ask for it


def case(library: ctypes.CDLL, name: str) -> Callable[[], None]:
    function = library[f"run_{name}"]
    arguments = (ctypes.c_char_p * 3)(b"test", b"default", None)

    def run() -> None:
        if function(2, arguments):
            raise AssertionError(name)

    return run


def try_all(name: str, one_in: int) -> None:
    """Each fault that is due, a line each."""
    faults = built(name)
    torch.set_num_threads(1)
    # fresh memory for every call, full of NaN
    torch.use_deterministic_algorithms(True)
    extension = RUNS / name / "package" / "fused_losses" / EXTENSION
    assert extension.samefile(str(_C.__file__)), _C.__file__
    library = ctypes.CDLL(str(extension))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    known = bytes((ctypes.c_char * len(faults)).in_dll(library, "fused_losses_known"))
    tests = [Run(case(library, test)) for test in SOURCES[name].tests]
    runs = quickest_first(tests, library, len(faults))
    calls = [Run(checks(name, library.fused_losses_blas)) for name in CASES]
    calls = quickest_first(calls, library, len(faults))
    asked = frozenset().union(*(run.asked for run in (*runs, *calls)))
    before = tried(name)
    with (RUNS / f"{name}.{contents(SOURCES[name])}.jsonl").open("a") as out:
        for number, key in enumerate(keys(faults)):
            if key in before or not drawn(key, one_in):
                continue
            if number in asked:
                asking = [run for run in calls if number in run.asked]
                shown = noticed(number, [*runs, *asking[:MOST_CALLS]], library)
            else:
                shown = "" if known[number] else "not compiled"
                shown = shown or "not asked"
            out.write(json.dumps([key, shown]) + "\n")
            out.flush()


if __name__ == "__main__":
    try_all(sys.argv[1], int(sys.argv[2]))

"""Faults planted in the kernels' sources, one at a time, and whether a case notices.

All faults of a source are built at once, each behind a test of one number that also notes that it
was asked. Every fault runs in its own process, since it may crash or hang, and only on the cases
that ask for it: on the others the machine does the same as without it. The quickest comes first.
`cuda_mutants` and `cpu_mutants` say what is planted, where, and which cases look.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

SECONDS = 20  # beyond what a case takes: it hangs
DECLARATION = """#include <type_traits>
extern "C" __attribute__((visibility("default"))) int fused_losses_mutant;
extern "C" __attribute__((visibility("default"))) char fused_losses_asked[];
[[gnu::always_inline]] inline constexpr bool planted(int fault) {
  if (std::is_constant_evaluated()) return false;
  // threads share the line: it is written once
  if (!fused_losses_asked[fault]) fused_losses_asked[fault] = 1;
  return fused_losses_mutant == fault;
}
"""
DEFINITION = "int fused_losses_mutant = -1;\nchar fused_losses_asked[{count}];\n"


@dataclass(frozen=True)
class Fault:
    kind: str
    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Run:
    """A case: without a fault, how long it takes and which faults it asks for."""

    check: Callable[[], object]
    seconds: float = 0.0
    asked: frozenset[int] = frozenset()


def traced(run: Run, library: ctypes.CDLL, count: int) -> Run:
    """The case, run once without a fault; it raises where that fails."""
    asked = (ctypes.c_char * count).in_dll(library, "fused_losses_asked")
    ctypes.memset(asked, 0, count)
    begin = time.perf_counter()
    run.check()
    seconds = time.perf_counter() - begin
    return replace(
        run, seconds=seconds, asked=frozenset(i for i in range(count) if asked[i] != b"\0")
    )


def noticed(fault: int, runs: Iterable[Run], library: ctypes.CDLL) -> str:
    """How a run shows the fault: it "fails", "crashes" or "hangs", or "" where none does.

    Tried in a process of its own.
    """
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        ctypes.c_int.in_dll(library, "fused_losses_mutant").value = fault
        for run in runs:
            if fault in run.asked:
                signal.alarm(int(SECONDS + 4 * run.seconds))
                try:
                    run.check()
                except Exception:
                    os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "hangs" if os.WTERMSIG(status) == signal.SIGALRM else "crashes"
    return {0: "", 1: "fails"}.get(os.WEXITSTATUS(status), "crashes")


def quickest_first(runs: list[Run], library: ctypes.CDLL, count: int) -> list[Run]:
    return sorted((traced(run, library, count) for run in runs), key=lambda run: run.seconds)


# a fault's kind, or ANY for all faults of a line; a part of its line; why nothing notices it
Survivor = tuple[str, str, str]
ANY = "any"


def unexplained(unnoticed: Iterable[Fault], survivors: Iterable[Survivor]) -> list[Fault]:
    """Those that no survivor stands for; each stands for one fault, or for all of a line."""
    survivors = list(survivors)
    lines = [text for kind, text, _ in survivors if kind == ANY]
    allowed = Counter((kind, text) for kind, text, _ in survivors if kind != ANY)
    left = []
    for fault in unnoticed:
        fitting = [k for k in allowed if k[0] == fault.kind and k[1] in fault.text]
        if any(text in fault.text for text in lines):
            continue
        if fitting and allowed[fitting[0]] > 0:
            allowed[fitting[0]] -= 1
        else:
            left.append(fault)
    return left

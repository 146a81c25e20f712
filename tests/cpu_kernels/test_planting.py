"""What the mutants of the C++ kernels are made of, on a source of a few lines."""

from __future__ import annotations

import ctypes
import subprocess
from collections import Counter
from pathlib import Path

import planting
import pytest
from cpu_mutants import SOURCES, files
from mutants import ANY, DECLARATION, DEFINITION, Fault, Run, noticed, quickest_first, unexplained
from places import ROOT

SOURCE = """#include <algorithm>
#if defined(__AVX2__)
inline int of_another_set(int a) { return a > 0 ? a : -a; }
#endif
inline long mixed(const long* x, long n, long stride, bool halve) {
  long sum = 0, best = 0;
  for (long i = 0; i < n; ++i) {
    sum += x[i * stride] - 1;  // what is said: a < b
    best = std::max(best, x[i * stride]);
  }
  if (halve && n > 3) sum /= 2;
  if (best == 0) return best;
  best += 0;
  return sum + best;
}
"""
TEST = """#include "declared.h"
#include "source.h"
extern "C" int run_test() {
  const long x[] = {3, 9, 1, 9, 4, 9, 2, 9, 900, 900};
  const bool right = mixed(x, 4, 2, true) == 7 && mixed(x, 3, 2, true) == 9 &&
                     mixed(x, 4, 2, false) == 10 && mixed(x, 0, 2, false) == 0;
  return right ? 0 : 1;
}
"""


@pytest.fixture(scope="module")
def planted() -> tuple[str, list[Fault]]:
    faults: list[Fault] = []
    return planting.plant(SOURCE, "source.h", faults, set()), faults


def test_each_kind_is_planted_where_it_can_be(planted: tuple[str, list[Fault]]) -> None:
    text, faults = planted
    assert len(text.splitlines()) == len(SOURCE.splitlines())
    assert Counter(fault.kind for fault in faults) == {
        "bound": 2,
        "equal": 1,
        "always": 2,
        "never": 2,
        "sign": 2,
        "factor": 2,
        "further": 2,
        "extreme": 1,
        "dropped": 4,
    }
    assert "of_another_set(int a) { return a > 0 ? a : -a; }" in text
    assert "// what is said: a < b" in text


def test_a_line_is_left_out(planted: tuple[str, list[Fault]]) -> None:
    fewer: list[Fault] = []
    planting.plant(SOURCE, "source.h", fewer, {("source.h", 8)})
    assert [f for f in planted[1] if f.line != 8] == fewer != planted[1]


def test_faults_are_noticed_but_for_those_that_change_nothing(
    planted: tuple[str, list[Fault]], tmp_path: Path
) -> None:
    text, faults = planted
    defined = DEFINITION + "char fused_losses_known[{count}];"
    (tmp_path / "declared.h").write_text(DECLARATION + planting.HELPERS)
    (tmp_path / "source.h").write_text(text)
    (tmp_path / "test.cpp").write_text(
        TEST + 'extern "C" {\n' + defined.format(count=len(faults)) + "\n}\n"
    )
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "test.cpp", "-o", "planted.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "planted.so"))

    def check() -> None:
        assert library.run_test() == 0

    runs = quickest_first([Run(check)], library, len(faults))
    assert runs[0].asked == {*range(len(faults))}
    left = [fault for number, fault in enumerate(faults) if not noticed(number, runs, library)]
    nothing = [
        ("dropped", "best += 0;", ""),
        ("never", "best == 0", ""),
        ("equal", "best == 0", ""),
    ]
    assert not unexplained(left, nothing)
    assert ("dropped", "best += 0;") in [(fault.kind, fault.text) for fault in left]
    # one that nothing stands for is told, and one stands for all of a line
    assert unexplained(left, nothing[1:])
    assert not unexplained(left, [nothing[0], (ANY, "best == 0", "")])


def test_every_kernel_is_a_sources() -> None:
    here = {file for source in SOURCES.values() for file in files(source)}
    not_ops = ("table.h", "narrow_table.h", "peaks.h")
    not_ops += ("amx.h", "split.h")  # mutants are compiled for plain vectors
    cpu = {file for file in (ROOT / "csrc" / "cpu").rglob("*.h") if file.name not in not_ops}
    assert cpu <= here

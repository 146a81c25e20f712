"""Faults planted in the C++ CPU kernels, one at a time, and whether the kernels' tests notice.

python cpu_mutants.py [SOURCE ...] [--one-in K] tries every fault of `planting` in the sources (K:
those of every K-th place alone) on plain vectors, at -O1, under AddressSanitizer, with new memory
full of NaN: by the tests of csrc/tests, and what these do not notice by drawn calls of the package
on the same extension (`cpu_tries`). Prints a line a source; fails if a fault that nothing notices
is not among the `survivors`. What was tried is kept in runs/mutants until the sources or their
tests change: a run that is ended goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import planting
import torch
from mutants import DECLARATION, DEFINITION, Fault, unexplained
from places import ROOT, search_path
from survivors import SURVIVORS

CSRC = ROOT / "csrc"
RUNS = ROOT / "runs" / "mutants"
TRIES = Path(__file__).with_name("cpu_tries.py")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-w", "-ffp-contract=fast", "-fno-math-errno"]
SANITIZE = ["-fsanitize=address"]
# 255: floats that are never written are NaN
ASAN = "detect_leaks=0:symbolize=0:exitcode=77:malloc_fill_byte=255:max_malloc_fill_size=1073741824"
MOST_ROUNDS = 12  # of leaving out what does not compile


class Source(NamedTuple):
    planted: tuple[str, ...]  # files, or folders of headers, in csrc
    tests: tuple[str, ...]
    tables: tuple[str, ...]  # the members of Kernels that the tests use


def _alone(name: str, table: str, *further: str) -> Source:
    return Source((f"cpu/{name}", *further), (name,), (table,))


SOURCES = {
    # whose tiles and gradients the other two share
    "row_statistics": Source(
        ("cpu/row_statistics",),
        ("row_statistics", "class_rules", "divergence"),
        ("rows", "classes", "divergence"),
    ),
    "class_rules": _alone("class_rules", "classes", "rules/classes.h"),
    "divergence": _alone("divergence", "divergence", "rules/divergence.h"),
    "pairs": Source(
        ("cpu/pairs", "rules/pairs.h"), ("pairs", "pairs_apart", "pairs_stored"), ("pairs",)
    ),
    "topk": _alone("topk", "topk"),
    "distances": _alone("distances", "distances", "rules/distances.h", "rules/numerics.h"),
    "maxsim": Source(("cpu/maxsim.h",), ("maxsim",), ("maxsim",)),
    "triplets": Source(("cpu/triplets.h",), ("triplets",), ("triplets",)),
    "listed": Source(("cpu/listed.h",), ("listed",), ("listed",)),
    "row_update": Source(("cpu/row_update.h",), ("row_update",), ("row_update",)),
    "shared": Source(
        ("cpu/product.h", "cpu/rows.h", "cpu/sums.h", "cpu/vector.h"),
        ("row_statistics", "pairs_stored", "maxsim", "row_update"),
        ("rows", "pairs", "maxsim", "row_update"),
    ),
}
TABLES = {  # in the order of Kernels
    "rows": "row_table",
    "classes": "class_table",
    "pairs": "pair_table",
    "maxsim": "maxsim_table",
    "topk": "topk_table",
    "distances": "distance_table",
    "triplets": "triplet_table",
    "row_update": "row_update_table",
    "divergence": "divergence_table",
    "listed": "listed_table",
}
# generic.cpp with these tables alone: what no test of the source calls is not compiled
KERNELS = """#define FL_ISA generic
#define FL_VECTOR_BYTES 16
#define FL_PREFER_BLAS
#include "cpu/table.h"
namespace fused_losses {{
const Kernels& plain_kernels();
static Kernels kernels = [] {{
  Kernels k = plain_kernels();
  {tables}
  return k;
}}();
const Kernels& generic_kernels() {{ return kernels; }}
extern "C" void fused_losses_blas(bool asked) {{ kernels.blas = asked; }}
const Kernels* avx2_kernels() {{ return nullptr; }}
const Kernels* avx512_kernels() {{ return nullptr; }}
const Kernels* avx512_bf16_kernels() {{ return nullptr; }}
const Kernels* amx_bf16_kernels() {{ return nullptr; }}
}}  // namespace fused_losses
"""
# the other tables, without faults
PLAIN = """#define FL_ISA plain
#define FL_VECTOR_BYTES 16
#define FL_PREFER_BLAS
#include "cpu/table.h"
namespace fused_losses {
const Kernels& plain_kernels() {
  static constinit const Kernels kernels = plain::table("default");
  return kernels;
}
}  // namespace fused_losses
"""
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
# the extension without kernels, as `make kernel-tests` compiles it
BINDINGS = ROOT / "build" / "compiled" / "CMakeFiles" / "fused_losses_extension.dir" / "Unity"
TORCH = Path(torch.__file__).parent / "lib"
TORCH_LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python")


def files(source: Source) -> list[Path]:
    named = [CSRC / name for name in source.planted]
    return [f for at in named for f in (sorted(at.glob("*.h")) if at.is_dir() else [at])]


def headers() -> list[Path]:
    """What kernels are made of."""
    return sorted([*CSRC.glob("*.h"), *(CSRC / "cpu").rglob("*.h"), *(CSRC / "rules").glob("*.h")])


def contents(source: Source) -> str:
    """A hash of what the source's verdicts depend on."""
    out = hashlib.sha256()
    own = [*Path(__file__).parent.glob("*.py"), *(CSRC / "cpu").glob("*.cpp")]
    own = [path for path in own if path.name not in ("survivors.py", "test_planting.py")]
    tests = [CSRC / "tests" / f"{name}_test.cpp" for name in source.tests]
    for path in sorted({*own, *headers(), *(CSRC / "tests").glob("*.h"), *tests}):
        out.update(path.name.encode() + path.read_bytes())
    return out.hexdigest()[:16]


def _tests(source: Source, folder: Path) -> list[Path]:
    """The tests as functions of a library, which end at the first failure."""
    there = folder / "csrc" / "tests"
    check = there / "check.h"
    check.write_text(check.read_text().replace("++failures;", "std::_Exit(1);"))
    for name in source.tests:
        path = there / f"{name}_test.cpp"
        text = path.read_text()
        assert "int main(" in text
        path.write_text(text.replace("int main(", f'extern "C" int run_{name}('))
    return [there / f"{name}_test.cpp" for name in source.tests]


def _not_compiled(told: str, names: set[str], home: Path) -> set[tuple[str, int]]:
    """The planted lines that the compiler's errors come from; names: of files below home."""
    found, asked_by = set(), []
    for line in told.splitlines():
        place = re.match(r"(\S+?):(\d+):(?:\d+:)?\s+(.*)", line)
        if not place:
            continue
        at = (os.path.relpath(os.path.realpath(place[1]), home), int(place[2]))
        if "required from" in place[3] or "required by" in place[3]:
            asked_by.append(at)
        elif "error:" in place[3]:
            found |= set([each for each in (at, *asked_by) if each[0] in names][:1])
            asked_by = []
    return found


def build(name: str, folder: Path) -> list[Fault]:
    """Makes a library of the source with all faults that compile, and its tests; the faults."""
    source, left_out = SOURCES[name], set()
    planted = {str(file.relative_to(CSRC)): file for file in files(source)}
    shutil.copytree(CSRC, folder / "csrc", dirs_exist_ok=True)
    tests = _tests(source, folder)
    declared, kernels = folder / "declared.h", folder / "kernels.cpp"
    declared.write_text(DECLARATION + planting.HELPERS)
    tables = " ".join(f"k.{t} = generic::{TABLES[t]}();" for t in source.tables)
    kernels.write_text(KERNELS.format(tables=tables))
    command = ["g++", *FLAGS, f"-I{folder / 'csrc'}"]
    for _ in range(MOST_ROUNDS):
        faults: list[Fault] = []
        for at, file in planted.items():
            text = planting.plant(file.read_text(), at, faults, left_out)
            (folder / "csrc" / at).write_text(text)
        compiled = subprocess.run(
            [*command, *SANITIZE, "-include", declared, "-c", kernels, "-o", folder / "kernels.o"],
            capture_output=True,
            text=True,
        )
        if compiled.returncode == 0:
            break
        wrong = _not_compiled(compiled.stderr, {*planted}, folder / "csrc")
        assert wrong - left_out, compiled.stderr[-4000:]
        left_out |= wrong
    else:
        raise RuntimeError(f"{name}: lines that do not compile remain")
    defined = folder / "defined.cpp"
    defined.write_text(
        f'extern "C" {{\n{DEFINITION.format(count=len(faults))}'
        f"char fused_losses_known[{len(faults)}];\n}}\n"
    )
    # of what both have, the first is linked: that with faults
    shared = [folder / "csrc" / "cpu" / f"{name}.cpp" for name in ("dispatch", "threads")]
    others = [kernels.with_suffix(".o"), defined, *shared, *tests]
    others += [plain(), *BINDINGS.glob("*.o")]
    linked = [f"-L{TORCH}", *(f"-l{library}" for library in TORCH_LIBRARIES), "-pthread"]
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    package = folder / "package" / "fused_losses"
    shutil.copytree(ROOT / "fused_losses", package, ignore=ignored)
    out = package / EXTENSION
    subprocess.run(
        [*command, *SANITIZE, "-shared", *others, "-o", out, *linked], check=True, text=True
    )
    return faults


def plain() -> Path:
    """The object of the kernels without faults, which all sources share."""
    told = hashlib.sha256(b"".join(path.read_bytes() for path in headers())).hexdigest()
    code, out = RUNS / "plain.cpp", RUNS / f"plain.{told[:16]}.o"
    if not out.is_file():
        code.write_text(PLAIN)
        subprocess.run(["g++", *FLAGS, *SANITIZE, f"-I{CSRC}", "-c", code, "-o", out], check=True)
    return out


def keys(faults: list[Fault]) -> list[str]:
    """A name of each fault that another run gives it, too."""
    seen: Counter[tuple] = Counter()
    out = []
    for fault in faults:
        place = (fault.kind, fault.file, fault.line)
        out.append(f"{fault.kind} {fault.file}:{fault.line} {seen[place]}")
        seen[place] += 1
    return out


def drawn(key: str, one_in: int) -> bool:
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % one_in == 0


def tried(name: str) -> dict[str, str]:
    """What is known of a source as it is: fault -> how it showed."""
    path = RUNS / f"{name}.{contents(SOURCES[name])}.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return dict(json.loads(line) for line in lines)


def built(name: str) -> list[Fault]:
    """The faults of the library that a run before has built of these files; empty: none has."""
    path = RUNS / name / "faults.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    same = found.get("contents") == contents(SOURCES[name])
    return [Fault(**each) for each in found["faults"]] if same else []


class Verdict(NamedTuple):
    """Of one source: how many faults were tried, how they showed, and those that did not."""

    tried: int
    counts: dict[str, int]
    left: list[Fault]


def verdict(name: str, faults: list[Fault], one_in: int) -> Verdict:
    shown = tried(name)
    due = [(key, f) for key, f in zip(keys(faults), faults, strict=True) if drawn(key, one_in)]
    # of other instruction sets' branches nothing is compiled: no fault of what runs here
    due = [(key, fault) for key, fault in due if shown[key] != "not compiled"]
    counts = Counter(shown[key] or "unnoticed" for key, _ in due)
    left = [fault for key, fault in due if shown[key] in ("", "not asked")]
    return Verdict(len(due), dict(counts), left)


def _library(name: str) -> str:
    asked = ["g++", f"-print-file-name={name}"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def run(name: str, one_in: int) -> Verdict:
    folder = RUNS / name
    if not built(name):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        faults = build(name, folder)
        record = {"contents": contents(SOURCES[name]), "faults": [asdict(f) for f in faults]}
        (folder / "faults.json").write_text(json.dumps(record))
    faults = built(name)
    known = tried(name)
    if all(key in known for key in keys(faults) if drawn(key, one_in)):
        return verdict(name, faults, one_in)
    # without the second the first does not find what throws
    preloaded = " ".join(map(_library, ("libasan.so", "libstdc++.so.6")))
    path = os.pathsep.join([str(folder / "package"), search_path()])
    environment = os.environ | {"PYTHONPATH": path, "LD_PRELOAD": preloaded}
    environment |= {"OMP_NUM_THREADS": "1", "FUSED_LOSSES_CUDA_ON_HOST": "0"}
    command = [sys.executable, str(TRIES), name, str(one_in)]
    subprocess.run(command, env=environment | {"ASAN_OPTIONS": ASAN}, check=True)
    return verdict(name, faults, one_in)


def told(name: str, found: Verdict, one_in: int) -> str:
    seen = sum(found.counts.get(how, 0) for how in ("fails", "crashes", "hangs"))
    some = f", 1 place in {one_in}," if one_in > 1 else ""
    return (
        f"{name}: {seen} of {found.tried} faults{some} noticed "
        f"({100 * seen / max(found.tried, 1):.1f} %), {found.counts.get('not asked', 0)} not asked"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="*", choices=[*SOURCES, []], default=[])
    parser.add_argument("--one-in", type=int, default=1)
    given: Any = parser.parse_args()
    status = 0
    for name in given.sources or SOURCES:
        found = run(name, given.one_in)
        print(told(name, found, given.one_in), flush=True)
        for fault in unexplained(found.left, SURVIVORS.get(name, [])):
            status = 1
            print(f"  {fault.kind}: {fault.file}:{fault.line}: {fault.text}", flush=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main())

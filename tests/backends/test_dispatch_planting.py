"""What the mutants of dispatch are made of, on a source of a few lines; and a sample of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import CodeType

import dispatch_mutants
import dispatch_planting
import pytest
from conftest import require
from dispatch_survivors import SURVIVORS
from mutants import Fault, unexplained
from places import ROOT, search_path

SOURCE = '''"""Not planted: 1 < 2."""
ORDER = ("first", "second", "third")
Pair = tuple[int, str]

def other(a: int, b: int = 4) -> int:
    if a < b:
        raise ValueError(f"a: {a < b}")
    return a

def chosen(width: int, half: bool, told: list[str]) -> str:
    """Not planted, too."""
    if width >= 8 and not half:
        told.append("wide")
        return ORDER[0]
    left = [name for name in ORDER if name != "first"]
    return max(left) if half is True else min(left)
'''


def planted(within: tuple[str, ...] = ()) -> tuple[CodeType, list[Fault]]:
    faults: list[Fault] = []
    tree = dispatch_planting.plant(SOURCE, "source.py", faults, within)
    return compile(tree, "source.py", "exec"), faults


def noticed(code: CodeType, fault: int) -> bool:
    """Whether a few calls tell the fault; -1: none is there."""
    names = {dispatch_planting.ASKED: lambda number: number == fault}
    told: list[str] = []
    try:
        exec(code, names)
        chosen, other = names["chosen"], names["other"]
        found = [chosen(width, half, told) for width in (7, 8, 9) for half in (False, True)]
        found.append(other(4))
        with pytest.raises(ValueError, match="a: "):
            other(3)
    except (Exception, pytest.fail.Exception):
        return True
    right = ["second", "third", "first", "third", "first", "third", 4]
    return (found, told, names["ORDER"]) != (
        right,
        ["wide", "wide"],
        ("first", "second", "third"),
    )


def test_each_kind_is_planted_where_it_can_be() -> None:
    _, faults = planted()
    assert Counter(fault.kind for fault in faults) == {
        "bound": 2,
        "equal": 2,
        "always": 4,
        "never": 4,
        "negated": 1,
        "joined": 1,
        "dropped": 2,
        "extreme": 2,
        "number": 4,
        "order": 1,
        "shorter": 1,
        "nothing": 3,
    }
    assert all(fault.text in SOURCE for fault in faults)


def test_of_some_functions_alone() -> None:
    every, some = planted()[1], planted(("other",))[1]
    assert some == [fault for fault in every if 5 <= fault.line <= 8] != []


def test_faults_are_noticed_but_for_those_that_change_nothing() -> None:
    code, faults = planted()
    assert not noticed(code, -1)
    left = [fault for number, fault in enumerate(faults) if not noticed(code, number)]
    nothing = [("extreme", "return max(left) if", "")]
    assert not unexplained(left, nothing)
    # one that nothing stands for is told
    more = [*left, Fault("never", "source.py", 6, "if a < b:")]
    assert unexplained(more, nothing) == more[-1:]


def test_all_that_chooses_is_planted() -> None:
    folder = ROOT / "fused_losses"
    here = {str(path.relative_to(folder)) for path in folder.glob("backends/*/capability.py")}
    assert here | {"backends/__init__.py", "backends/table.py"} <= {*dispatch_mutants.SOURCES}
    faults = dispatch_mutants.Planted().faults
    counts = Counter(fault.file for fault in faults)
    # a function that has another name now would have no fault
    for file, within in dispatch_mutants.SOURCES.items():
        text = (folder / file).read_text()
        assert counts[file] > 0 and all(f"def {name}(" in text for name in within)
    # what is explained is there
    for kind, text, why in SURVIVORS:
        assert why and any(kind == fault.kind and text in fault.text for fault in faults)


@pytest.mark.slow
@pytest.mark.processes
def test_a_sample_is_noticed(tmp_path: Path) -> None:
    """One place in 60, drawn by the faults' names; `make dispatch-mutants` tries all."""
    require("cpu")
    command = [sys.executable, dispatch_mutants.__file__, "--one-in", "60", "--runs", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stdout + told.stderr
    assert re.search(r"^dispatch: [1-9]\d* of \d+ in all", told.stdout, re.MULTILINE)

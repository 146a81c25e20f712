"""tools.trust: the page is what was recorded, parts are commands that exist, a run goes on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from places import ROOT

from tools import trust

FAULTS = """a: 9 of 10 faults noticed (90.0 %), 1 not asked
  bound: cpu/a.h:3: i < n
b: 20 of 20 faults noticed (100.0 %), 0 not asked
"""


def test_the_page_is_what_was_recorded() -> None:
    assert trust.PAGE.read_text(encoding="utf-8") == trust.text(), "run python -m tools.trust page"
    assert {*trust.recorded()} <= {part.name for part in trust.PARTS}


@pytest.mark.parametrize("part", trust.PARTS, ids=lambda part: part.name)
def test_a_part_is_a_command_of_the_makefile(part: trust.Part) -> None:
    make, *words = part.command.split()
    assert make == "make"
    rules = subprocess.run(
        ["make", "--dry-run", "--assume-old=venv", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert rules.returncode == 0, rules.stderr
    for named in re.findall(r"\S+/\w+\.py\b", rules.stdout):
        assert (ROOT / named).is_file(), named


def test_what_an_output_says() -> None:
    assert trust.faults(FAULTS) == "29 of 30 faults noticed (96.7 %)"
    some = FAULTS.replace("faults noticed", "faults, 1 place in 3, noticed")
    assert trust.faults(some) == "29 of 30 faults, 1 place in 3 noticed (96.7 %)"
    assert trust.faults("error") == ""
    assert trust.hostile('{"a": [20, 3], "b": [20, 0]}') == "40 files of 2 kinds, 3 refused"
    assert trust.PYTEST("...\n3 passed, 1 skipped in 2 s\n") == "3 passed, 1 skipped in 2 s"
    assert trust.soaked('{\n "counts": {\n  "episodes": 12,\n') == "episodes 12"


def test_a_run_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says = trust.last("said.*")
    parts = tuple(trust.Part(name, name, f"echo said {name}", says) for name in ("a", "b"))
    broken = trust.Part("c", "c", "false", says)
    monkeypatch.setattr(trust, "PARTS", (*parts, broken))
    for name, path in (("RECORD", "r.json"), ("PAGE", "r.md"), ("LOGS", "logs")):
        monkeypatch.setattr(trust, name, tmp_path / path)

    def run(*words: str) -> tuple[bool, list[str]]:
        monkeypatch.setattr("sys.argv", ["trust", "run", *words])
        status = trust.main()
        return bool(status), re.findall(r"^(\w): echo|^(\w): false", capsys.readouterr().out, re.M)

    assert run("a") == (False, [("a", "")])
    assert "not run" in trust.PAGE.read_text()
    # what has succeeded is not run again, what has failed is
    assert run() == (True, [("b", ""), ("", "c")])
    assert run() == (True, [("", "c")])
    # what had other words is told with them, and is not the part
    assert run("a", "--with", "more") == (False, [("a", "")])
    assert "said a more (of `echo said a more`)" in trust.PAGE.read_text()
    assert run() == (True, [("a", ""), ("", "c")])
    assert "said b" in trust.PAGE.read_text() and "failed (status 1)" in trust.PAGE.read_text()

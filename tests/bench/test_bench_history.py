"""Two runs held against each other: what is slower, what is noise, which runs there are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from bench_runs import record

from fused_losses.bench import history


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        (record(), "same"),
        (record(ours=1.01), "same"),
        (record(ours=1.2), "slower"),
        (record(ours=0.8), "faster"),
        # a slow day is slow for the rival too
        (record(machine=3.0), "same"),
        (record(ours=1.2, machine=0.3), "slower"),
    ],
)
def test_slower_is_what_the_pairs_say(second: dict[str, Any], verdict: str) -> None:
    (change,) = history.changes(record(), second)
    assert change.verdict == verdict and change.against == "eager"
    assert any(line.startswith(f"| {verdict} |") for line in history.table([change]))


def test_without_a_rival_times_are_compared() -> None:
    first, second = record(), record(machine=9.0)
    for run in (first, second):
        run["cases"][0]["results"] = run["cases"][0]["results"][:1]
    (change,) = history.changes(first, second)
    assert change.verdict == "slower" and change.against is None
    assert change.ratio == pytest.approx(9.0)


def test_a_few_rounds_tell_nothing() -> None:
    (change,) = history.changes(record(), record(ours=5.0, rounds=3))
    assert change.verdict == "too few rounds"


def test_runs_are_told_by_number_and_by_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ours in (1.0, 1.3, 1.0):
        history.append(tmp_path, record(ours=ours))
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps(record(ours=1.3)))

    def compared(*runs: str) -> int:
        return history.run(argparse.Namespace(out=tmp_path, compare=runs))

    assert compared("1", "2") == 1 and compared("1", "-1") == 0 and compared("-3", str(slow)) == 1
    assert "1 rows in both runs, 1 slower beyond the noise" in capsys.readouterr().out
    slow.write_text('{"cases": []}')
    assert compared("1", str(slow)) == 2
    assert "expected a record of format" in capsys.readouterr().out
    slow.write_text('{"cases')
    assert compared("1", str(slow)) == 2
    assert compared("1", "4") == 2 and compared("1", "0") == 2 and compared("1", "what") == 2
    assert "has 3 runs, got 4" in capsys.readouterr().out

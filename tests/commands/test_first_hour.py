"""`fused-losses first-hour`: its order, what a crash or a cut leaves, and a rehearsal of it all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_losses import cli
from fused_losses.first_hour import command, plan, worker
from fused_losses.first_hour.page import page
from fused_losses.first_hour.plan import Stage
from fused_losses.first_hour.record import FAILED, MEASURED, HourRecord, Outcome
from fused_losses.first_hour.setting import HourUnit, Setting
from fused_losses.verify.table import DeviceLost, Row

DONE = Outcome(MEASURED)


def states(folder: Path) -> dict[str, str]:
    return {name: entry["state"] for name, entry in HourRecord(folder).ended().items()}


@pytest.mark.slow
@pytest.mark.processes
def test_the_whole_hour_is_rehearsed_and_goes_on(tmp_path: Path, capsys) -> None:
    out = tmp_path / "hour"
    asked = ["first-hour", "--device", "cpu", "--op", "linear_cross_entropy", "--out", str(out)]
    asked += ["--case", "batch_hard_mining", "--case", "cityblock"]
    # cut after its first stage, then the rest
    assert cli.main([*asked, "--stage", "probe"]) == 0
    first = states(out)
    assert set(first) == {"probe/machine", "probe/peers"}
    assert cli.main(asked) == 0, (out / "worker.log").read_text()
    found = states(out)
    assert {name.partition("/")[0] for name in found} == set(plan.NAMES)
    assert FAILED not in found.values()
    entries = HourRecord(out).ended()
    checked = entries["verify/linear_cross_entropy"]["rows"]
    assert {row["backend"] for row in checked} >= {"cpu", "triton", "bounded"}
    (row,) = entries["launches/linear_cross_entropy"]["rows"]
    (head,) = (e for name, e in entries.items() if name.startswith("heads/batch_hard"))
    assert {"fused", "eager"} <= {r["name"] for r in head["rows"]}
    if any(r["backend"] == "cuda" for r in checked):
        assert row["kernels"] > 0
        model = entries["model/cityblock/forward/cuda"]["rows"][0]
        assert model["model_us"] > 0 and model["us"] > 0
    report = (out / "report.md").read_text()
    assert "A rehearsal, without a GPU" in report
    assert all(f"## {stage.name}: {stage.what}" in report for stage in plan.STAGES)
    # nothing is begun twice
    begun = [e["unit"] for e in HourRecord(out).entries() if e.get("state") == "begun"]
    assert len(begun) == len(set(begun)) == len(found)


# ---- the process that runs units ----------------------------------------------------------------


def given(monkeypatch: pytest.MonkeyPatch, *stages: tuple[float, dict[str, Callable]]) -> None:
    """Stages with a share of the time and units by name."""
    made = [
        (
            Stage("probe", "made up", lambda _: [], until),
            [HourUnit(*unit) for unit in units.items()],
        )
        for until, units in stages
    ]
    monkeypatch.setattr(worker, "planned", lambda setting: made)


def ran(folder: Path, minutes: float = 1.0) -> int:
    folder.mkdir(exist_ok=True)
    return worker.run(Setting("cpu", folder), worker.Clock(time.time(), minutes))


def test_a_unit_that_raises_has_failed_and_the_next_one_runs(tmp_path, monkeypatch) -> None:
    def broken() -> Outcome:
        raise ValueError("k: expected 3\nand more")

    given(monkeypatch, (1.0, {"probe/a": broken, "probe/b": lambda: DONE}))
    assert ran(tmp_path) == worker.DONE
    assert states(tmp_path) == {"probe/a": FAILED, "probe/b": MEASURED}
    assert HourRecord(tmp_path).ended()["probe/a"]["told"] == "ValueError: k: expected 3"
    report = (tmp_path / "report.md").read_text()
    assert "## Failed" in report and "| probe/a | ValueError: k: expected 3 |" in report


def test_ctrl_c_keeps_what_is_done_and_the_unit_is_begun_again(tmp_path, monkeypatch) -> None:
    runs: list[str] = []

    def unit(name: str) -> Callable[[], Outcome]:
        def run() -> Outcome:
            runs.append(name)
            if name == "b" and runs.count("b") == 1:
                signal.raise_signal(signal.SIGINT)
            return DONE

        return run

    given(monkeypatch, (1.0, {f"probe/{name}": unit(name) for name in "abc"}))
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path)
    assert states(tmp_path) == {"probe/a": MEASURED} and not HourRecord(tmp_path).running()
    assert ran(tmp_path) == worker.DONE
    assert runs == ["a", "b", "b", "c"] and len(states(tmp_path)) == 3


def test_a_lost_device_ends_the_process_and_its_row_is_kept(tmp_path, monkeypatch) -> None:
    row = Row("circle", "cuda", "float32/fp32", (1, 2, 3), float("inf"), 0.0, "illegal address")

    def lost() -> Outcome:
        raise DeviceLost(row)

    given(monkeypatch, (1.0, {"verify/a": lost, "verify/b": lambda: DONE}))
    assert ran(tmp_path) == worker.LOST
    entry = HourRecord(tmp_path).ended()["verify/a"]
    assert entry["state"] == FAILED and "illegal address" in entry["told"]
    assert entry["rows"][0]["error"] == "inf" and not entry["rows"][0]["passed"]
    assert ran(tmp_path) == worker.DONE and states(tmp_path)["verify/b"] == MEASURED


def test_a_device_that_is_lost_behind_a_result_fails_it(tmp_path, monkeypatch) -> None:
    outcome = Outcome(MEASURED, ({"us": 1.0},), "clocks")
    given(monkeypatch, (1.0, {"heads/a": lambda: outcome, "heads/b": lambda: DONE}))
    monkeypatch.setattr(worker, "_alive", lambda device: False)
    assert ran(tmp_path) == worker.LOST
    (entry,) = HourRecord(tmp_path).ended().values()
    assert entry["state"] == FAILED and entry["rows"] == [{"us": 1.0}]
    assert entry["told"] == "the device takes no more work after it; clocks"
    # the row is none of a case: the page goes on without it
    report = (tmp_path / "report.md").read_text()
    assert "not shown, KeyError: 'ratios': see lines.jsonl" in report


def test_a_stage_leaves_its_place_when_its_share_is_over(tmp_path, monkeypatch) -> None:
    order: list[str] = []
    slept = {"now": 0.0}
    monkeypatch.setattr(worker.time, "time", lambda: 1e9 + slept["now"])

    def unit(name: str, seconds: float) -> Callable[[], Outcome]:
        def run() -> Outcome:
            order.append(name)
            slept["now"] += seconds
            return DONE

        return run

    long = {f"heads/{i}": unit(f"long {i}", 20.0) for i in range(4)}
    given(monkeypatch, (0.5, long), (1.0, {"graphs/a": unit("short", 1.0)}))
    assert ran(tmp_path) == worker.DONE
    # two of twenty seconds are beyond half of a minute; what is left comes after the last stage
    assert order == ["long 0", "long 1", "short", "long 2"]


def test_lines_that_were_cut_are_none(tmp_path: Path) -> None:
    record = HourRecord(tmp_path)
    record.begin("probe/a")
    record.end("probe/a", Outcome(MEASURED, ({"x": float("nan")},)))
    with open(record.lines.path, "a") as file:
        file.write('{"unit": "probe/b", "sta')
    assert list(record.ended()) == ["probe/a"]
    record.end("probe/c", DONE)
    assert list(record.ended()) == ["probe/a", "probe/c"]
    assert [json.loads(text)["unit"] for text in record.lines.path.read_text().splitlines()[:2]]


# ---- the process that watches -------------------------------------------------------------------


def watch(
    monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, **limits: float
) -> tuple[int, list[str]]:
    """A program in the place of the process of units; `begin(unit)` and `end(unit)` are its own."""
    program = f"""
import json, os, signal, sys, time
def line(unit, state):
    with open({str(folder / "lines.jsonl")!r}, "a") as file:
        entry = dict(unit=unit, state=state, at=time.time(), told="", rows=[])
        file.write(json.dumps(entry) + chr(10))
begin, end = (lambda u: line(u, "begun")), (lambda u: line(u, "measured"))
done = [json.loads(t)["unit"] for t in open({str(folder / "lines.jsonl")!r}) if "begun" not in t]
{code}
"""

    def start(setting: Setting, began: float, minutes: float) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-S", "-c", program], start_new_session=True)

    monkeypatch.setattr(command, "start", start)
    (folder / "lines.jsonl").touch()
    said: list[str] = []
    bounds = {"minutes": 1.0, "unit_seconds": 30.0} | limits
    record = HourRecord(folder)
    return command.watched(Setting("cpu", folder), record, say=said.append, **bounds), said


@pytest.mark.processes
def test_a_process_that_dies_costs_its_unit(tmp_path, monkeypatch) -> None:
    code = """
if "probe/a" not in done:
    begin("probe/a")
    os.kill(os.getpid(), signal.SIGSEGV)
begin("probe/b"); end("probe/b")
"""
    assert watch(monkeypatch, tmp_path, code)[0] == 0
    assert states(tmp_path) == {"probe/a": FAILED, "probe/b": MEASURED}
    assert "status -11" in HourRecord(tmp_path).ended()["probe/a"]["told"]


@pytest.mark.processes
def test_a_unit_that_hangs_is_ended(tmp_path, monkeypatch) -> None:
    code = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
if "probe/a" not in done:
    begin("probe/a")
    time.sleep(60)
begin("probe/b"); end("probe/b")
"""
    assert watch(monkeypatch, tmp_path, code, unit_seconds=0.5)[0] == 0
    assert states(tmp_path) == {"probe/a": FAILED, "probe/b": MEASURED}
    assert HourRecord(tmp_path).ended()["probe/a"]["told"] == "took longer than 0.5 s"


@pytest.mark.processes
def test_the_end_of_the_time_stops_a_unit_which_a_second_call_begins_again(
    tmp_path, monkeypatch
) -> None:
    code = 'begin("probe/a"); time.sleep(60)'
    status, said = watch(monkeypatch, tmp_path, code, minutes=0.01)
    assert status == 0 and "are over; a second call goes on" in said[-1]
    assert states(tmp_path) == {} and not HourRecord(tmp_path).running()
    assert watch(monkeypatch, tmp_path, 'begin("probe/a"); end("probe/a")')[0] == 0
    assert states(tmp_path) == {"probe/a": MEASURED}


@pytest.mark.processes
def test_a_process_that_never_begins_is_not_started_for_ever(tmp_path, monkeypatch) -> None:
    status, said = watch(monkeypatch, tmp_path, "sys.exit(1)")
    assert status == 1 and said == ["the process of the units ends before it does any"]


@pytest.mark.processes
def test_ctrl_c_while_watching_says_so(tmp_path, monkeypatch) -> None:
    def interrupted(*_: object) -> str:
        while not HourRecord(tmp_path).running():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_wait", interrupted)
    status, said = watch(monkeypatch, tmp_path, 'begin("probe/a"); time.sleep(60)')
    assert status == 130 and "stopped by Ctrl-C: what was measured so far is kept" in said[0]
    assert states(tmp_path) == {} and not HourRecord(tmp_path).running()


@pytest.mark.processes
def test_a_limit_of_time_on_the_command_stops_it_as_ctrl_c_does(tmp_path, monkeypatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    code = 'begin("probe/a"); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)'
    status, said = watch(monkeypatch, tmp_path, code)
    assert status == 143 and "stopped by SIGTERM: what was measured so far is kept" in said[0]
    assert states(tmp_path) == {} and not HourRecord(tmp_path).running()
    assert signal.getsignal(signal.SIGTERM) is before


def test_units_end_with_the_process_that_watches_them(tmp_path, monkeypatch) -> None:
    parents = iter((1, 1, 2))  # when the call begins, before the first unit, before the second
    monkeypatch.setattr(worker.os, "getppid", lambda: next(parents, 2))
    given(monkeypatch, (1.0, {f"probe/{name}": lambda: DONE for name in "ab"}))
    assert ran(tmp_path) == worker.DONE and list(states(tmp_path)) == ["probe/a"]


def test_a_unit_that_cuts_every_process_is_not_begun_a_third_time(tmp_path: Path) -> None:
    record = HourRecord(tmp_path)
    for _ in range(2):
        record.begin("verify/a")
    record.begin("verify/b")
    assert record.cut() == ["verify/a"]


def test_another_machine_has_a_folder_of_its_own(tmp_path: Path, capsys) -> None:
    HourRecord(tmp_path).note(identity={"device": "another", "torch": "1", "rehearsal": True})
    assert cli.main(["first-hour", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert f"--out {tmp_path}: its lines are of" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_can_be_done(tmp_path: Path, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["first-hour", "--out", str(tmp_path)]) == 1
    assert "--device cuda" in capsys.readouterr().out


def test_the_report_sorts_by_the_distance_from_the_model(tmp_path: Path) -> None:
    record = HourRecord(tmp_path)
    for name, over in (("near", 1.2), ("far", 9.0), ("none", None)):
        row: dict[str, Any] = {"op": name, "way": "cuda", "shape": "", "us": 5.0, "gpu": "x"}
        row |= {} if over is None else {"over": over, "model_us": 1.0, "floor_us": 1.0}
        record.end(f"model/{name}", Outcome(MEASURED, (row,)))
    row = Row("circle", "cuda", "float32/fp32", (1, 2, 3), float("nan"), 1e-6)
    record.end("verify/circle", Outcome(FAILED, (asdict(row) | {"passed": False},), "why | not"))
    text = page(record)
    assert text.index("| far |") < text.index("| near |") < text.index("| none |")
    assert "0 of 1 rows" in text and "| verify/circle | why \\| not |" in text

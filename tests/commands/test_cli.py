"""The commands info, verify and bench (train has tests of its own)."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import ROOT

from fused_losses import backends, cli, functional
from fused_losses.bench import measure, report
from fused_losses.bench.micro import peers
from fused_losses.bench.micro.cases import Case
from fused_losses.bench.table import CASES, SUITES
from fused_losses.train.faces import cli as faces
from fused_losses.train.glyphs import cli as glyphs
from fused_losses.train.large import cli as large_cli
from fused_losses.verify import table as verify
from fused_losses.version import __version__


def test_info_says_what_runs_and_why_the_rest_does_not(capsys) -> None:
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert __version__ in told
    for name, state in backends.available().items():
        assert any(name in line and state in line for line in told.splitlines())


@pytest.mark.slow
def test_verify_checks_every_backend_that_can_run(capsys, tmp_path) -> None:
    out = tmp_path / "verify" / "table.md"
    assert cli.main(["verify", "--shape", "7,18,12", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "FAIL" not in told
    for name in ("cpu", "cuda", "bounded"):
        ran = any(f" {name} " in line and line.endswith("pass") for line in told.splitlines())
        assert ran or f"not checked: {name}" in told
    table = out.read_text()
    assert ", 0 failed." in table and "7x18x12 | pass |" in table and "FAIL" not in table


def test_verify_says_when_a_device_is_not_there(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["verify", "--device", "cuda"]) == 1
    assert "no cuda device" in capsys.readouterr().out


def test_verify_fails_when_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    right = verify.TABLE["linear_cross_entropy"]

    def wrong(*args, backend, precision):
        loss = right.function(*args, backend=backend, precision=precision)
        return loss if backend == "reference" else loss * 1.1

    monkeypatch.setattr(verify, "TABLE", {right.name: replace(right, function=wrong)})
    assert cli.main(["verify", "--shape", "7,13,8"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_writes_table_record_and_plots(tmp_path, capsys) -> None:
    options = ["--case", "margin_softmax", "--shape", "16,300,32", "--rounds", "2", "--no-growth"]
    options += ["--out", str(tmp_path)]
    assert cli.main(["bench", *options]) == 0
    record = json.loads((tmp_path / "result.json").read_text())
    case = record["cases"][0]
    names = {result["name"] for result in case["results"]}
    assert {"fused fp32", "eager", "torch.compile", "F.linear_cross_entropy"} <= names
    assert all(len(r["times_ms"]) == 2 for r in case["results"] if r["error"] is None)
    assert [r["name"] for r in case["results"] if r["error"]] == []
    assert case["flops_floor"] == 4 * 2 * 16 * 300 * 32
    assert "| fused fp32 |" in (tmp_path / "table.md").read_text()
    assert list(tmp_path.glob("*.png"))


def test_a_ratio_is_the_median_of_paired_turns() -> None:
    ours = measure.Result("ours", [1.0, 2.0, 10.0])
    theirs = measure.Result("theirs", [3.0, 4.0, 100.0])
    assert measure.paired_ratio(ours, theirs) == 3.0


def test_on_a_gpu_a_step_is_timed_between_events_and_told_in_microseconds(monkeypatch) -> None:
    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        record = synchronize = lambda self: asked.append("event")

        def elapsed_time(self, last: Event) -> float:
            assert last is not self and asked == ["wait", "event", "step", "event", "event"]
            return 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("wait"))
    assert measure.timed_ms(lambda: asked.append("step"), "cuda") == 0.25
    case = Case("a case", {}, ["ours"], [], 1.0, 1.0)
    results = [measure.Result("ours", [0.25], 1.0)]
    told = "\n".join(report.table(case, results, device="cuda"))
    assert "| | µs | of floor |" in told and "| ours | 250 (250 to 250) |  | 1.0 |" in told
    assert "| | ms |" in "\n".join(report.table(case, results))


def test_bench_names_the_option_that_is_wrong(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--shape", "3,x,4"])
    assert "argument --shape: expected 3 sizes from 1 on, got '3,x,4'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--device", "cuda", "--out", str(tmp_path)]) == 1
        assert "--device cuda: torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "bench --suite contrasitve",
            "--suite: no suite is named 'contrasitve'; did you mean",
        ),
        ("bench --suite x", "--suite: no suite is named 'x'; expected busy, contrastive, distance"),
        ("bench --case cirle", "argument --case: no case is named 'cirle'; did you mean 'circle'?"),
        ("bench --breakdown topkk", "--breakdown: no case is named 'topkk'; did you mean 'topk'"),
        ("bench --growth pair", "--growth: no primitive is named 'pair'; did you mean 'pairs'"),
        ("first-hour --case cirle", "argument --case: no case is named 'cirle'; did you mean"),
        ("first-hour --stage verfy", "--stage: no stage is named 'verfy'; did you mean 'verify'?"),
        ("roofline --op topkk", "argument --op: no op is named 'topkk'; did you mean 'topk"),
    ],
)
def test_names_that_are_near_are_told(words: str, told: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words.split())
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_every_case_is_in_one_suite(capsys) -> None:
    assert sorted(name for names in SUITES.values() for name in names) == sorted(CASES)
    assert cli.main(["bench", "--suite", "mining", "--case", "topk", "--case", "circle"]) == 2
    told = "--case circle: expected one of --suite mining: topk, topk_principal"
    assert told in capsys.readouterr().err
    assert cli.main(["bench", "--suite", "busy", "--case", "topk"]) == 2
    assert "expected one of --suite busy: info_nce, batch_hard_triplet" in capsys.readouterr().err


def test_a_suite_is_measured_without_growth_and_a_wrong_result_fails_it(
    capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(peers.ABSENT, "no_such_peer", "ModuleNotFoundError: none")
    words = ["bench", "--suite", "mining", "--case", "topk", "--bank", "9,300,24,5"]
    words += ["--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "from float64, relative L2" in told and "Cost against C" not in told
    assert "Without no_such_peer: ModuleNotFoundError: none." in told
    record = json.loads((tmp_path / "result.json").read_text())
    (case,) = record["cases"]
    assert record["without"]["no_such_peer"] and "growth" not in record
    assert {row["held_to"] for row in case["results"]} == {"float64"}

    right = functional.pairwise_topk

    def wrong(*args: object, **options: object) -> list[torch.Tensor]:
        values, indices = right(*args, **options)
        return [values * 1.001, indices]

    monkeypatch.setattr(functional, "pairwise_topk", wrong)
    assert cli.main(words) == 1
    told = capsys.readouterr().out
    (case,) = json.loads((tmp_path / "result.json").read_text())["cases"]
    # a CPU that multiplies in bfloat16 has a row of that screen, too
    ours = [row for row in case["results"] if row["name"].startswith("fused")]
    theirs = [row for row in case["results"] if row not in ours]
    assert "differs from float64 by 1.0e-03" in told
    assert f"{len(ours)} failed or disagreed" in told
    assert all(row["error"] and not row["times_ms"] for row in ours)
    assert theirs and all(row["times_ms"] for row in theirs)


def test_an_unknown_command_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["dance"])
    assert stopped.value.code == 2


def test_the_version_is_told(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fused-losses {__version__}\n"


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


@pytest.mark.parametrize("recipe", [faces, glyphs], ids=["faces", "glyphs"])
def test_help_tells_every_default(recipe, capsys) -> None:
    commands = subcommands(cli.parser(recipe))
    assert set(commands) == {"info", "verify", "first-hour", "bench", "roofline", "losses", "train"}
    told = 0
    for name, command in [*commands.items(), ("large", large_cli.parser())]:
        for action in command._actions:
            # a flag that is not said is off; what is required has no default
            if action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction):
                continue
            if not action.required:
                assert "default" in (action.help or ""), (name, action.option_strings)
                told += 1
        command.format_help()  # no stray % in it
    assert told > 60


def test_ctrl_c_keeps_what_was_measured(
    capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = verify.rows

    def two_rows(**options: object) -> Iterator[verify.Row]:
        found = real(**options)
        yield next(found)
        yield next(found)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(verify, "rows", two_rows)
    out = tmp_path / "table.md"
    assert cli.main(["verify", "--shape", "3,4,5", "--out", str(out)]) == 130
    told = capsys.readouterr().out
    assert "2 passed, 0 failed\nstopped by Ctrl-C" in told and "2 rows, 0 failed" in out.read_text()

    paired, calls = measure.paired, []

    def interrupted(case: Case, rounds: int, *more: object) -> list[measure.Result]:
        calls.append(case)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        # compiling the rivals takes a minute
        case.providers = {"fused fp32": case.providers["fused fp32"]}
        return paired(case, rounds, *more)

    monkeypatch.setattr(measure, "paired", interrupted)
    options = "--case margin_softmax --shape 4,20,8 --shape 5,20,8 --rounds 1 --no-growth".split()
    assert cli.main(["bench", *options, "--out", str(tmp_path)]) == 130
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("1 cases, 1 rows, 0 failed or disagreed; stopped by Ctrl-C; what was")
    assert len(json.loads((tmp_path / "result.json").read_text())["cases"]) == 1
    assert "| fused fp32 |" in (tmp_path / "table.md").read_text()

    monkeypatch.setattr(cli.info, "lines", lambda: signal.raise_signal(signal.SIGINT))
    assert cli.main(["info"]) == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().err


def test_lines_are_there_at_once_in_a_pipe() -> None:
    script = "import sys; from fused_losses.cli import main; main(['losses', 'circle'])\n"
    script += "print(sys.stdout.line_buffering)"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert told.stdout.splitlines()[-1] == "True", told.stderr

"""Ctrl-C, as a terminal sends it to a command: a sentence, and what was found stays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_pictures import write_faces
from places import ROOT

from fused_losses.first_hour.record import HourRecord

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SECONDS = 240.0  # that a busy machine may take until there is a result
STEPS = "--image-size 24x20 --embedding 16 --batch-size 12 --folds 1 --no-compare".split()
STEPS += "--threads 1 --backend reference --steps 1000000".split()


def interrupted(words: list[str], found: Callable[[], int], sent: int = 1) -> tuple[int, str]:
    """The status and all output of `fused-losses WORDS`, stopped once it has found something."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fused_losses.cli", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # what a shell starts in the background would ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + SECONDS
        while found() < sent:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in told, told
    return process.returncode, told


def lines_of(path: Path) -> list[str]:
    """Whole ones."""
    return [line for line in path.read_text().splitlines(True) if line.endswith("\n")]


def count(path: Path) -> int:
    return len(lines_of(path)) if path.exists() else 0


def test_verify(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["verify", "--device", "cpu", "--shape", "7,13,8", "--out", str(out)]
    status, told = interrupted(words, lambda: count(out), 4)
    assert status == 130
    assert "stopped by Ctrl-C: what comes after these rows was not checked" in told
    *rows, end = map(json.loads, lines_of(out)[1:])
    assert len(rows) >= 3 and all(row["passed"] for row in rows)
    assert end["passed_rows"] == len(rows) and "Ctrl-C" in end["ended"]
    assert f"{len(rows)} passed, 0 failed" in told
    assert "stopped by Ctrl-C" in out.with_suffix(".md").read_text()


def test_bench(tmp_path: Path) -> None:
    record = tmp_path / "result.json"
    words = ["bench", "--device", "cpu", "--suite", "mining", "--case", "topk", "--rounds", "1"]
    words += ["--out", str(tmp_path), *["--bank", "9,300,24,5"] * 5000]
    status, told = interrupted(words, lambda: int(record.exists()))
    assert status == 130
    cases = json.loads(record.read_text())["cases"]
    assert 1 <= len(cases) < 5000
    counts = f"{len(cases)} cases, {sum(len(case['results']) for case in cases)} rows, 0 failed"
    last = told.splitlines()[-1]
    assert counts in last and "stopped by Ctrl-C; what was measured is in" in last
    assert len(lines_of(tmp_path / "history.jsonl")) == 1
    assert "Top-5 of 9 queries" in (tmp_path / "table.md").read_text()


def test_train(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image", reason="reading pictures needs Pillow")
    faces = write_faces(tmp_path / "faces", people=8, pictures=3)
    folder = tmp_path / "runs" / "run"
    words = ["train", "--data", str(faces), "--runs", str(folder.parent), "--name", "run", *STEPS]
    status, told = interrupted(words, lambda: count(folder / "log.jsonl"), 3)
    assert status == 130
    assert "stopped; go on with: fused-losses train --runs" in told
    steps = count(folder / "log.jsonl")
    assert steps >= 3 and (folder / "checkpoint.pt").exists()
    again = [*words, "--resume", "--quiet"]
    status, _ = interrupted(again, lambda: count(folder / "log.jsonl"), steps + 2)
    assert status == 130
    numbers = [json.loads(line)["step"] for line in lines_of(folder / "log.jsonl")]
    assert numbers == list(range(len(numbers))) and len(numbers) >= steps + 2


def test_first_hour(tmp_path: Path) -> None:
    record = HourRecord(tmp_path)
    words = ["first-hour", "--device", "cpu", "--out", str(tmp_path)]
    status, told = interrupted(words, lambda: len(record.ended()))
    assert status == 130
    assert "stopped by Ctrl-C: what was measured so far is kept, and a second call goes on" in told
    assert record.ended() and not record.running()
    assert (tmp_path / "report.md").exists()

"""The page of a folder of records, and the commands that write them."""

from __future__ import annotations

import argparse
import json
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from bench_breakdowns import shares
from bench_runs import record

from fused_losses import cli
from fused_losses.bench import breakdown, history, host, html, modes
from fused_losses.bench.growth_cases import SWEEPS, GrowthSweep
from fused_losses.bench.record import RECORDS, write_page


class Page(HTMLParser):
    """Which tags are open, what is fetched, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.told = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{k}={v}" for k, v in attrs if k in ("src", "href") and v]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.told += data


def test_the_page_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    head = {key: at for key, at in record().items() if key != "cases"}
    curves = [
        {"threads": t, "slope": 1.0, "residual": 0.02, "fixed_ms": 0.1, "cliffs": [4],
         "points": [{"size": s, "ms": s / t} for s in (1, 4, 16)]}
        for t in (1, 2)
    ]  # fmt: skip
    sweep = {"primitive": "pairs", "axis": "N·M", "at": "D=8", "fitted": True, "curves": curves}
    growth = head | {"growth": [sweep]}
    part = {"name": "exponentials", "ms": 1.0, "share": 0.25, "how": "of 36 samples"}
    part["of_what_ran"] = 0.5
    step = {
        "title": "A step",
        "threads": 2,
        "steps": 7,
        "ms": 2.0,
        "flops": 8e9,
        "faults": 3.0,
        "parts": [part],
    }
    breakdown = head | {"breakdown": [step]}
    for name, found in zip(RECORDS, (record(), breakdown, growth), strict=True):
        (tmp_path / name).write_text(json.dumps(found))
    write_page(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == [] and page.fetched == [] and "url(" not in text and "@import" not in text
    for told in ("A case, N=3 & M=4", "broken <peer>", "ValueError: <no>", "exponentials", "25.0%",
                 "pairs: time against N·M (D=8)", "2 threads", "50%", "3.00x"):  # fmt: skip
        assert told in page.told, told
    assert "@media print" in text and "prefers-color-scheme" in text


def test_a_record_of_another_format_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "growth.json").write_text(json.dumps({"version": "0.0.1", "growth": [{}]}))
    (tmp_path / "result.json").write_text(json.dumps(record()))
    write_page(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "A case" in text and "0.0.1" not in text


def test_of_few_rounds_the_ends_are_shown() -> None:
    assert html.quartiles([3.0, 1.0]) == (1.0, 3.0)
    assert html.quartiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == (2.0, 6.0)


def test_only_a_cpu_is_broken_down(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = argparse.Namespace(
        compare=None, breakdown="", growth=None, device="cuda", out=tmp_path, rounds=1
    )
    assert modes.run(asked, lambda text: None) == 2
    assert "--device cpu" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of one short try."""
    monkeypatch.setattr(host, "TRIES", 1)
    monkeypatch.setattr(host, "SECONDS", 1e-4)
    monkeypatch.setattr(host, "COPIED", 1 << 20)
    monkeypatch.setattr(host, "FRESH", 1 << 20)


def test_growth_by_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = SWEEPS["row_update"].make
    stop: list[int] = []

    def make(sizes: dict[str, int], device: str) -> object:
        if stop and len(stop) > 2:
            signal.raise_signal(signal.SIGINT)
        stop.extend([1] if stop else [])
        return real(sizes, device)

    sweep = GrowthSweep(make, {"N": 8, "D": 4}, {"N": (8, 16), "D, ragged": (1, 3)})  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(SWEEPS, "row_update", sweep)
    asked = ["bench", "--device", "cpu", "--growth", "row_update", "--out", str(tmp_path)]
    assert cli.main(asked) == 0
    assert "2 results of growth; written to" in capsys.readouterr().out
    found = json.loads((tmp_path / "growth.json").read_text())
    assert [sweep["axis"] for sweep in found["growth"]] == ["N", "D, ragged"]
    assert {curve["threads"] for curve in found["growth"][0]["curves"]} == {
        1,
        torch.get_num_threads(),
    }
    assert "row_update: time against N" in (tmp_path / "report.html").read_text()
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1

    stop.append(1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert cli.main(asked) == 130
    assert "1 results of growth; stopped by Ctrl-C" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "growth.json").read_text())["growth"]) == 1


def test_breakdown_by_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(breakdown, "ROWS", ("fused fp32",))
    options = ["--pairs", "32,8", "--rounds", "2", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main(["bench", "--breakdown", "info_nce", *options]) == 0
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "breakdown.json").read_text())["breakdown"]
    assert "1 results of breakdown; written to" in told
    shares(*found)
    assert breakdown.IDLE in told and "page faults a step" in told


def test_two_runs_by_command(tmp_path: Path) -> None:
    for ours in (1.0, 1.3):
        history.append(tmp_path, record(ours=ours))
    assert cli.main(["bench", "--out", str(tmp_path), "--compare", "-2", "-1"]) == 1
    assert cli.main(["bench", "--out", str(tmp_path), "--compare", "-1", "-1"]) == 0

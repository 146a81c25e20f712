"""The suite of busy machines: its loads run and end, its table tells how they slow us."""

from __future__ import annotations

import itertools
import multiprocessing
import subprocess
import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fused_losses.bench import busy
from fused_losses.bench.measure import Result
from fused_losses.bench.table import CASES


@pytest.mark.processes
@pytest.mark.parametrize("name", ["computing", "loading"])
def test_loads_run_and_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    started: list[Any] = []
    popen = subprocess.Popen

    def noted(command: list[str]) -> Any:
        started.append(popen(command))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    threads = threading.active_count()
    with getattr(busy, name)():
        workers = multiprocessing.active_children() if name == "loading" else started
        assert len(workers) == busy.WORKERS
        assert all(process.poll() is None for process in started)
    # a queue's own thread sees a little later that it is closed
    late = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < late:
        time.sleep(0.01)
    assert threading.active_count() == threads
    assert all(process.poll() is not None for process in started)


def test_pictures_are_decoded() -> None:
    pytest.importorskip("PIL")
    first, second = itertools.islice(busy.DecodedPictures(), 2)
    assert first.shape == (3, busy.TAKEN, busy.TAKEN) and first.dtype == torch.uint8
    assert torch.equal(first, second) and first.float().std() > 0


@pytest.mark.parametrize("name", busy.LOSSES)
def test_both_are_measured_beside_every_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "PASSES", 2)
    monkeypatch.setattr(busy, "LOADS", {"alone": nullcontext, "none": nullcontext})
    said: list[str] = []
    found = busy.measured(busy.chosen(CASES[name].make(32, 16)), 3, said.append)
    passes = [f"pass {turn} of 2" for turn in (1, 2)]
    assert said == [f"{load}, {each}" for each in passes for load in ("alone", "none")]
    for results in found.values():
        assert [r.name for r in results] == ["fused fp32", "eager"]
        assert [(r.error, len(r.times_ms)) for r in results] == [(None, 6)] * 2


def test_table_of_a_busy_machine() -> None:
    def of(*ours: float) -> list[Result]:
        return [Result("fused fp32", list(ours)), Result("eager", [1.0], error="failed")]

    lines = busy.table("A", {"alone": of(1.0, 2.0, 3.0), "2 computing": of(4.0, 4.0, 8.0)})
    assert lines[4] == "| fused fp32 | alone | 2.00 | 2.90 | 1.00x | 1.45x |"
    assert lines[5] == "| eager | alone | failed | | | |"
    assert lines[6] == "| fused fp32 | 2 computing | 4.00 | 7.60 | 2.00x | 3.80x |"

"""The units of `fused-losses first-hour` that need what only a GPU's machine has, by stand-ins."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import require
from places import ROOT
from torch import Tensor

from fused_losses import functional
from fused_losses.base.examples import TABLE
from fused_losses.bench.roofline.ops import ops
from fused_losses.first_hour import checks, plan, probe, times
from fused_losses.first_hour.record import FAILED, PASSED, SKIPPED
from fused_losses.first_hour.setting import Setting


def program(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program on the path."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder) + os.pathsep + os.environ["PATH"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_unit_has_a_name_of_its_own(device, tmp_path, monkeypatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    setting = Setting(device, tmp_path)
    stages = plan.planned(setting)
    assert [stage.name for stage, _ in stages] == list(plan.NAMES)
    assert all(unit.stage == stage.name for stage, units in stages for unit in units)
    names = [unit.name for _, units in stages for unit in units]
    assert len(names) == len(set(names)), Counter(names).most_common(3)
    by_stage = {stage.name: [unit.name for unit in units] for stage, units in stages}
    # each function before any other way to call it
    functions = [f"verify/{e.name}" for e in setting.functions()]
    assert by_stage["verify"][: len(functions)] == functions
    assert len(by_stage["verify"]) == len({e.name for e in setting.examples()}) > len(functions)
    if device == "cuda":
        assert by_stage["heads"][0] == "heads/margin_softmax_B256_C100000_D512_bfloat16"
        assert len(by_stage["graphs"]) == len(by_stage["devices"]) == len(functions)
        assert "more/topk, many/37x8301x72/triton/float32" in by_stage["more"]


@pytest.mark.processes
def test_a_sanitizer_that_finds_something_fails_its_unit(tmp_path, monkeypatch) -> None:
    setting = Setting("cpu", tmp_path, ops=("topk, dot",))
    assert checks.sanitizer_units(setting)[0].run().state == SKIPPED
    for status, state in ((0, PASSED), (86, FAILED)):
        text = f'echo "$@"; echo "===== ERROR SUMMARY: {status} errors"; exit {status}'
        program(tmp_path, checks.SANITIZER, text, monkeypatch)
        units = checks.sanitizer_units(setting)
        assert [u.name for u in units] == ["sanitizer/memcheck/topk, dot",
                                           "sanitizer/racecheck/topk, dot"]  # fmt: skip
        found = units[0].run()
        assert found.state == state and f"ERROR SUMMARY: {status} errors" in found.told


@pytest.mark.processes
def test_clocks_are_read_from_nvidia_smi(tmp_path, monkeypatch) -> None:
    program(tmp_path, "nvidia-smi", "echo '1980, 2619, 41, 118.52, 7'", monkeypatch)
    assert probe.clocks() == "1980/2619 MHz, 41 C, 118.52 W"
    program(tmp_path, "nvidia-smi", "exit 9", monkeypatch)
    assert probe.clocks() == ""


class Graphs:
    """Stands for torch.cuda: notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def _stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: self.asked.append(f"{name} waits"))

    def Stream(self) -> SimpleNamespace:
        return self._stream("side")

    def current_stream(self) -> SimpleNamespace:
        return self._stream("current")

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: self.asked.append("replay"))

    @contextmanager
    def stream(self, _: object) -> Any:
        self.asked.append("on the side")
        yield

    @contextmanager
    def graph(self, _: object) -> Any:
        self.asked.append("capture")
        yield
        self.asked.append("captured")


def test_a_capture_is_warmed_up_on_another_stream() -> None:
    graphs, calls = Graphs(), []

    def step() -> list[Tensor]:
        calls.append(list(graphs.asked))
        return [torch.zeros(())]

    replay, (out,) = checks.captured(step, graphs)
    replay()
    assert graphs.asked == ["side waits", "on the side", "current waits", "capture", "captured",
                            "replay"]  # fmt: skip
    assert len(calls) == checks.WARM_UP + 1 and calls[-1][-1] == "capture" and out == 0


@pytest.mark.parametrize(("honest", "state"), [(True, PASSED), (False, FAILED)])
def test_a_replay_is_judged_on_other_inputs(honest, state, tmp_path, monkeypatch) -> None:
    def captured(step: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        out = step()

        def replay() -> None:
            for old, new in zip(out, step(), strict=True):
                old.copy_(new if honest else old)

        return replay, out

    monkeypatch.setattr(checks, "captured", captured)
    assert checks.graphed(Setting("cpu", tmp_path), TABLE["linear_cross_entropy"]).state == state


def test_what_waits_for_the_host_is_what_the_documents_list() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text().partition("## What waits for the host")[2]
    told = text.partition("\n## ")[0]
    public = {getattr(functional, n).__name__ for n in functional.__all__}
    named = set(re.findall(r"`(\w+)", told)) & public
    made_of = {"gaussian_cross_entropy", "class_aware_alignment"}  # "the losses made of it"
    assert named | made_of | {"pairwise_topk"} == checks.WAITS


@pytest.mark.parametrize("name", [*dict.fromkeys(op.name for op in ops())])
def test_every_form_of_the_model_runs(name: str, tmp_path: Path) -> None:
    require("cuda")  # executed on the host
    setting = Setting("cpu", tmp_path, cases=(name,))
    for unit in times.model_units(setting):
        if unit.name.endswith("/cuda"):
            (row,) = unit.run().rows
            assert row["us"] > 0 and row["model_us"] > 0 and row["over"] > 0, unit.name

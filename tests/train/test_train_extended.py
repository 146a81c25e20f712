"""A finished run goes on to more steps and folds; its log has every step once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from dataset_pictures import write_faces

from fused_losses.train import Interrupted, TrainConfig, cli, train
from fused_losses.train.frame.log import StepLog, read_log
from fused_losses.train.frame.progress import Progress

pytest.importorskip("PIL.Image", reason="reading pictures needs Pillow")


@pytest.fixture
def tiny(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=str(write_faces(tmp_path / "faces", people=8, pictures=4)),
        image_size="12x10",
        embedding=16,
        batch_size=12,
        steps=3,
        folds=1,
        compare=False,
        threads=1,
        backend="reference",
        # rates that do not depend on the number of steps
        schedule="constant",
        warmup=0.0,
        margin="elastic-arcface",  # draws from the global generator
    )


def curves(folder: Path) -> list[list[float]]:
    return json.loads((folder / "curves.json").read_text())["loss"]["trained"]


def test_a_longer_run_is_the_one_that_was_longer_from_the_start(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "faces"
    first = train(tiny, folder, quiet=True)
    longer = tiny.with_changes(steps=7, folds=2)
    # stopped on the way: what is longer is recorded, and nothing tells of the shorter one
    real, calls = Progress.step, []

    def stopping(self: Progress, what: str, loss: float) -> None:
        calls.append(what)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, what, loss)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Progress, "step", stopping)
        train(longer, folder, resume=True, quiet=True)
    assert not (folder / "result.json").exists()
    # what is not said again stays: the longer one
    assert cli.main(["--runs", str(folder.parent), "--resume", "--quiet"]) == 0
    train(longer, tmp_path / "whole", quiet=True)
    assert curves(folder) == curves(tmp_path / "whole")
    again, whole = (
        json.loads((place / "result.json").read_text()) for place in (folder, tmp_path / "whole")
    )
    assert again["folds"] == whole["folds"] and len(first["folds"]) == 1
    assert again["config"]["steps"] == 7
    lines = read_log(folder / "log.jsonl")
    assert [(line["fold"], line["step"]) for line in lines] == [
        (fold, step) for fold in (0, 1) for step in range(7)
    ]
    assert [line["loss"] for line in lines] == [loss for curve in curves(folder) for loss in curve]
    assert all(line["variant"] == "trained" and line["lr"] == tiny.lr for line in lines)
    with pytest.raises(ValueError, match="steps: the run has 7, asked for 6"):
        train(longer.with_changes(steps=6), folder, resume=True, quiet=True)


def test_a_log_tells_trainings_apart(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with StepLog(path) as log:
        for name in ("one", "two"):
            log.begin(0, name=name)
            for step in range(3):
                log.write(step, 0.5, 0.1, 0.0)
        log.begin(1, name="one")
        log.write(1, 0.25, 0.1, 0.0)
    told = [(line["name"], line["step"], line["loss"]) for line in read_log(path)]
    others = [("two", step, 0.5) for step in range(3)]
    assert told == [("one", 0, 0.5), *others, ("one", 1, 0.25)]


def test_tensorboard_reads_what_it_is_written(tiny: TrainConfig, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny.with_changes(tensorboard=True)
    train(config, tmp_path / "run", quiet=True)
    train(config.with_changes(steps=5), tmp_path / "run", resume=True, quiet=True)
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard" / "0-trained"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [
        (step, pytest.approx(loss)) for step, loss in enumerate(curves(tmp_path / "run")[0])
    ]

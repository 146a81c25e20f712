"""The face trainer learns, survives being killed, and says what is wrong."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dataset_pictures import write_faces
from places import ROOT

from fused_losses.train import Interrupted, TrainConfig, cli, train
from fused_losses.train.faces import backbone as backbones
from fused_losses.train.faces import data, report
from fused_losses.train.faces.loop import FoldTraining
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.progress import Progress

pytest.importorskip("PIL.Image", reason="reading pictures needs Pillow")
KEYS = (
    "verification_accuracy",
    "tar_at_far_1e-2",
    "tar_at_far_1e-3",
    "recall_at_1",
    "step_ms",
    "peak_memory_mib",
)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"))


@pytest.fixture
def tiny(faces: Path) -> TrainConfig:
    return TrainConfig(
        data=str(faces),
        image_size="24x20",
        embedding=16,
        batch_size=36,
        steps=6,
        folds=1,
        compare=False,
        threads=1,
        backend="reference",
    )


def options(config: TrainConfig) -> list[str]:
    """The command line of a configuration."""
    words = []
    for name, value in json.loads(config.to_json()).items():
        if value == getattr(TrainConfig(), name):
            continue
        flag = "--" + name.replace("_", "-")
        words += (
            [flag if value else "--no-" + flag[2:]]
            if isinstance(value, bool)
            else [
                flag,
                str(value),
            ]
        )
    return words


def losses(folder: Path, name: str = "trained") -> list[list[float]]:
    return json.loads((folder / "curves.json").read_text())["loss"][name]


# training


@pytest.mark.slow
def test_it_learns_and_writes_its_record(tiny: TrainConfig, tmp_path: Path) -> None:
    config = tiny.with_changes(steps=60, folds=2, compare=True, backend="auto", augment="none")
    result = train(config, tmp_path / "run", quiet=True)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    for one in (result, result["reference"], result["untrained"]):
        assert all(isinstance(one[key], float) for key in KEYS)
        assert set(one["spread"]) == set(KEYS[:4]) and len(one["folds"]) == 2
    assert result["step_ms"] > 0 and result["peak_memory_mib"] > 0
    assert result["reference"]["backend"] == "reference"
    assert result["config"]["steps"] == 60 and "torch" in result["versions"]
    for curve in losses(tmp_path / "run"):
        assert sum(curve[-5:]) < 0.5 * sum(curve[:5])
    for key in ("verification_accuracy", "recall_at_1"):
        assert result[key] > result["untrained"][key] + 0.03
    table = report.table(result)
    assert "TAR at FAR 1e-3" in table and "untrained" in table
    # the same pictures, weights and margins: the heads differ by rounding, which steps amplify
    for fused, reference in zip(
        losses(tmp_path / "run"), losses(tmp_path / "run", "reference"), strict=True
    ):
        torch.testing.assert_close(
            torch.tensor(fused[:10]), torch.tensor(reference[:10]), rtol=1e-3, atol=1e-3
        )


@pytest.mark.slow
def test_orl_faces_are_learnt(tmp_path: Path) -> None:
    try:
        data.orl_folder()
    except RuntimeError as missing:
        pytest.skip(str(missing))
    pictures = data.orl()
    assert pictures.images.shape == (400, 1, 56, 46)
    assert pictures.labels.bincount().tolist() == [10] * 40
    config = TrainConfig(folds=1, steps=40, compare=False, threads=1)
    result = train(config, tmp_path / "run", quiet=True)
    assert result["verification_accuracy"] > result["untrained"]["verification_accuracy"]
    assert result["verification_accuracy"] > 0.8
    assert "training people" in result["threshold_from"]


def test_a_run_repeats_bitwise(tiny: TrainConfig, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(tiny, tmp_path / name, quiet=True)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    train(tiny.with_changes(seed=1), tmp_path / "other", quiet=True)
    assert losses(tmp_path / "one") != losses(tmp_path / "other")


@pytest.mark.parametrize(
    "changes",
    [
        {"margin": "cosface", "optimizer": "sgd", "lr": 0.05, "schedule": "linear"},
        {"margin": "adaface", "augment": "light"},
        {"margin": "magface", "amp": "bf16"},
        {"margin": "elastic-arcface", "schedule": "constant"},
        {"margin": "elastic-cosface", "margin_value": 0.2},
        {"margin": "sphereface"},
        {"margin": "none", "augment": "none"},
    ],
    ids=lambda changes: changes["margin"],
)
def test_every_margin_trains(tiny: TrainConfig, tmp_path: Path, changes: dict) -> None:
    config = tiny.with_changes(steps=3, backend="auto", **changes)
    people, _ = data.split(data.load(config), 0, config.seed)
    training = FoldTraining(config, people, fold=0)
    start = training.head.weight.detach().clone()
    assert all(training.step() > 0 for _ in range(3))
    assert not torch.equal(start, training.head.weight)


def test_distractors_pad_the_class_table(tiny: TrainConfig, tmp_path: Path) -> None:
    config = tiny.with_changes(classes=5000)
    people, _ = data.split(data.load(config), 0, config.seed)
    training = FoldTraining(config, people, fold=0)
    assert training.head.weight.shape == (5000, 16)
    torch.testing.assert_close(training.head.weight.norm(dim=1), torch.ones(5000))
    before = training.head.weight[4000:].detach().clone()
    first = training.step()
    assert not torch.equal(before, training.head.weight[4000:])
    assert all("momentum_buffer" not in s for s in training.optimizers[1].state.values())
    plain = FoldTraining(tiny, people, fold=0)
    assert plain.head.weight.shape == (len(people.names), 16)
    # more classes to tell apart
    assert first > plain.step()


# stopping and going on


@pytest.mark.slow
def test_a_killed_run_goes_on_bitwise(tiny: TrainConfig, tmp_path: Path) -> None:
    after = 7
    # elastic margins draw from the global generator, which the checkpoint must restore
    config = tiny.with_changes(
        steps=150, batch_size=18, image_size="12x10", margin="elastic-arcface"
    )
    command = [sys.executable, "-m", "fused_losses.train", "--runs", str(tmp_path), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--name", "killed", *options(config)], env=environment, cwd=tmp_path
    )
    path = tmp_path / "killed" / "checkpoint.pt"
    while not path.exists() or len(checkpoint.load(path)["losses"]) < after:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    done = checkpoint.load(path)["losses"].tolist()
    assert after <= len(done) < 150

    train(config, tmp_path / "killed", resume=True, quiet=True)
    train(config, tmp_path / "whole", quiet=True)
    assert losses(tmp_path / "killed")[0][: len(done)] == done
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    figures = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("killed", "whole")]
    assert figures[0]["folds"] == figures[1]["folds"]


def test_a_signal_leaves_a_checkpoint_and_finished_folds_stay(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.with_changes(folds=2, checkpoint_every=100)
    steps: list[str] = []
    step = Progress.step

    def counting(self: Progress, what: str, loss: float) -> None:
        steps.append(what)
        if len(steps) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, what, loss)

    monkeypatch.setattr(Progress, "step", counting)
    with pytest.raises(Interrupted) as stopped:
        train(config, tmp_path / "run", quiet=True)
    assert stopped.value.signal == signal.SIGTERM and len(steps) == 9
    assert len(checkpoint.load(tmp_path / "run" / "checkpoint.pt")["losses"]) == 3
    train(config, tmp_path / "run", resume=True, quiet=True)
    assert len(steps) == 12
    train(config, tmp_path / "whole", quiet=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_run_resumes_to_the_same_record(tiny: TrainConfig, tmp_path: Path) -> None:
    first = train(tiny, tmp_path / "run", quiet=True)
    again = train(tiny, tmp_path / "run", resume=True, quiet=True)
    assert {**first, "wall_s": 0} == {**again, "wall_s": 0}


def test_another_configuration_is_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"lr: the run has 0.001, asked for 0.5"):
        train(tiny.with_changes(lr=0.5), tmp_path / "run", resume=True, quiet=True)
    with pytest.raises(ValueError, match="--resume, or start with --overwrite"):
        train(tiny, tmp_path / "run", quiet=True)
    mine = tmp_path / "run" / "notes.txt"
    mine.write_text("the user's own")
    train(tiny.with_changes(lr=0.5), tmp_path / "run", overwrite=True, quiet=True)
    assert TrainConfig.load(tmp_path / "run" / "config.json").lr == 0.5
    assert mine.exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not a run"):
        train(tiny, foreign, quiet=True)


# backbones and the command line


def test_a_backbone_by_import_path(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, width=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3, 4), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.LazyLinear(num_classes), nn.Dropout(0.1))\n"
        "def maps(num_classes):\n"
        "    return nn.Conv2d(3, num_classes, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny.with_changes(backbone="my_models:net", backbone_args='{"width": 6}')
    result = train(config, tmp_path / "run", quiet=True)
    assert result["config"]["backbone"] == "my_models:net"
    with pytest.raises(ValueError, match=r"expected embeddings \[2, D\]"):
        train(tiny.with_changes(backbone="my_models:maps"), tmp_path / "maps", quiet=True)
    with pytest.raises(ValueError, match="cannot be imported"):
        backbones.load_backbone("my_models:absent")
    with pytest.raises(ValueError, match="package.module:factory"):
        backbones.load_backbone("resnet18")


def test_the_command_line_says_what_is_wrong(
    tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--runs", str(tmp_path), "--quiet"]
    assert cli.main([*run, *options(tiny.with_changes(steps=2))]) == 0
    (folder,) = tmp_path.iterdir()
    assert (folder / "result.json").exists()
    # what is not said again stays as it was
    assert cli.main([*run, "--resume"]) == 0
    assert cli.main([*run, "--resume", "--scale", "5"]) == 2
    assert "scale: the run has 30.0, asked for 5.0" in capsys.readouterr().err
    assert cli.main([*run, *options(tiny), "--folds", "9"]) == 2
    assert "--folds: expected 1 to 4, got 9" in capsys.readouterr().err
    assert cli.main([*run, *options(tiny.with_changes(steps=1))]) == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_figures_are_optional(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    train(tiny.with_changes(steps=1), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "roc.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    train(tiny.with_changes(steps=1), tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run" / "roc.png").stat().st_size > 0


def test_two_processes_do_not_share_a_run(tiny: TrainConfig, tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process"):
            train(tiny, tmp_path, quiet=True)

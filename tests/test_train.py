"""The trainer learns, survives being killed, and its figures are those of their definitions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fused_losses.train import (
    FoldEmbeddings,
    Interrupted,
    TrainConfig,
    cli,
    evaluate,
    train,
)
from fused_losses.train.faces import backbone as backbones
from fused_losses.train.faces import data, report
from fused_losses.train.faces.augment import augment, normalize
from fused_losses.train.faces.evaluation import (
    Scores,
    accuracy,
    best_threshold,
    pair_scores,
    recall_at_1,
    tar_at_far,
    threshold_at_far,
)
from fused_losses.train.faces.loop import FoldTraining, learning_rate_factor
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.progress import Progress

Image = pytest.importorskip("PIL.Image", reason="reading pictures needs Pillow")

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.xdist_group("train")]
ROOT = Path(__file__).resolve().parents[1]
KEYS = (
    "verification_accuracy",
    "tar_at_far_1e-2",
    "tar_at_far_1e-3",
    "recall_at_1",
    "step_ms",
    "peak_memory_mib",
)


def write_faces(root: Path, people: int = 24, pictures: int = 6) -> Path:
    """Persons are mixtures of some patterns, seen under stronger mixtures of others (the light).

    What tells persons apart is so the same for people never seen, and a network can learn it.
    """
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(12, 1, 6, 5, generator=generator)
    patterns = torch.nn.functional.interpolate(coarse, (24, 20), mode="bicubic")[:, 0]
    for person in range(people):
        folder = root / f"p{person}"
        folder.mkdir(parents=True)
        face = torch.randn(8, generator=generator)
        for i in range(pictures):
            light = 2 * torch.randn(4, generator=generator)
            mixture = torch.einsum("k,khw->hw", torch.cat([face, light]), patterns)
            pixels = (mixture * 15 + 112).clamp(0, 255).byte()
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return root


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


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(steps=20, warmup=0.25)
    factors = [learning_rate_factor(step, config) for step in range(20)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True) and 0 < factors[-1] < 0.02


# stopping and going on


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


def test_a_crash_while_writing_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1})

    def half_written(tree: object, file: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", half_written)
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}
    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}
    checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 2}


def test_checkpoints_keep_every_tensor(tmp_path: Path) -> None:
    state = {
        "large": torch.randn(600, 600),
        "turned": torch.randn(4, 3, 2).transpose(0, 2),
        "half": [torch.randn(5).bfloat16(), torch.tensor(3)],
        "empty": torch.empty(0, 4),
        "plain": {"a": (1, 2.5, None), 7: "text"},
    }
    checkpoint.save(tmp_path / "c.pt", state)
    found = checkpoint.load(tmp_path / "c.pt")
    for name in ("large", "turned", "empty"):
        assert torch.equal(found[name], state[name])
    assert torch.equal(found["half"][0], state["half"][0]) and found["half"][1] == 3
    assert found["plain"] == state["plain"]
    assert checkpoint.state_bytes(state) == 4 * (600 * 600 + 24) + 2 * 5 + 8


def test_small_states_are_written_every_step_and_large_ones_by_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = checkpoint.Schedule(0)
    large = checkpoint.SMALL_STATE + 1
    assert schedule.due(1, checkpoint.SMALL_STATE) and not schedule.due(1, large)
    monkeypatch.setattr(checkpoint, "LARGE_STATE_SECONDS", 0.0)
    assert schedule.due(2, large)
    assert [checkpoint.Schedule(3).due(step, large) for step in (2, 3, 6)] == [False, True, True]


def test_random_state_round_trips() -> None:
    import random

    state = checkpoint.random_state()
    drawn = torch.rand(3), random.random()
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]


# judging


def test_tar_at_far_counts_what_is_above_the_threshold() -> None:
    impostor = torch.arange(100, dtype=torch.float64)  # 99 highest
    scores = Scores(torch.tensor([98.5, 99.0, 99.5, 10.0], dtype=torch.float64), impostor)
    # FAR 1/100: one impostor may pass, so the threshold is the second highest, 98
    assert threshold_at_far(impostor, 0.01) == 98.0
    assert tar_at_far(scores, 0.01) == 0.75
    # FAR 1/1000 of 100 impostors: none may pass, ties with the highest are refused
    assert tar_at_far(scores, 0.001) == 0.25
    assert tar_at_far(scores, 1.0) == 1.0
    assert threshold_at_far(impostor, 0.29) == 70.0
    assert tar_at_far(Scores(torch.empty(0), impostor), 0.01) != tar_at_far(scores, 0.01)


def test_the_best_threshold_is_best() -> None:
    scores = Scores(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([0.1, 0.2, 0.5]))
    # between 0.2 and 0.3 five of six are right; so they are between 0.5 and 0.8: lowest wins
    assert best_threshold(scores) == pytest.approx(0.25)
    assert accuracy(scores, 0.25) == pytest.approx(5 / 6)
    assert best_threshold(Scores(torch.tensor([1.0]), torch.tensor([1.0]))) == 0.0
    generator = torch.Generator().manual_seed(0)
    random = Scores(torch.randn(50, generator=generator) + 1, torch.randn(50, generator=generator))
    best = accuracy(random, best_threshold(random))
    assert best == max(accuracy(random, t) for t in torch.cat(random).tolist())


def test_pairs_and_recall_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 0, 2])
    scores = pair_scores(x, labels)
    assert sorted(scores.genuine.tolist()) == pytest.approx([0.6, 0.8, 0.96])
    assert len(scores.impostor) == 10 - 3
    # 0 -> 1, 1 -> 3, 3 -> 1: all right; pictures 2 and 4 have no mate and do not count
    assert recall_at_1(x, labels) == 1.0
    assert recall_at_1(x, torch.tensor([0, 1, 1, 0, 2]), rows=2) == 0.0
    balanced = scores.balanced(0)
    assert len(balanced.genuine) == len(balanced.impostor) == 3


def test_no_threshold_sees_the_people_it_judges() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat_interleave(4)

    def fold(noise: float) -> FoldEmbeddings:
        centre = torch.randn(6, 8, generator=generator).repeat_interleave(4, 0)
        rows = centre + noise * torch.randn(24, 8, generator=generator)
        return FoldEmbeddings(torch.nn.functional.normalize(rows), labels)

    folds = [fold(0.3), fold(0.5), fold(0.8)]
    result = evaluate(folds)
    changed = evaluate([folds[0], folds[1], fold(5.0)])
    # fold 2's threshold comes from folds 0 and 1, whatever fold 2 is
    assert result["folds"][2]["threshold"] == changed["folds"][2]["threshold"]
    assert result["folds"][0]["threshold"] != changed["folds"][0]["threshold"]
    assert changed["verification_accuracy"] < result["verification_accuracy"]
    assert len(result["roc"]) == 3 and result["roc"][0] == sorted(result["roc"][0])
    with pytest.raises(ValueError, match="more than one"):
        evaluate(folds[:1])


# data


def test_an_image_folder_is_read(faces: Path, tmp_path: Path) -> None:
    (faces / "p1" / "notes.txt").write_text("not a picture")
    (faces / "empty").mkdir(exist_ok=True)
    pictures = data.image_folder(faces, (24, 20))
    assert pictures.images.shape == (144, 1, 24, 20) and pictures.images.dtype == torch.uint8
    assert pictures.names[:3] == ("p0", "p1", "p2") and pictures.names[-1] == "p23"
    assert pictures.labels.bincount().tolist() == [6] * 24
    assert data.image_folder(faces, (10, 12), 3).images.shape == (144, 3, 10, 12)
    with pytest.raises(ValueError, match="neither"):
        data.image_folder(tmp_path / "absent", (24, 20))
    with pytest.raises(ValueError, match="at least 5 folders"):
        data.image_folder(tmp_path, (24, 20))
    broken = tmp_path / "a" / "x.png"
    broken.parent.mkdir()
    broken.write_bytes(b"no picture")
    with pytest.raises(RuntimeError, match="x.png: not a picture"):
        data.image_folder(tmp_path, (24, 20))


def test_people_are_held_out_once_and_entirely(faces: Path) -> None:
    pictures = data.image_folder(faces, (24, 20))
    seen: list[str] = []
    for fold in range(4):
        people, held_out = data.split(pictures, fold, seed=3)
        assert not set(people.names) & set(held_out.names)
        assert len(people) + len(held_out) == len(pictures)
        assert sorted(people.labels.unique().tolist()) == list(range(len(people.names)))
        seen += held_out.names
    assert sorted(seen) == sorted(pictures.names)


def test_missing_faces_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"fused-losses\[train\]"):
        data.orl_folder()


def test_every_epoch_shows_every_picture_once() -> None:
    stream = torch.cat([data.batch_indices(10, 4, step, seed=0, fold=0) for step in range(10)])
    for epoch in stream.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(stream[:10], stream[10:20])
    assert len(data.batch_indices(10, 64, 3, seed=0, fold=0)) == 64


def test_augmentation_is_seeded_and_per_picture() -> None:
    images = normalize(torch.randint(0, 256, (1, 1, 20, 16), dtype=torch.uint8)).repeat(6, 1, 1, 1)
    one, two = (augment(images, "full", torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == images.shape
    assert not torch.equal(one[0], one[1])
    assert augment(images, "none", torch.Generator()) is images
    # light keeps the grey values: only flips and shifts
    light = augment(images, "light", torch.Generator().manual_seed(1))
    assert light.max() <= images.max() + 1e-5 and light.min() >= images.min() - 1e-5


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
    assert "folds: expected 1 to 4, got 9" in capsys.readouterr().err
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


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"margin": "arc"}, "margin: expected one of arcface"),
        ({"image_size": "56"}, "image_size: expected HEIGHTxWIDTH"),
        ({"backbone_args": "[1]"}, "backbone_args: expected a JSON object"),
        ({"warmup": 2.0}, "warmup: expected a share"),
        ({"channels": 2}, "channels: expected 0, 1 or 3"),
        ({"margin": "none", "margin_value": 0.1}, "takes no value"),
    ],
)
def test_bad_configurations_are_refused(changes: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainConfig(**changes)


def test_two_processes_do_not_share_a_run(tiny: TrainConfig, tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process"):
            train(tiny, tmp_path, quiet=True)

"""What cannot be run is refused in one line that names the option, and leaves no folder behind."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from dataset_pictures import write_faces

from fused_losses.train import TrainConfig, cli
from fused_losses.train.faces import run as faces_run
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.files import RunFileError
from fused_losses.train.frame.log import StepLog, read_log
from fused_losses.train.frame.options import Config, OptionError
from fused_losses.train.frame.progress import Progress
from fused_losses.train.glyphs import GlyphConfig
from fused_losses.train.large import LargeConfig
from fused_losses.train.large import cli as large_cli

pytest.importorskip("PIL.Image", reason="reading pictures needs Pillow")
TINY = "--image-size 24x20 --embedding 16 --batch-size 12 --steps 3 --folds 1 --no-compare".split()
TINY += "--threads 1 --backend reference".split()


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), people=8, pictures=3)


@pytest.fixture
def run(faces: Path, tmp_path: Path) -> Callable[..., int]:
    """`fused-losses train` on a few faces, in the folder of runs tmp_path/runs."""
    start = ["--data", str(faces), "--runs", str(tmp_path / "runs"), "--quiet", *TINY]
    return lambda *words: cli.main([*start, *words])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    told = capsys.readouterr().err
    assert told.count("\n") == 1, told
    return told


# values


@pytest.mark.parametrize("kind", [TrainConfig, GlyphConfig, LargeConfig])
def test_every_value_has_a_type_and_every_number_a_range(kind: type[Config]) -> None:
    config, numbers = kind(), 0
    for f in fields(kind):
        value = getattr(config, f.name)
        wrong: list[object] = [[1, 1, 1], {}, b"text"]
        if not isinstance(value, str):
            wrong += ["1"]
        if not isinstance(value, bool):
            wrong += [True]
        if value is None or isinstance(value, int | float):
            wrong += [math.nan, math.inf, -math.inf] if not isinstance(value, bool) else [0, 1.0]
            numbers += not isinstance(value, bool)
        if isinstance(value, int) and not isinstance(value, bool):
            wrong += [None, 1.5, 10**30, -1]
        if isinstance(value, float):
            wrong += [None, -1.0]
        for bad in wrong:
            with pytest.raises(OptionError, match=f"^{f.name}: ") as refused:
                config.with_changes(**{f.name: bad})
            assert refused.value.name == f.name
    assert numbers > 10


def test_the_range_is_told() -> None:
    for changes, told in (
        ({"lr": math.nan}, "lr: expected 0 to 1e+30, got nan"),
        ({"scale": 0.0}, "scale: expected more than 0 and at most 1e+30, got 0.0"),
        ({"head_momentum": 1.5}, "head_momentum: expected 0 to 1, got 1.5"),
        ({"steps": 2.0}, "steps: expected an integer, got 2.0"),
        ({"compare": 1}, "compare: expected true or false, got 1"),
        ({"margin_value": math.inf}, "margin_value: expected a finite number, got inf"),
    ):
        with pytest.raises(OptionError) as refused:
            TrainConfig(**changes)
        assert str(refused.value) == told
    with pytest.raises(OptionError, match="sample_rate: expected 8.67362e-19 to 1, got 0"):
        GlyphConfig(sample_rate=0)


# the command line


def test_what_cannot_run_is_told_before_there_is_a_folder(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, width): return nn.LazyLinear(num_classes)\n"
        "def none(num_classes): return None\n"
        "def empty(num_classes): return nn.Flatten()\n"
    )
    (tmp_path / "broken_nets.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("FUSED_LOSSES_BACKEND", raising=False)
    table = {
        "--device quark": "--device: expected a device that works here, got 'quark'",
        "--device meta": "--device: expected a device that works here, got 'meta'",
        '--backbone-args {"wide":3}': "--backbone-args: 'small' cannot be built with",
        '--backbone-args {"dropout":7}': "--backbone-args: 'small' cannot be built with",
        "--backbone nets:net": "--backbone: 'nets:net' cannot be built with num_classes=16",
        "--backbone nets:none": "--backbone: expected a module from 'nets:none', got NoneType",
        "--backbone nets:empty": "--backbone: 'nets:empty' has no parameters to train",
        "--backbone nets:absent": "--backbone: 'nets:absent' cannot be imported",
        "--backbone broken_nets:net": "--backbone: 'broken_nets:net' cannot be imported (ZeroDiv",
        "--data absent/folder": "--data: expected 'orl' or a folder, got 'absent/folder'",
        "--lr nan": "--lr: expected 0 to 1e+30, got nan",
        "--warmup 3": "--warmup: expected 0 to 1, got 3.0",
        "--margin none --margin-value 0.1": "--margin-value: margin 'none' takes no value",
        "--margin-value 9": "--margin-value: margin 'arcface' cannot have it: margin: expected",
        "--margin cosface --margin-value 9": "--margin-value: margin 'cosface' cannot have it",
        "--classes 3": "--classes: expected 0 or at least 6, the people that fold 1",
        "--name ../x": "--name: expected the name of one folder in",
        "--name a/b": "--name: expected the name of one folder in",
        f"--name {tmp_path}/x": "--name: expected the name of one folder in",
        "--name ..": "--name: expected the name of one folder in",
        "--resume": "--resume: expected a run to go on with",
        "--resume --name typo": "--resume: expected a run to go on with, ",
        "--batch-size 99999": "--batch-size: expected at most 1024: folds train on fewer",
        f"--name {'x' * 201}": "--name: expected the name of one folder in",
        "--runs /dev/null": "--runs: expected a folder, got '/dev/null': /dev/null is no folder",
        "--runs /dev/null/x": "--runs: expected a folder, got '/dev/null/x': /dev/null is no",
    }
    if not torch.cuda.is_available():
        table["--device cuda"] = "--device: expected a device that works here, got 'cuda' (Torch"
        table["--backend triton"] = "--backend: backend='triton' cannot run this call"
    for words, told in table.items():
        assert run(*words.split()) == 2, words
        assert f"fused-losses train: {told}" in one_line(capsys), words
        assert not (tmp_path / "runs").exists(), words
    for name in (" ", "x ", "x\ny", "x\0"):
        assert run("--name", name) == 2
        assert "--name: expected the name of one folder in" in one_line(capsys)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "x").exists() and not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [(MemoryError("2 EiB"), 2), (RuntimeError("[x] can't allocate memory: you tried\nC++"), 2),
     (KeyboardInterrupt(), 130)],
    ids=("MemoryError", "torch", "Ctrl-C"),
)  # fmt: skip
def test_what_ends_before_the_first_step_is_no_run(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
) -> None:
    def end(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(faces_run, "warm_up", end)
        assert run("--name", "run") == status
    told = capsys.readouterr().err
    assert not (tmp_path / "runs" / "run").exists()
    assert status != 2 or "--batch-size, --embedding, size of the pictures: out of memory" in told
    assert "C++" not in told
    assert run("--name", "run") == 0
    # of a run that has stepped nothing goes
    with monkeypatch.context() as patch:
        patch.setattr(faces_run, "warm_up", end)
        assert run("--name", "run", "--resume", "--steps", "5") == status
    assert run("--name", "run", "--resume", "--steps", "5") == 0


def test_a_dead_run_is_not_what_resume_picks(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--name", "whole") == 0
    assert run("--name", "dead", "--backbone-args", '{"wide":3}') == 2
    capsys.readouterr()
    assert run("--resume") == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["whole"]


def test_a_fold_that_cannot_be_judged_is_found_before_training(
    run: Callable[..., int], faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # of five people a fold has one or two: no pair of different people
    few = tmp_path / "few"
    for person in range(5):
        shutil.copytree(faces / f"p{person}", few / f"p{person}")
    assert run("--data", str(few), "--folds", "4") == 2
    told = one_line(capsys)
    assert "--data: fold 2 cannot be judged: expected at least 2 held-out people" in told
    # one picture of each person: no genuine pair
    single = tmp_path / "single"
    for person in range(8):
        (single / f"p{person}").mkdir(parents=True)
        shutil.copy(faces / f"p{person}" / "0.png", single / f"p{person}")
    assert run("--data", str(single)) == 2
    assert "one of them with 2 pictures, got 2 with at most 1 each" in one_line(capsys)
    assert not (tmp_path / "runs").exists()


def test_the_large_trainer_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, told in {
        "--name ../x": "--name: expected the name of one folder in",
        "--name x --runs /dev/null": "--runs: expected a folder, got '/dev/null'",
        "--name x --head-lr inf": "--head-lr: expected 0 to 1e+30, got inf",
        "--name x --interval 20": "--interval: expected less than half of --timeout 30.0, got 20.0",
        "--name x --hang-timeout 0.5": "--hang-timeout: expected more than --interval 1.0, got 0.5",
    }.items():
        assert large_cli.main(["--runs", str(tmp_path / "runs"), *words.split()]) == 2, words
        assert told in one_line(capsys), words
        assert not (tmp_path / "runs").exists(), words


# files


def test_a_damaged_configuration_is_named_with_its_place(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--name", "run") == 0
    path = tmp_path / "runs" / "run" / "config.json"
    whole = path.read_text()
    told = json.loads(whole)
    for damaged, place in (
        (whole[:40].encode(), "config.json: line 2 column 11: no JSON"),
        (b"\xff" + whole.encode(), "config.json: no UTF-8 at byte 0"),
        (b"[1]", "config.json: expected a JSON object, got list"),
        (b"", "config.json: line 1 column 1: no JSON"),
        (b"[" * 10**6, "config.json: no JSON (maximum recursion"),
        (json.dumps({**told, "stepz": 1}).encode(), "unknown: stepz; missing: none"),
        (json.dumps({k: v for k, v in told.items() if k != "lr"}).encode(), "missing: lr"),
        (json.dumps({**told, "steps": math.nan}).encode(), "steps: expected an integer, got nan"),
        (json.dumps({**told, "lr": [1, 1, 1]}).encode(), "lr: expected a number, got [1, 1, 1]"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(RunFileError, match="config.json: "):
            TrainConfig.load(path)
        assert run("--resume") == 2
        assert place in one_line(capsys)
    assert run("--name", "run", "--overwrite") == 0
    assert path.read_text() == whole


def test_a_damaged_log_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in range(4)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert [line["step"] for line in read_log(path)] == [0, 1, 2, 3]
    for bad in ("{", '{"step": "one"}', "[0]", "", "null"):
        path.write_text("\n".join([lines[0], bad, *lines[2:]]) + "\n")
        with pytest.raises(RunFileError, match=r"log\.jsonl: line 2: "):
            read_log(path)
        with pytest.raises(RunFileError), StepLog(path) as log:
            log.begin(2)
        assert bad in path.read_text().split("\n")


def test_a_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    state = {"losses": torch.arange(3000.0), "net": {"w": torch.randn(40, 50)}, "step": 7}
    checkpoint.save(path, state)
    whole, draw, found = path.read_bytes(), random.Random(0), 0
    # the second half of the file is the large tensor's and the index
    for _ in range(300):
        at = draw.randrange(len(whole))
        bad = bytearray(whole)
        bad[at] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        try:
            loaded = checkpoint.load(path)
        except RunFileError as error:
            assert str(path) in str(error)
            found += 1
            continue
        # padding between the parts means nothing
        assert torch.equal(loaded["losses"], state["losses"]) and loaded["step"] == 7
        assert torch.equal(loaded["net"]["w"], state["net"]["w"])
    assert found > 250
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(RunFileError, match="checkpoint.pt: damaged"):
            checkpoint.load(path)


def test_damaged_and_foreign_states_are_named(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--name", "run") == 0
    folder = tmp_path / "runs" / "run"
    fold, state = folder / "folds" / "trained-0.pt", folder / "folds" / "trained-0.state.pt"
    whole = {path: path.read_bytes() for path in (fold, state)}
    checkpoint.save(fold, {"losses": torch.zeros(3)})
    assert run("--resume") == 2
    assert "trained-0.pt: no result of a fold; missing: backbone, embeddings" in one_line(capsys)
    fold.write_bytes(whole[fold])
    checkpoint.save(state, {**checkpoint.load(state), "backbone": {}})
    assert run("--resume", "--steps", "4") == 2
    assert "trained-0.state.pt: no state of this training (RuntimeError" in one_line(capsys)
    state.write_bytes(whole[state][:-9])
    assert run("--resume", "--steps", "4") == 2
    assert "trained-0.state.pt: damaged" in one_line(capsys)
    state.unlink()
    assert run("--resume", "--steps", "4") == 0


def test_a_file_where_a_folder_should_be_is_found_before_training(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "run"
    for name, kind in (("folds", "a folder"), ("checkpoint.pt", "a file"), ("roc.png", "a file")):
        folder.mkdir(parents=True)
        path = folder / name
        path.write_text("") if kind == "a folder" else path.mkdir()
        assert run("--name", "run", "--overwrite") == 2
        assert f"{name}: expected {kind} of the run, found something else" in one_line(capsys)
        shutil.rmtree(folder)


# while it runs


def test_a_removed_folder_ends_the_run(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for replaced in (False, True):

        def remove(*_: object, replaced: bool = replaced) -> None:
            shutil.rmtree(tmp_path / "runs" / "run")
            if replaced:
                (tmp_path / "runs" / "run" / "folds").mkdir(parents=True)

        monkeypatch.setattr(Progress, "step", remove)
        assert run("--name", "run", "--steps", "1") == 2
        assert "the run's folder was removed while the run went on" in one_line(capsys)
        shutil.rmtree(tmp_path / "runs")


def test_ctrl_c_while_pictures_are_read_says_a_sentence(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(faces_run, "load", interrupted)
    assert run() == 128 + signal.SIGINT
    assert "stopped at once" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

"""Every number and path of every trainer through what is none: it runs, or a line names it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import drawn_glyphs
import pytest
import torch
import torch.distributed as dist
from dataset_pictures import write_faces
from drawn_glyphs import LATIN_GREEK_CYRILLIC
from torch import nn

from fused_losses.train import TrainConfig
from fused_losses.train import cli as small_cli
from fused_losses.train.frame.options import Config
from fused_losses.train.glyphs import GlyphConfig
from fused_losses.train.large import LargeConfig
from fused_losses.train.large import cli as large_cli

pytest.importorskip("PIL.Image", reason="reading pictures needs Pillow")
cache, fonts = drawn_glyphs.cache, drawn_glyphs.fonts  # fixtures of these tests
NUMBERS = ("0", "-1", "nan", "inf", "1e308", "1e-300", str(2**63 - 1), str(10**12))
FEWER = ("-1", "nan", "1e308", str(2**63 - 1))  # a step of these trainers takes longer
ENDLESS = {("steps", str(2**63 - 1)), ("steps", str(10**12))}
LARGE = "--classes 9 --samples 2 --features 4 --hidden 4 --embedding 4 --batch-size 8 --steps 1"
FACES = "--image-size 24x20 --embedding 8 --batch-size 6 --steps 1 --folds 1 --no-compare"
GLYPHS = "--quiet --threads 1 --held-out STIX --classes 40 --queries 20 --embedding 8 --subset 0"


def numbers_of(kind: type[Config]) -> Iterator[str]:
    for f in fields(kind):
        default = f.default
        if default is None or (isinstance(default, int | float) and not isinstance(default, bool)):
            yield f.name


class Runs:
    """A trainer's command on words, and what it says and leaves."""

    def __init__(
        self,
        command: Callable[[list[str]], int],
        start: str,
        place: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.command, self.start, self.place, self.capsys = command, start.split(), place, capsys
        self.count = itertools.count()

    def check(self, name: str, value: str, *more: str) -> int:
        """The status; what was refused named the option in a line and left no folder."""
        flag, run = f"--{name.replace('_', '-')}", str(next(self.count))
        words = ["--runs", str(self.place), "--name", run, *self.start, *more, flag, value]
        try:
            status = self.command(words)
        except SystemExit as left:  # argparse: no number of that kind
            status = left.code
        told = self.capsys.readouterr().err
        assert not dist.is_initialized()
        assert status in (0, 2), (words, told)
        assert "Traceback" not in told, (words, told)
        if status:
            assert flag in told, (words, told)
            assert told.count("\n") == 1 or told.startswith("usage: "), (words, told)
            assert not (self.place / run).exists(), (words, told)
        return status


@pytest.fixture
def contained(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What would end the process ends the test; the threads are as before."""

    def end(status: int) -> None:
        raise AssertionError(f"the process ends with {status}")

    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "_exit", end)
    yield
    torch.set_num_threads(threads)


def averaging(num_classes: int) -> nn.Module:
    """A backbone of vectors with BatchNorm, which makes nothing of one."""
    return nn.Sequential(nn.Linear(4, num_classes), nn.BatchNorm1d(num_classes))


def wide(num_classes: int) -> nn.Module:
    return nn.Linear(4, num_classes + 1)


@pytest.mark.slow
def test_numbers_of_the_large_trainer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], contained: None
) -> None:
    runs = Runs(large_cli.main, LARGE, tmp_path / "runs", capsys)
    for name, value in itertools.product(numbers_of(LargeConfig), NUMBERS):
        if (name, value) not in ENDLESS:
            runs.check(name, value)


@pytest.mark.parametrize(
    ("name", "value", "more", "status"),
    [
        ("batch_size", "1", "--backbone test_train_values:averaging", 2),
        ("batch_size", "1", "--data folders:FACES", 2),
        ("backbone", "mlp", "--data folders:FACES", 2),
        ("backbone", "small", "", 2),
        ("backbone", "test_train_values:wide", "", 2),
        ("image_size", str(10**12), "--data folders:FACES", 2),
        ("classes", str(10**9), f"--sub-centers {10**9}", 2),
        ("samples", str(10**14), "", 2),
        ("threads", "1024", "", 0),
        ("timeout", "1801", "--interval 1e-3 --hang-timeout 1e8", 0),
        ("scale", "1e30", "--nonfinite skip", 0),
        ("head_lr", "1e30", "--steps 3 --head-optimizer adagrad", 0),
        ("margin", "curricularface", "--sub-centers 3", 0),
    ],
)
def test_values_of_the_large_trainer_beside_others(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    contained: None,
    name: str,
    value: str,
    more: str,
    status: int,
) -> None:
    faces = write_faces(tmp_path / "faces", people=8, pictures=2) if "FACES" in more else ""
    runs = Runs(large_cli.main, LARGE, tmp_path / "runs", capsys)
    with pytest.MonkeyPatch.context() as patch:
        if "skip" in more:  # which warns of each step
            patch.setattr("warnings.warn", lambda *_, **__: None)
        assert runs.check(name, value, *more.replace("FACES", str(faces)).split()) == status


@pytest.mark.parametrize("words", ["--scale 1e30", "--noise 1e30 --hidden 1"])
def test_a_first_step_that_cannot_be_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], contained: None, words: str
) -> None:
    words = f"{LARGE} {words} --runs {tmp_path / 'runs'} --name run"
    assert large_cli.main(words.split()) == 2
    assert "lower lr, head_lr or scale" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "run").exists()
    # a second step that cannot be is of a run
    words = f"{LARGE} --steps 3 --optimizer adamw --lr 1e30 --runs {tmp_path / 'runs'} --name run"
    assert large_cli.main(words.split()) == 2
    assert "at step 2: lower lr, head_lr or scale" in capsys.readouterr().err
    assert (tmp_path / "runs" / "run" / "log.jsonl").stat().st_size > 0


def test_paths_of_the_large_trainer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], contained: None
) -> None:
    runs = Runs(large_cli.main, LARGE, tmp_path / "runs", capsys)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no data")
    none = [tmp_path / "missing", tmp_path / "file", tmp_path / "file" / "in", "/dev/null"]
    for place in (*none, tmp_path / "empty", ""):
        for kind in ("folders", "recordio", "webdataset", "glyphs"):
            assert runs.check("data", f"{kind}:{place}") == 2
    for data in ("synthetic:", "synthetic:x", "synthetic:/dev/null", "", ":", "folders", "x:y"):
        assert runs.check("data", data) == 2
    for place in (*none[1:4], "pinned"):
        assert runs.check("storage", str(place)) == 2
    assert runs.check("storage", str(tmp_path / "made" / "here")) == 0
    for place in none[1:4]:
        assert runs.check("runs", str(place)) == 2
    # nor is a file or a folder made where the kernel has none
    assert runs.check("storage", "/proc/none") == runs.check("runs", "/proc/none") == 2


@pytest.mark.slow
def test_numbers_of_the_small_trainers(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    contained: None,
    cache: Path,
    fonts: Path,
) -> None:
    faces = write_faces(tmp_path / "faces", people=8, pictures=3)
    start = f"--data {faces} --quiet --threads 1 --backend cpu {FACES}"
    runs = Runs(small_cli.main, start, tmp_path / "runs", capsys)
    for name, value in itertools.product(numbers_of(TrainConfig), FEWER):
        if (name, value) not in ENDLESS:
            runs.check(name, value)
    start = f"--data glyphs --fonts {fonts} --characters {LATIN_GREEK_CYRILLIC} {GLYPHS} --steps 1"
    runs = Runs(small_cli.main, start, tmp_path / "glyphs", capsys)
    own = [name for name in numbers_of(GlyphConfig) if name not in {*numbers_of(TrainConfig)}]
    for name, value in itertools.product([*own, "embedding", "seed"], FEWER):
        # a comparison of all classes is no fault, and long
        if not (name in ("subset", "queries") and value.isdigit()):
            runs.check(name, value)

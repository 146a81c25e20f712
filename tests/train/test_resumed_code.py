"""A run's config.json may name code; --resume imports none that the user has not confirmed."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_pictures import write_faces

from fused_losses.train import cli
from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.frame.progress import Progress

pytest.importorskip("PIL.Image", reason="reading pictures needs Pillow")
TINY = "--image-size 24x20 --embedding 16 --batch-size 12 --folds 1 --no-compare".split()
TINY += "--threads 1 --backend reference --quiet".split()
NAMED = ["--backbone", "named_net:net", "--backbone-args", '{"width": 3}']


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A first run of two steps with a backbone of the user's; what goes on with it."""
    (tmp_path / "named_net.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, width):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3, 4), nn.Flatten(),\n"
        "                         nn.LazyLinear(num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    faces = write_faces(tmp_path / "faces", people=8, pictures=3)
    runs = ["--runs", str(tmp_path / "runs"), "--name", "run"]
    assert cli.main([*runs, "--data", str(faces), *TINY, "--steps", "2", *NAMED]) == 0
    del sys.modules["named_net"]
    return lambda *words: cli.main([*runs, "--quiet", "--resume", "--steps", "3", *words])


def test_code_that_a_run_names_is_confirmed_before_it_is_imported(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "runs" / "run" / "config.json"
    before = config.read_text()
    refused = f"--backbone: {config} has 'named_net:net', and what it names is imported and called"
    refused += f"; to confirm that, say {shlex.join(NAMED)} or --trust-config\n"
    assert run() == 2
    assert capsys.readouterr().err == f"fused-losses train: {refused}"
    # its arguments are the file's, too
    assert run(*NAMED[:2]) == 2
    assert f"--backbone-args: {config} has '{NAMED[3]}', and" in capsys.readouterr().err
    # and another module than the run's is not confirmed by being said
    assert run("--backbone", "json:loads", *NAMED[2:]) == 2
    assert "cannot resume, the configuration differs" in capsys.readouterr().err
    assert "named_net" not in sys.modules and config.read_text() == before
    assert run(*NAMED) == 0
    del sys.modules["named_net"]
    assert run("--trust-config") == 0 and "named_net" in sys.modules


def test_what_goes_on_with_a_stopped_run_is_told_whole(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert run(*NAMED) == 128 + signal.SIGTERM
    told = capsys.readouterr().err.strip().partition("go on with: fused-losses train ")[2]
    assert shlex.split(told)[-4:] == NAMED
    assert cli.main([*shlex.split(told), "--quiet"]) == 0


def test_the_packages_own_backbone_needs_no_word() -> None:
    assert TrainConfig(backbone_args='{"dropout": 0.1}').code() == {}
    named = TrainConfig(backbone="a:b")
    assert named.code() == {"backbone": "a:b"}
    args = {"backbone_args": json.dumps({"c": 1})}
    assert named.with_changes(**args).code() == {"backbone": "a:b", **args}

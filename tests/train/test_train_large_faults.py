"""Signals, numbers that are not finite, damage and vanished folders of the large trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from places import ROOT

from fused_losses.train import Interrupted
from fused_losses.train.frame.log import read_log
from fused_losses.train.frame.options import OptionError
from fused_losses.train.frame.runs import RunError
from fused_losses.train.large import LargeConfig, train
from fused_losses.train.large.cli import main
from fused_losses.train.large.data import SyntheticVectors
from fused_losses.train.large.loop import LargeTraining

pytestmark = [pytest.mark.processes]
SMALL = LargeConfig(
    classes=23, samples=3, features=6, hidden=8, embedding=5, batch_size=20, steps=8, readers=1,
    checkpoint_every=3, warmup=0.2, sample_rate=0.5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    """Groups that an error has left behind are ended; a run ends its own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def at_step(patch: pytest.MonkeyPatch, number: int, do: Callable[[], object]) -> None:
    """Does something while that step of a large training is under way."""
    real = LargeTraining.step

    def step(self: LargeTraining, at: int, *rest: object) -> float:
        if at == number:
            do()
        return real(self, at, *rest)

    patch.setattr(LargeTraining, "step", step)


def poisoned(patch: pytest.MonkeyPatch, *rows: int) -> None:
    """NaN in these vectors of the synthetic set."""
    real = SyntheticVectors.read

    def read(self: SyntheticVectors, indices: object) -> torch.Tensor:
        out, indices = real(self, indices), torch.as_tensor(indices)
        out[torch.isin(indices, torch.tensor(rows))] = math.nan
        return out

    patch.setattr(SyntheticVectors, "read", read)


def remove(folder: Path) -> None:
    """A checkpoint may be on its way to the disk meanwhile."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


# alone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = train(SMALL, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        # a launcher hands on what the terminal has sent already: twice is once
        at_step(patch, 4, lambda: (signal.raise_signal(number), signal.raise_signal(number)))
        train(SMALL, tmp_path / "parts")
    assert stopped.value.signal == number and steps_of(tmp_path / "parts") == [3, 5]
    assert not dist.is_initialized() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(SMALL, tmp_path / "parts") == whole[5:]
    told = [line["loss"] for line in read_log(tmp_path / "parts" / "log.jsonl")]
    assert told == whole
    # more steps, from the last one
    assert len(train(dataclasses.replace(SMALL, steps=10), tmp_path / "parts")) == 2


def test_the_command_says_how_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    words = ["--runs", str(tmp_path), "--name", "run", "--steps", "4"]
    words += "--classes 9 --features 4 --embedding 4 --batch-size 8".split()
    assert main(words) == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(words) == 0
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [0, 1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run_or_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, 40)  # of 69 rows: once an epoch of three steps
    with pytest.raises(RunError, match=r"the loss is nan at step [123]: .*--nonfinite skip"):
        train(SMALL, tmp_path / "stop")
    skipping = dataclasses.replace(SMALL, nonfinite="skip")
    with pytest.warns(UserWarning, match="step . is skipped: the loss is nan"):
        losses = train(skipping, tmp_path / "stop")
    bad = [step for step, loss in enumerate(losses) if math.isnan(loss)]
    assert 2 <= len(bad) <= 3
    lines = read_log(tmp_path / "stop" / "log.jsonl")
    assert [line["step"] for line in lines if line["loss"] is None] == bad
    assert "NaN" not in (tmp_path / "stop" / "log.jsonl").read_text()
    # the same as if those steps had not been: neither weights nor momentum have moved
    taken: list[torch.Tensor] = []
    monkeypatch.undo()
    real = LargeTraining.step

    def leaving_out(self: LargeTraining, at: int, *rest: object) -> float:
        loss = math.nan if at in bad else real(self, at, *rest)
        if at == SMALL.steps - 1:
            taken.extend(p.detach().clone() for p in self.backbone.parameters())
        self.signal = 0
        return loss

    monkeypatch.setattr(LargeTraining, "step", leaving_out)
    clean = train(skipping, tmp_path / "clean")
    assert [loss for loss in clean if loss == loss] == [loss for loss in losses if loss == loss]
    assert all(p.isfinite().all() for p in taken)


class Wide(torch.nn.Sequential):
    """A backbone whose gradient is not finite in one step, and whose BatchNorm keeps averages."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(torch.nn.BatchNorm1d(6), torch.nn.Linear(6, num_classes))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, self.calls = super().forward(x), self.calls + 1
        self.calls -= not self.training  # as a run looks at it once before it begins
        if self.calls == 2:
            out.register_hook(lambda grad: grad * math.inf)
        return out


def test_a_gradient_that_is_not_finite_moves_no_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(
        SMALL, backbone="test_train_large_faults:Wide", nonfinite="skip", steps=5
    )
    poisoned(monkeypatch, 40)
    seen: list[torch.Tensor] = []
    real = LargeTraining.step

    def step(self: LargeTraining, *rest: object) -> float:
        loss = real(self, *rest)
        kept = [*self.backbone.parameters(), *self.backbone.buffers()]
        seen.append(torch.cat([one.detach().double().flatten() for one in kept]))
        return loss

    monkeypatch.setattr(LargeTraining, "step", step)
    with pytest.warns(UserWarning, match="step 2 is skipped: the backbone's gradient has the norm"):
        losses = train(config, tmp_path / "run")
    # nor do averages of the batches with NaN stay
    assert all(values.isfinite().all() for values in seen)
    assert sum(map(math.isnan, losses)) == 2
    monkeypatch.undo()
    with pytest.raises(RunError, match="gradient has the norm .* at step 2: lower lr"):
        train(dataclasses.replace(config, nonfinite="stop"), tmp_path / "stop")


def test_damage_falls_back_and_the_losses_are_the_same(tmp_path: Path) -> None:
    whole = train(SMALL, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000008" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"step-00000008: damaged .*step-00000006 is read"):
        assert train(SMALL, tmp_path / "run") == whole[6:]
    # a log that a person or a disk has spoiled
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text().replace('"step": 3', '"step": "3'))
    with pytest.raises(RunError, match=r"log\.jsonl: line 4: "):
        train(SMALL, tmp_path / "run")


def test_a_removed_folder_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, step in enumerate((1, 7)):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch, pytest.raises(RunError, match="folder was removed"):
            at_step(patch, step, lambda folder=folder: remove(folder))
            train(SMALL, folder)
        assert not (folder / "config.json").exists()


def test_what_cannot_run_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for changes, told in (
        ({"backbone_args": '{"wide": 1}'}, "^backbone_args: 'auto' cannot be built with"),
        ({"backbone": "nowhere:net"}, "^backbone: 'nowhere:net' cannot be imported"),
        ({"data": "folders:absent"}, "^data: expected a folder after folders:, 'absent'"),
        ({"data": "recordio:absent"}, "^data: .*absent"),
        ({"data": f"folders:{tmp_path / 'empty'}"}, "^data: .*empty"),
        ({"backend": "reference"}, "^backend: expected a streamed one"),
    ):
        with pytest.raises(OptionError, match=told):
            train(dataclasses.replace(SMALL, **changes), tmp_path / "run")
        assert not dist.is_initialized()  # all ranks know, and leave in order
        assert not (tmp_path / "run").exists(), changes
    assert main(["--runs", str(tmp_path), "--name", "run", "--data", "recordio:absent"]) == 2
    err = capsys.readouterr().err
    assert "fused_losses.train.large: --data: " in err and "Traceback" not in err
    # where a checkpoint's folder should be is a file: found before the first step
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000003").write_text("")
    with pytest.raises(RuntimeError, match="step-00000003: expected a checkpoint's folder"):
        train(SMALL, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@contextlib.contextmanager
def full_disk(most: int) -> Iterator[None]:
    """Files take `most` bytes and no more, as on a disk that is full."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def status_of(patch: pytest.MonkeyPatch, words: list[str]) -> object:
    """Of the command, which may end its process without further ado."""
    patch.setattr(os, "_exit", sys.exit)
    try:
        return main(words)
    except SystemExit as ended:
        return ended.code


def test_a_full_disk_ends_the_run_with_a_sentence_and_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(SMALL, tmp_path / "whole")
    words = [f"--{f.name.replace('_', '-')}={getattr(SMALL, f.name)}" for f in changed(SMALL)]
    words += ["--runs", str(tmp_path), "--name", "run"]
    with monkeypatch.context() as patch, contextlib.ExitStack() as full:

        def fill() -> None:
            # a checkpoint is written beside the steps
            deadline, saved = time.monotonic() + 60, tmp_path / "run" / "checkpoints"
            while (
                os.listdir(saved) != ["step-00000003"] and time.monotonic() < deadline
            ):  # fmt: skip
                time.sleep(0.01)
            full.enter_context(full_disk(1024))

        at_step(patch, 4, fill)
        assert status_of(patch, words) == 2
    told = capsys.readouterr().err
    assert "File too large" in told and "the run goes on from its newest checkpoint" in told
    assert told.count("\n") == 1 and "Traceback" not in told
    assert steps_of(tmp_path / "run") == [3]
    # of the log alone, at the step after the one that it has no room for
    with monkeypatch.context() as patch, contextlib.ExitStack() as full:
        at_step(patch, 3, lambda: full.enter_context(full_disk(100)))
        assert status_of(patch, words) == 2
    told = capsys.readouterr().err
    assert "log.jsonl" in told and told.count("\n") == 1 and "Traceback" not in told
    assert steps_of(tmp_path / "run") == [3]
    assert train(SMALL, tmp_path / "run") == whole[3:]
    assert [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl")] == whole


def changed(config: LargeConfig) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]


# two ranks


def faults_of_two(rank: int, folder: str) -> list[float]:
    place = Path(folder)
    whole = train(SMALL, place / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stopped:
        # one rank alone has the signal
        at_step(patch, 4, lambda: rank == 1 and os.kill(os.getpid(), signal.SIGTERM))
        train(SMALL, place / "parts")
    assert stopped.value.signal == signal.SIGTERM and steps_of(place / "parts") == [3, 5]
    dist.barrier()
    assert train(SMALL, place / "parts") == whole[5:]
    # one rank alone has the row
    config = dataclasses.replace(SMALL, nonfinite="skip", parallel="fsdp2")
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, 40)
        losses = train(config, place / "skip")
    assert 2 <= sum(map(math.isnan, losses)) <= 3 and losses[-1] < losses[0] + 5
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="folder was removed"):
        at_step(patch, 1, lambda: rank == 0 and shutil.rmtree(place / "whole"))
        shutil.rmtree(place / "whole" / "checkpoints", ignore_errors=True)
        dist.barrier()
        train(SMALL, place / "whole")
    return losses


def test_ranks_stop_skip_and_refuse_as_one(tmp_path: Path) -> None:
    one, two = processes.run(2, faults_of_two, str(tmp_path))
    assert json.dumps(one) == json.dumps(two)


# leaving


def test_ranks_leave_in_order(tmp_path: Path) -> None:
    """Interpreters that end by themselves, not forks or `__main__`, which skip their end."""
    start = "import sys; from fused_losses.train.large.cli import main; sys.exit(main())"
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port()),
    }  # fmt: skip
    words = ["--runs", str(tmp_path), "--name", "run", "--steps", "4", "--checkpoint-every", "2"]
    words += "--classes 9 --features 4 --embedding 4 --batch-size 8".split()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", start, *words],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=150)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told


def _free_port() -> int:
    store = dist.TCPStore("localhost", 0, 1, is_master=True)
    return store.port

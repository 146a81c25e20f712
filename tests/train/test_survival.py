"""Runs that are killed at random moments end as if nobody had touched them."""

import dataclasses
import json
import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from places import search_path
from torch import Tensor, nn
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from fused_losses import datasets
from fused_losses.base.files import DataError
from fused_losses.centers.checkpoint import Checkpoints
from fused_losses.train.frame.log import StepLog
from fused_losses.train.frame.runs import RunError
from fused_losses.train.large.cli import main
from fused_losses.train.large.config import LargeConfig
from fused_losses.train.large.data import SyntheticVectors, hashed_normal
from fused_losses.train.large.join import fresh_store
from fused_losses.train.large.loop import LargeTraining, train

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.xdist_group("survival")]

STEPS, KILLS, RANKS = 60, 10, 2
# what a rank imports before its first step; DistributedDataParallel takes torch._dynamo
PRELOAD = ["fused_losses.train.large.loop", "torch._dynamo", "pytest", "test_survival"]

# ---- what runs in other processes ---------------------------------------------------------------


class SlowNet(nn.Sequential):
    """A backbone that tells its process's id, and is slow enough for a kill to hit a step."""

    def __init__(self, num_classes: int, pids: str) -> None:
        super().__init__(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, num_classes))
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        text = Path(pids, f"{os.environ['RANK']}.part")
        text.write_text(f"{attempt} {os.getpid()}")
        text.rename(text.with_suffix(".pid"))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().forward(x)


def launch(*arguments: str) -> None:
    """torchrun's engine over forks of a process that has the imports: a restart is a second."""
    mp.set_forkserver_preload(PRELOAD)
    split = arguments.index("-m")
    config, _, _ = config_from_args(parse_args([*arguments[:split], "-m", "unused"]))
    config.start_method = "forkserver"
    elastic_launch(config, main)(list(arguments[split + 2 :]))


class Run:
    """A training in processes of its own, and its files."""

    def __init__(self, runs: Path, name: str, *, ranks: int, engine: str = "forks") -> None:
        self.folder, self.pids = runs / name, runs / f"{name}.pids"
        self.pids.mkdir(parents=True, exist_ok=True)
        self.error = runs / f"{name}.err"
        elastic = [
            "--nnodes=1", f"--nproc-per-node={ranks}", f"--max-restarts={KILLS + 2}",
            "--monitor-interval=0.05", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
            f"--rdzv-id={name}",
        ]  # fmt: skip
        training = [
            "-m", "fused_losses.train.large", "--runs", str(runs), "--name", name,
            "--backbone", "test_survival:SlowNet",
            "--backbone-args", json.dumps({"pids": str(self.pids)}),
            *"--classes 101 --features 12 --embedding 8 --batch-size 31 --dtype float64".split(),
            *"--sample-rate 0.5 --head-weight-decay 5e-4 --checkpoint-every 3".split(),
            "--steps", str(STEPS),
        ]  # fmt: skip
        start = (
            ["-c", "import sys, test_survival; test_survival.launch(*sys.argv[1:])"]
            if engine == "forks"
            else ["-m", "torch.distributed.run"]
        )
        environment = {
            **os.environ,
            "PYTHONPATH": search_path(Path(__file__).parent),
            "OMP_NUM_THREADS": "1",
        }
        with open(self.error, "w") as error:
            self.process = subprocess.Popen(
                [sys.executable, *start, *elastic, *training],
                stdout=error,
                stderr=error,
                env=environment,
                start_new_session=True,
            )

    def log(self) -> list[dict]:
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # the last line may be half written
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self) -> list[float]:
        """The loss of every step; each stands in the log once, in order."""
        log = self.log()
        assert [line["step"] for line in log] == list(range(STEPS))
        return [line["loss"] for line in log]

    def ranks_of(self, attempt: int, ranks: int) -> list[int] | None:
        """Process ids of the ranks of that attempt, once all have started."""
        told = [path.read_text().split() for path in sorted(self.pids.glob("*.pid"))]
        found = [int(pid) for number, pid in told if int(number) == attempt]
        return found if len(found) == ranks else None

    def wait_for(self, what: Callable[[], object], seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.error.read_text()[-4000:]
            assert time.monotonic() < deadline, self.error.read_text()[-4000:]
            time.sleep(0.002)

    def finish(self, seconds: float = 150) -> None:
        assert self.process.wait(seconds) == 0, self.error.read_text()[-4000:]

    def kill(self) -> None:
        """The launcher and all that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Run]]:
    """An undisturbed run, and one to be killed, started together."""
    folder = tmp_path_factory.mktemp("runs")
    both = Run(folder, "undisturbed", ranks=RANKS), Run(folder, "killed", ranks=RANKS)
    yield both
    for run in both:
        if run.process.poll() is None:
            run.kill()


# ---- training -----------------------------------------------------------------------------------


def test_ten_kills_change_nothing(runs: tuple[Run, Run]) -> None:
    undisturbed, run = runs
    chance = random.Random()
    # every other process group is young: killed while it starts, loads or writes its first steps
    marks = sorted(chance.sample(range(4, STEPS - 6), KILLS))
    for attempt, mark in enumerate(marks):
        run.wait_for(lambda attempt=attempt: run.ranks_of(attempt, RANKS))
        pids = run.ranks_of(attempt, RANKS)
        if attempt % 3 != 2:
            run.wait_for(lambda mark=mark: len(run.log()) >= mark)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(chance.choice(pids), signal.SIGKILL)
    run.finish()
    undisturbed.finish()
    assert run.ranks_of(KILLS, RANKS), "there were as many restarts as kills"
    losses = run.losses()
    assert losses == undisturbed.losses()
    assert losses[-1] < losses[0]
    left = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert left == {f"step-{STEPS - 3:08d}", f"step-{STEPS:08d}"}


def test_torchrun_goes_on_with_another_number_of_ranks(runs: tuple[Run, Run]) -> None:
    undisturbed = runs[0]
    folder = undisturbed.folder.parent
    before = Run(folder, "resized", ranks=2, engine="torchrun")
    before.wait_for(lambda: (before.folder / "checkpoints" / "step-00000006").exists())
    before.kill()
    done = len(before.log())
    assert 6 <= done < STEPS
    after = Run(folder, "resized", ranks=3, engine="torchrun")
    after.finish()
    undisturbed.finish()
    expected, losses = torch.tensor([undisturbed.losses(), after.losses()], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)


@pytest.fixture
def no_group() -> Iterator[None]:
    """Groups that an error has left behind are ended; a run ends its own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


SMALL = LargeConfig(
    classes=23, samples=3, features=6, hidden=8, embedding=5, batch_size=20, steps=9, readers=1,
    checkpoint_every=2, warmup=0.2,
)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"head_momentum": 0.8, "head_weight_decay": 1e-3, "sample_rate": 0.3, "log_q": True},
        {"parallel": "fsdp2", "optimizer": "adamw", "lr": 1e-2, "head_optimizer": "adamw"},
        {"head_optimizer": "adagrad", "sub_centers": 2, "margin": "cosface", "dtype": "bfloat16"},
        {"dtype": "float64", "margin": "none", "schedule": "linear", "momentum": 0.0},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_stopped_run_goes_on_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_group: None, options: dict
) -> None:
    config = dataclasses.replace(SMALL, **options)
    expected = train(config, tmp_path / "whole")
    assert len(expected) == 9 and all(loss > 0 for loss in expected)

    class Stop(Exception):
        pass

    real = LargeTraining.step

    def stop_in_step_7(self: LargeTraining, step: int, *rest: object) -> float:
        if step == 7:
            raise Stop
        return real(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(LargeTraining, "step", stop_in_step_7)
        train(config, tmp_path / "parts")
    dist.destroy_process_group()
    # what came after the newest complete checkpoint is done again: that of step 6, or of step 4
    rest = train(config, tmp_path / "parts")
    assert 3 <= len(rest) <= 5 and rest == expected[-len(rest) :]
    log = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").open()]
    assert [(line["step"], line["loss"]) for line in log] == list(enumerate(expected))
    assert train(config, tmp_path / "parts") == []


def write_pictures(folder: Path, form: str) -> str:
    """Two classes of four grey pictures; what --data says of them."""
    pictures = pytest.importorskip("PIL.Image")
    records = []
    for i in range(8):
        path = folder / "pictures" / f"class {i // 4}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.new("L", (40, 40), 100 * (i // 4) + i).save(path)
        records.append((path.read_bytes(), i // 4))
    if form == "folders":
        return f"folders:{folder / 'pictures'}"
    datasets.write_records(folder / "train.rec", records, size=(40, 40))
    return f"recordio:{folder / 'train.rec'}"


@pytest.mark.parametrize("form", ["folders", "recordio"])
def test_pictures(tmp_path: Path, no_group: None, form: str) -> None:
    data = write_pictures(tmp_path, form)
    config = dataclasses.replace(
        SMALL, data=data, classes=9, batch_size=6, steps=3, augment="light", margin="none"
    )
    losses = train(config, tmp_path / "run")
    assert len(losses) == 3 and losses == train(config, tmp_path / "again")
    # the table is padded to the classes asked for
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        table = {"head": {"weight": torch.empty(9, SMALL.embedding)}}
        assert checkpoints.load(table) == 3


def test_a_picture_that_cannot_be_read_by_choice(tmp_path: Path, no_group: None) -> None:
    data = write_pictures(tmp_path, "folders")
    broken = sorted((tmp_path / "pictures").rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:60])
    config = dataclasses.replace(
        SMALL, data=data, classes=9, batch_size=6, steps=3, margin="none", corrupt="skip"
    )
    with pytest.warns(UserWarning, match=rf"pictures passed over: 1\n  .*{broken.name}: not a pic"):
        losses = train(config, tmp_path / "run")
    assert len(losses) == 3
    with pytest.raises(DataError, match=rf"{broken.name}: not a picture that can be read"):
        train(dataclasses.replace(config, corrupt="raise"), tmp_path / "other")
    dist.destroy_process_group()


def test_folder_of_another_run_is_refused(tmp_path: Path, no_group: None) -> None:
    train(dataclasses.replace(SMALL, steps=1), tmp_path)
    with pytest.raises(
        RunError, match="holds a run that differs\n  scale: the run has 64.0, asked"
    ):
        train(dataclasses.replace(SMALL, scale=8.0), tmp_path)
    dist.destroy_process_group()
    # what changes no loss may change, and a finished run goes on to more steps
    assert train(dataclasses.replace(SMALL, steps=1, keep=1), tmp_path) == []
    assert len(train(SMALL, tmp_path)) == SMALL.steps - 1


def test_log_keeps_the_steps_before_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(5))
    path.write_text(whole + '{"step": 5, "lo')
    with StepLog(path) as log:
        log.begin(3)
        log.write(3, 0.1, 0.01, 0.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (0, 0.5), (1, 0.5), (2, 0.5), (3, 0.1),
    ]  # fmt: skip


def test_command_line_names_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--name", "x", "--batch-size", "0"]) == 2
    assert "--batch-size: expected at least 1, got 0" in capsys.readouterr().err
    assert main(["--name", "x", "--data", "folders"]) == 2
    assert "--data: expected synthetic, glyphs, or one of" in capsys.readouterr().err
    assert main(["--name", "x", "--backbone-args", "[1]"]) == 2
    assert "--backbone-args: expected a JSON object, got '[1]'" in capsys.readouterr().err


def test_synthetic_vectors_are_functions_of_their_index() -> None:
    vectors = SyntheticVectors(classes=1000, samples=40, features=8, noise=0.5, seed=3)
    indices = torch.arange(len(vectors))
    x, labels = vectors.read(indices), vectors.labels[indices]
    assert torch.equal(labels, indices % 1000) and x.dtype == torch.float32
    assert torch.equal(vectors.read(indices[[5, 70]]), x[[5, 70]])
    # within a class the noise alone; means of unit variance, none like another
    means = x.view(40, 1000, 8).mean(0)
    assert abs((x.view(40, 1000, 8) - means).std().item() - 0.5) < 0.01
    assert abs(means.std().item() - 1.0) < 0.05 and abs(means.mean().item()) < 0.05
    assert (means.T.corrcoef() - torch.eye(8)).abs().max() < 0.15
    other = SyntheticVectors(classes=1000, samples=40, features=8, noise=0.5, seed=4)
    assert (other.read(indices[:9]) != x[:9]).all()
    assert torch.isfinite(hashed_normal(torch.arange(1 << 16), 4, seed=0)).all()


def test_ranks_meet_in_a_store_with_the_leavings_of_dead_ones() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        former: list[dist.Store] = []
        for attempt in range(3):
            # rank 0 comes last: the others find what an earlier attempt left
            waiting = [pool.submit(fresh_store, store, rank, 3) for rank in (2, 1)]
            time.sleep(0.02)
            met = [fresh_store(store, 0, 3), *(future.result() for future in waiting)]
            assert not any(each.check(["key"]) for each in met)
            met[0].set("key", str(attempt))
            assert [each.get("key") for each in met] == [str(attempt).encode()] * 3
            former.append(met[0])
        assert [each.get("key") for each in former] == [b"0", b"1", b"2"]
    with pytest.raises(TimeoutError, match="ranks 1 of 2 did not come"):
        fresh_store(store, 0, 2, timedelta(seconds=0.05))

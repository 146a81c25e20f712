"""What the ranks of a soak train: an episode's options by its seed, undisturbed and harassed."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dense_head import MARGIN, SCALE, DenseHead
from head_walk import KINDS
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from fused_losses.centers import ClassCenters
from fused_losses.centers.checkpoint import CheckpointError, Checkpoints
from fused_losses.centers.sampling import sample
from fused_losses.centers.watch import EXIT_CODE, RankFailure, RankWatch
from fused_losses.margins import CosFace
from fused_losses.train.frame.runs import StopSignals
from fused_losses.train.large.cli import main as large
from fused_losses.train.large.config import LargeConfig
from fused_losses.train.large.group import highest
from fused_losses.train.large.loop import train

WORLD, CLASSES, FEATURES, DIM, ROWS, EVERY = 2, 101, 12, 8, 31, 7
INTERVAL, TIMEOUT, HANG = 1.0, 15.0, 25.0  # of the watch, in seconds


@dataclass(frozen=True)
class Episode:
    """seed: of all that is drawn. share: of a core that a rank takes, by sleeping after steps."""

    seed: int
    steps: int
    share: float

    @property
    def draw(self) -> random.Random:
        return random.Random(self.seed)

    @property
    def trainer(self) -> bool:
        """Of `fused_losses.train.large`; else of a loop as people write it."""
        return self.draw.random() < 0.25

    @property
    def sampled(self) -> bool:
        own = self.arguments(0.0) if self.trainer else self.options()
        return own["sample_rate"] < 1

    def options(self) -> dict[str, Any]:
        """The head's."""
        draw = self.draw
        optimizer, options = KINDS[draw.choice(list(KINDS))]
        return dict(
            optimizer=optimizer,
            optimizer_options={**options, "lr": options["lr"] / 4},
            update=draw.choice(("backward", "step")),
            sample_rate=draw.choice((1.0, 0.4)),
            sub_centers=draw.choice((1, 2)),
            max_grad_norm=draw.choice((None, 0.5)),
            seed=self.seed,
        )

    def arguments(self, pause: float) -> dict[str, Any]:
        """The trainer's."""
        draw = self.draw
        return dict(
            backbone="episodes:SlowNet",
            backbone_args=json.dumps({"pause": pause}),
            classes=CLASSES,
            features=FEATURES,
            embedding=DIM,
            batch_size=ROWS,
            dtype="float64",
            sample_rate=draw.choice((1.0, 0.4)),
            head_optimizer=draw.choice(("sgd", "adamw", "adagrad")),
            parallel=draw.choice(("ddp", "fsdp2")),
            checkpoint_every=EVERY,
            steps=self.steps,
            seed=self.seed,
            interval=INTERVAL,
            timeout=TIMEOUT,
            hang_timeout=HANG,
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """All ranks' rows."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        x = torch.randn(ROWS, FEATURES, dtype=torch.float64, generator=generator)
        return x, torch.randint(0, CLASSES, (ROWS,), generator=generator)


def small_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, DIM)).double()


class SlowNet(nn.Sequential):
    """A backbone for the trainer, each of whose steps takes its time asleep."""

    def __init__(self, num_classes: int, pause: float) -> None:
        super().__init__(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, num_classes))
        self.pause = pause

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.pause)
        return super().forward(x)


class Training:
    """One rank's part of an episode in a loop of one's own."""

    def __init__(self, episode: Episode) -> None:
        self.episode = episode
        self.net = small_net(episode.seed)
        self.head = ClassCenters(
            CLASSES, DIM, dtype=torch.float64, margin=CosFace(MARGIN), scale=SCALE,
            **episode.options(),
        )  # fmt: skip
        self.spread = DistributedDataParallel(self.net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)

    def step(self, number: int) -> float:
        rank, world = dist.get_rank(), dist.get_world_size()
        x, y = self.episode.batch(number)
        own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        loss = self.head(self.spread(x[own]), y[own])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        assert self.head.optimizer is not None
        self.head.optimizer.step()
        return loss.item()

    def state(self) -> dict[str, Any]:
        net, optimizer = get_state_dict(self.net, self.optimizer)
        return {"net": net, "optimizer": optimizer, "head": self.head.state()}

    def resume(self, checkpoints: Checkpoints) -> int:
        if checkpoints.latest() is None:
            return 0
        state = self.state()
        step = checkpoints.load(state)
        assert step is not None
        set_state_dict(
            self.net,
            self.optimizer,
            model_state_dict=state["net"],
            optim_state_dict=state["optimizer"],
        )
        self.head.load()
        return step


def steps_of(training: Training, first: int) -> Iterator[tuple[int, float]]:
    """(step, loss), at the episode's share of a core."""
    for number in range(first, training.episode.steps):
        began = time.thread_time()
        loss = training.step(number)
        yield number, loss
        time.sleep((time.thread_time() - began) * (1 / training.episode.share - 1))


# ---- undisturbed --------------------------------------------------------------------------------


def undisturbed(rank: int, folder: str, connection: Any) -> None:
    """Trains what the connection asks for, in processes that live as long as the soak."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/truth", rank=rank, world_size=2)
    number = 0
    while (episode := connection.recv()) is not None:
        number += 1
        place = Path(folder) / f"truth-{number}"
        if episode.trainer:
            config = LargeConfig(**episode.arguments(0.05))
            found: dict[str, Any] = {"losses": train(config, place), "dense": 0.0}
        else:
            found = _truth(episode, place)
        gc.collect()
        connection.send({**found, **usage()})


def _truth(episode: Episode, folder: Path) -> dict[str, Any]:
    training = Training(episode)
    parts: list[Any] = [None] * WORLD
    dist.all_gather_object(parts, training.head.weight.clone())
    losses = []
    with Checkpoints(folder) as checkpoints:
        for number, loss in steps_of(training, 0):
            losses.append(loss)
            if (number + 1) % EVERY == 0:
                checkpoints.save(training.state(), number + 1)
    dense = _dense(episode, torch.cat(parts)) if dist.get_rank() == 0 else losses
    apart = [abs(one - two) / abs(two) for one, two in zip(losses, dense, strict=True)]
    return {"losses": losses, "dense": max(apart)}


def _dense(episode: Episode, weight: Tensor) -> list[float]:
    """The same losses of a dense table under torch.optim."""
    net, options, losses = small_net(episode.seed), episode.options(), []
    model = DenseHead(weight, options["optimizer"], options["optimizer_options"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    rate = options["sample_rate"]
    for number in range(episode.steps):
        x, y = episode.batch(number)
        drawn = sample(0, CLASSES, rate, seed=episode.seed, step=model.steps) if rate < 1 else None
        part = model.taking_part(y, drawn)
        loss = model.loss(net(x), y, part)
        gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter.grad = gradient
        model.backward(loss, part)
        model.step(options["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
        time.sleep(0.01)
    return losses


def usage() -> dict[str, float]:
    """What this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


# ---- harassed -----------------------------------------------------------------------------------


def harassed(rank: int, world: int, episode: Episode, disk: str, told: str, port: int) -> None:
    """One rank of one attempt. told: where it says what it does; ends the process."""
    torch.set_num_threads(1)
    with open(f"{told}.err", "a") as errors:
        os.dup2(errors.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    if episode.trainer:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        }  # fmt: skip
        given = {f"--{k.replace('_', '-')}": v for k, v in episode.arguments(0.2).items()}
        sys.exit(large([*_flat(given), "--runs", disk, "--name", "run"]))
    dist.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world
    )
    try:
        _harassed(episode, Path(disk) / "checkpoints", told)
    except RankFailure as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
    dist.destroy_process_group()


def _flat(given: dict[str, Any]) -> list[str]:
    return [text for key, value in given.items() for text in (key, str(value))]


def _harassed(episode: Episode, folder: Path, told: str) -> None:
    stop = StopSignals()
    with (
        RankWatch.of_group(interval=INTERVAL, timeout=TIMEOUT, hang_timeout=HANG) as watch,
        open(f"{told}.jsonl", "a", buffering=1) as file,
    ):

        def tell(**what: Any) -> None:
            file.write(json.dumps(what) + "\n")

        training = Training(episode)
        with Checkpoints(folder) as checkpoints, stop.watching():
            start = training.resume(checkpoints)
            tell(resumed=start)
            for number, loss in steps_of(training, start):
                watch.progress(number)
                tell(step=number, loss=loss.hex())
                done = number + 1
                (signal,) = highest(stop() or 0, device=torch.device("cpu"))
                if signal or done % EVERY == 0:
                    _save(checkpoints, training, done, tell, asynchronous=not signal)
                if signal:
                    return
            while not _kept(checkpoints, training, tell):  # until there is room
                watch.progress(episode.steps)
                time.sleep(1)


def _kept(checkpoints: Checkpoints, training: Training, tell: Any) -> bool:
    """Whether the last step has its checkpoint, which is tried once more."""
    with contextlib.suppress(CheckpointError):
        checkpoints.wait()
    done = training.episode.steps
    return checkpoints.latest() == done or _save(
        checkpoints, training, done, tell, asynchronous=False
    )


def _save(
    checkpoints: Checkpoints, training: Training, done: int, tell: Any, *, asynchronous: bool
) -> bool:
    """Training goes on where the disk is full."""
    try:
        checkpoints.save(training.state(), done, asynchronous=asynchronous)
        return True
    except CheckpointError as error:
        tell(refused=str(error))
        return False

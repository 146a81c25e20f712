"""The run of one rank: join the others, go on from the newest checkpoint, train, log, save."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fused_losses.base.files import write_text
from fused_losses.centers.checkpoint import CheckpointError, Checkpoints
from fused_losses.centers.watch import RankWatch
from fused_losses.datasets import ImageSet
from fused_losses.datasets.base import EncodedImages
from fused_losses.datasets.sampler import EpochBatches, PrefetchReader
from fused_losses.train.faces.augment import augment, normalize
from fused_losses.train.frame.log import LOG, TENSORBOARD, StepLog
from fused_losses.train.frame.options import OptionError
from fused_losses.train.frame.runs import CONFIG, RunError, StopSignals, forget
from fused_losses.train.frame.seeds import seed_from
from fused_losses.train.frame.steps import Interrupted, go_through, learning_rate_factor, set_rates
from fused_losses.train.large.config import LargeConfig
from fused_losses.train.large.group import (
    FirstLock,
    deterministic,
    first_does,
    first_locked,
    highest,
    process_group,
)
from fused_losses.train.large.ready import (
    check_batch,
    check_head,
    check_same,
    make_head,
    read_images,
    ready,
)

CHECKPOINTS = "checkpoints"
START_SECONDS = 1800.0  # for a rank's first steps, at least
NAMED = 20  # pictures passed over, in the warning at the end


def train(config: LargeConfig, folder: str | Path) -> list[float]:
    """Train to the last step, from the newest checkpoint in `folder` if it has one.

    Every rank calls it, under torchrun, inside a process group, or alone. Returns the losses of
    the steps done by this call (NaN for a step that was skipped). For one number of ranks they are
    bitwise those of a run that was never stopped; another number sees the same batches and differs
    by rounding. A finished run goes on to more steps.
    Raises `OptionError` for what cannot run here and `RunError` for a folder of another run, both
    before the folder is made or changed; `RunError` where the loss is not finite or the folder is
    removed; `Interrupted` after SIGINT or SIGTERM to any rank, with a checkpoint written;
    `RankFailure` when another rank is lost.
    """
    torch.set_num_threads(config.threads)
    backbone = ready(config)
    with process_group(config) as device:
        losses, ended = _train(config, Path(folder), backbone, device)
        del backbone
    if ended is not None:
        raise ended
    return losses


def _train(
    config: LargeConfig, folder: Path, backbone: nn.Module, device: torch.device
) -> tuple[list[float], Exception | None]:
    """(losses, what ended the run early on all ranks alike, to be raised once they have left)."""
    try:
        images = read_images(config)
        check_batch(config, backbone.to(device, _float(config)), images)
        check_head(config, max(images.classes, config.classes), device)
        with first_locked(folder) as lock, deterministic():
            first_does(lambda: check_same(config, folder / CONFIG))
            try:
                return _in_folder(config, folder, backbone, images, device, lock)
            finally:
                if dist.get_rank() == 0:
                    forget(folder, (CONFIG, LOG, TENSORBOARD, CHECKPOINTS))
    except OptionError as error:  # of all ranks
        error.__cause__ = None  # whose frames keep tensors
        return [], error.with_traceback(None)


def _in_folder(
    config: LargeConfig,
    folder: Path,
    backbone: nn.Module,
    images: ImageSet,
    device: torch.device,
    lock: FirstLock,
) -> tuple[list[float], Exception | None]:
    with RankWatch.of_group(
        interval=config.interval,
        timeout=config.timeout,
        hang_timeout=config.hang_timeout,
        start_timeout=max(START_SECONDS, config.timeout),
    ) as watch:
        training = LargeTraining(config, device, backbone, images)
        with Checkpoints(folder / CHECKPOINTS, keep=config.keep) as checkpoints:
            start = training.resume(checkpoints)
            first = dist.get_rank() == 0
            board = folder / TENSORBOARD if first and config.tensorboard else None
            with StepLog(folder / LOG if first else None, board) as log:
                first_does(lambda: log.begin(start))
                # last of what may fail at the start: a run that never began is no run
                first_does(lambda: write_text(folder / CONFIG, config.to_json()))
                return training.run(start, checkpoints, log, watch, lock)


def _float(config: LargeConfig) -> torch.dtype:
    """Of the backbone."""
    return torch.float64 if config.dtype == "float64" else torch.float32


class LargeTraining:
    """One rank's part of everything that a step changes."""

    def __init__(
        self, config: LargeConfig, device: torch.device, backbone: nn.Module, images: ImageSet
    ) -> None:
        self.config, self.device, self.images = config, device, images
        self.unlogged: OSError | None = None  # why the log could not be written
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.float = _float(config)
        self.backbone = _spread(backbone, config)
        self.optimizer = _optimizer(self.backbone, config)
        classes = max(images.classes, config.classes)
        self.head = make_head(config, classes, device, config.storage or None)
        assert self.head.optimizer is not None
        self.head_optimizer = self.head.optimizer
        self.peaks = ((self.optimizer, config.lr), (self.head_optimizer, config.head_lr))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; tensors share the training's memory."""
        backbone, optimizer = get_state_dict(self.backbone, self.optimizer)
        return {"backbone": backbone, "optimizer": optimizer, "head": self.head.state()}

    def resume(self, checkpoints: Checkpoints) -> int:
        """The step to begin with: the newest checkpoint's, whatever number of ranks wrote it."""
        if checkpoints.latest() is None:
            return 0
        # reading the optimiser's state makes it, by a step that a fresh run must not take
        state = self.state()
        step = checkpoints.load(state)
        assert step is not None  # where there was one
        set_state_dict(
            self.backbone,
            self.optimizer,
            model_state_dict=state["backbone"],
            optim_state_dict=state["optimizer"],
        )
        self.head.load()
        return step

    def run(
        self,
        start: int,
        checkpoints: Checkpoints,
        log: StepLog,
        watch: RankWatch,
        lock: FirstLock,
    ) -> tuple[list[float], Exception | None]:
        """Steps [start, config.steps); their losses, and what ended them early."""
        config, losses = self.config, []
        n = len(self.images)
        sampler = EpochBatches(
            n,
            config.batch_size,
            seed=config.seed,
            world=self.world,
            rank=self.rank,
            # a short last batch may leave a rank one picture, of which BatchNorm makes nothing
            drop_last=n >= config.batch_size,
        )
        ahead = {"threads": config.readers, "start": start, "stop": config.steps}
        with (
            PrefetchReader(self.images, sampler, **ahead) as reader,
            # before the first step there is nothing to save: a signal ends the process
            StopSignals().watching() as self.asked,
        ):

            def step(number: int) -> None:
                batch = next(reader)
                watch.progress(number)
                began = time.monotonic()
                factor = learning_rate_factor(number, config)
                images, labels = batch.images.to(self.device), batch.labels.to(self.device)
                losses.append(self.step(number, factor, images, labels))
                try:
                    log.write(number, losses[-1], factor * config.lr, time.monotonic() - began)
                except OSError as error:  # of this rank; the next step tells all
                    error.filename = error.filename or str(log.path)
                    self.unlogged = error

            def due(done: int) -> bool:
                return done % config.checkpoint_every == 0 or done == config.steps

            def save(done: int) -> None:
                lock.check()
                self.check_logged()
                first_does(log.sync)  # a checkpoint's steps are in the log before it exists
                checkpoints.save(self.state(), done)

            try:
                go_through(start, config.steps, step, due=due, save=save, asked=lambda: self.signal)
                checkpoints.wait()
                lock.check()
            except Interrupted as stopped:
                return losses, stopped.with_traceback(None)  # which would keep this frame's tensors
            except CheckpointError as error:
                told = f"{error}; the run goes on from its newest checkpoint"
                return losses, RunError(told)
            except RunError as error:
                with contextlib.suppress(CheckpointError):  # that there is no folder is told better
                    checkpoints.wait()
                return losses, error.with_traceback(None)
            finally:
                _name_skipped(self.images)
        return losses, None

    def step(self, step: int, factor: float, images: Tensor, labels: Tensor) -> float:
        """Train on this rank's part of a batch; the loss of the whole of it, NaN if skipped."""
        # every step draws from its own seed: a checkpoint needs no generator's state
        seed = seed_from("step", self.config.seed, step, self.rank)
        torch.manual_seed(seed)
        set_rates(self.peaks, factor)
        if images.dtype == torch.uint8:
            generator = torch.Generator().manual_seed(seed)
            images = augment(normalize(images), self.config.augment, generator)
        skips = self.config.nonfinite == "skip"
        before = [buffer.clone() for buffer in self.backbone.buffers()] if skips else []
        loss = self.head(self.backbone(images.to(self.float)), labels)
        value = float(loss.detach())
        # one message tells all ranks what any has seen: they stop, skip and save at one step
        signal = self.asked() or 0
        bad, self.signal, unlogged = highest(
            not math.isfinite(value), signal, self.unlogged is not None, device=self.device
        )
        if unlogged:
            self.check_logged()
        if bad:
            self._refuse(step, f"the loss is {value}")
            with torch.no_grad():  # averages of a batch that is not finite stay so
                for buffer, kept in zip(self.backbone.buffers(), before, strict=True):
                    buffer.copy_(kept)
            return math.nan
        self.optimizer.zero_grad()
        try:
            loss.backward()
        except FloatingPointError as error:  # the table's own gradient, which moved no row
            self._refuse(step, str(error))
        norm = _gradient_norm(self.backbone)  # alike on all ranks: of averaged, or of all, shards
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            self._refuse(step, f"the backbone's gradient has the norm {norm}, the loss is {value}")
        self.head_optimizer.step()
        return value

    def check_logged(self) -> None:
        """RunError on every rank where the first could not write the log."""

        def say() -> None:
            if self.unlogged is not None:
                raise self.unlogged

        first_does(say)

    def _refuse(self, step: int, told: str) -> None:
        """RunError, on all ranks, unless such steps are skipped."""
        if self.config.nonfinite == "stop":
            raise RunError(
                f"{told} at step {step + 1}: lower lr, head_lr or scale, or leave such steps "
                "out with --nonfinite skip; the run goes on from its newest checkpoint"
            )
        if self.rank == 0:
            warnings.warn(f"step {step + 1} is skipped: {told}", stacklevel=2)


def _name_skipped(images: ImageSet) -> None:
    """What `--corrupt skip` has passed over on this rank since the start, in one warning."""
    skipped = list(images.skipped.values()) if isinstance(images, EncodedImages) else []
    if skipped:
        rest = f"; and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
        told = "\n  ".join(skipped[:NAMED])
        warnings.warn(f"pictures passed over: {len(skipped)}\n  {told}{rest}", stacklevel=2)


def _gradient_norm(backbone: nn.Module) -> float:
    gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _spread(backbone: nn.Module, config: LargeConfig) -> nn.Module:
    """The backbone with its gradients averaged over the ranks."""
    if config.parallel == "fsdp2":
        fully_shard(backbone, mesh=init_device_mesh(config.device, (dist.get_world_size(),)))
        return backbone
    # without this flag DDP lays its buckets out anew after the first step that it sees: a resumed
    # run would add three or more ranks' gradients in another order than one that went on
    return DistributedDataParallel(backbone, find_unused_parameters=dist.get_world_size() > 2)


def _optimizer(backbone: nn.Module, config: LargeConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(backbone.parameters(), **options)
    return torch.optim.SGD(backbone.parameters(), momentum=config.momentum, **options)

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
from fused_losses.centers.head import ClassCenters
from fused_losses.centers.watch import RankWatch
from fused_losses.datasets import ImageSet
from fused_losses.datasets.base import EncodedImages
from fused_losses.datasets.sampler import EpochBatches, PrefetchReader
from fused_losses.train.faces.augment import augment, normalize
from fused_losses.train.faces.backbone import SmallFaceNet, call_factory, load_backbone
from fused_losses.train.frame.heads import make_margin
from fused_losses.train.frame.log import LOG, TENSORBOARD, StepLog
from fused_losses.train.frame.options import OptionError, differences
from fused_losses.train.frame.preflight import check_backend, check_machine
from fused_losses.train.frame.runs import CONFIG, RunError, StopSignals
from fused_losses.train.frame.seeds import seed_from
from fused_losses.train.frame.steps import Interrupted, go_through, learning_rate_factor, set_rates
from fused_losses.train.large.config import LargeConfig
from fused_losses.train.large.data import load
from fused_losses.train.large.group import (
    FirstLock,
    deterministic,
    first_does,
    first_locked,
    highest,
    process_group,
)

CHECKPOINTS = "checkpoints"
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
    backbone = _ready(config)
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
    images = _images(config)
    with first_locked(folder) as lock, deterministic():
        first_does(lambda: _check_same(config, folder / CONFIG))
        with RankWatch.of_group(
            interval=config.interval, timeout=config.timeout, hang_timeout=config.hang_timeout
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


def _ready(config: LargeConfig) -> nn.Module:
    """The backbone, once nothing is left that one rank alone can know to fail."""
    check_machine(config.device, config.tensorboard)
    if config.backend == "reference":
        raise OptionError(
            "backend", "expected a streamed one: the table's reference is not sharded"
        )
    dtype = getattr(torch, config.dtype)
    check_backend(config.backend, config.device, config.precision, dtype)
    kind, _, place = config.data.partition(":")
    if kind == "folders" and not Path(place).is_dir():
        raise OptionError("data", f"expected a folder after {kind}:, {place!r} is none")
    torch.manual_seed(seed_from("weights", config.seed))
    return _backbone(config)


def _images(config: LargeConfig) -> ImageSet:
    """The set, on every rank; OptionError on all where the first cannot read it."""
    found: list[ImageSet] = []
    try:
        first_does(lambda: found.append(load(config)))  # it leaves the set's index for the others
    except RunError as error:
        raise OptionError("data", str(error)) from error
    return found[0] if found else load(config)


def _check_same(config: LargeConfig, path: Path) -> None:
    """RunError where the folder has a run of another configuration."""
    unlike = differences(LargeConfig.load(path), config) if path.exists() else []
    if unlike:
        raise RunError("\n  ".join([f"{path.parent}: holds a run that differs", *unlike]))


class LargeTraining:
    """One rank's part of everything that a step changes."""

    def __init__(
        self, config: LargeConfig, device: torch.device, backbone: nn.Module, images: ImageSet
    ) -> None:
        self.config, self.device, self.images = config, device, images
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        wide = config.dtype == "float64"
        self.float = torch.float64 if wide else torch.float32
        self.backbone = _spread(backbone.to(device, self.float), config)
        self.optimizer = _optimizer(self.backbone, config)
        self.head = ClassCenters(
            max(self.images.classes, config.classes),
            config.embedding,
            margin=make_margin(config.margin, config.margin_value),
            scale=config.scale,
            sample_rate=config.sample_rate,
            log_q=config.log_q,
            sub_centers=config.sub_centers,
            optimizer=config.head_optimizer,
            optimizer_options=config.head_options(),
            dtype=getattr(torch, config.dtype),
            device=device,
            storage=config.storage or None,
            seed=seed_from("head", config.seed) % 2**31,
            precision=config.precision,
            backend=None if config.backend == "auto" else config.backend,
            nonfinite={"stop": "raise", "skip": "skip"}[config.nonfinite],
        )
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
                log.write(number, losses[-1], factor * config.lr, time.monotonic() - began)

            def due(done: int) -> bool:
                return done % config.checkpoint_every == 0 or done == config.steps

            def save(done: int) -> None:
                lock.check()
                log.sync()  # a checkpoint's steps are in the log before it exists
                checkpoints.save(self.state(), done)

            try:
                go_through(start, config.steps, step, due=due, save=save, asked=lambda: self.signal)
                checkpoints.wait()
                lock.check()
            except Interrupted as stopped:
                return losses, stopped.with_traceback(None)  # which would keep this frame's tensors
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
        bad, self.signal = highest(not math.isfinite(value), signal, device=self.device)
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

    def _refuse(self, step: int, told: str) -> None:
        """RunError, on all ranks, unless such steps are skipped."""
        if self.config.nonfinite == "stop":
            raise RunError(
                f"{told} at step {step + 1}: lower lr or head_lr, or leave such steps out with "
                "--nonfinite skip; the run goes on from its newest checkpoint"
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


class VectorNet(nn.Sequential):
    """Vectors [B, features] -> embeddings [B, D]; no statistics of the batch, which ranks share."""

    def __init__(self, features: int, hidden: int, embedding: int) -> None:
        super().__init__(
            nn.Linear(features, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, embedding, bias=False),
        )


def _backbone(config: LargeConfig) -> nn.Module:
    kind = config.backbone
    if kind == "auto":
        kind = "mlp" if config.data == "synthetic" else "small"
    if kind == "mlp":
        own = {"features": config.features, "hidden": config.hidden}
        return call_factory(VectorNet, config, **own, embedding=config.embedding)
    if kind == "small":
        own = {"height": config.image_size, "width": config.image_size, "channels": config.channels}
        return call_factory(SmallFaceNet, config, **own, embedding=config.embedding)
    return call_factory(load_backbone(kind), config, num_classes=config.embedding)


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

"""The run of one rank: join the others, go on from the newest checkpoint, train, log, save."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fused_losses.base.files import write_text
from fused_losses.centers.checkpoint import Checkpoints
from fused_losses.centers.head import ClassCenters
from fused_losses.centers.watch import RankWatch
from fused_losses.datasets.sampler import EpochBatches, PrefetchReader
from fused_losses.train.faces.augment import augment, normalize
from fused_losses.train.faces.backbone import SmallFaceNet, load_backbone
from fused_losses.train.frame.heads import make_margin
from fused_losses.train.frame.options import differences
from fused_losses.train.frame.runs import CONFIG, locked
from fused_losses.train.frame.seeds import seed_from
from fused_losses.train.frame.steps import go_through, learning_rate_factor, set_rates
from fused_losses.train.large.config import LargeConfig
from fused_losses.train.large.data import load
from fused_losses.train.large.join import fresh_store

LOG, CHECKPOINTS = "log.jsonl", "checkpoints"
LOCK_SECONDS = 30.0  # for the former process of this run to be gone after a restart


class RunError(RuntimeError):
    """The folder cannot take this run; the text says why, on every rank."""


def train(config: LargeConfig, folder: str | Path) -> list[float]:
    """Train to the last step, from the newest checkpoint in `folder` if it has one.

    Every rank calls it, under torchrun, inside a process group, or alone. Returns the losses of
    the steps done by this call. For one number of ranks they are bitwise those of a run that was
    never stopped; another number sees the same batches and differs by rounding.
    Raises `RunError` for a folder of another run, `RankFailure` when another rank is lost.
    """
    folder = Path(folder)
    torch.set_num_threads(config.threads)
    with _process_group(config) as device, _locked(folder), _deterministic():
        _prepare(config, folder)
        with RankWatch.of_group(
            interval=config.interval, timeout=config.timeout, hang_timeout=config.hang_timeout
        ) as watch:
            training = LargeTraining(config, device)
            with Checkpoints(folder / CHECKPOINTS, keep=config.keep) as checkpoints:
                start = training.resume(checkpoints)
                with Log(folder / LOG, start) as log:
                    return training.run(start, checkpoints, log, watch)


class LargeTraining:
    """One rank's part of everything that a step changes."""

    def __init__(self, config: LargeConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        with _first_rank_first():  # it leaves the set's index for the others
            self.images = load(config)
        wide = config.dtype == "float64"
        self.float = torch.float64 if wide else torch.float32
        torch.manual_seed(seed_from("weights", config.seed))
        self.backbone = _spread(_backbone(config).to(device, self.float), config)
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

    def run(self, start: int, checkpoints: Checkpoints, log: Log, watch: RankWatch) -> list[float]:
        """Steps [start, config.steps); their losses."""
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
        with PrefetchReader(self.images, sampler, **ahead) as reader:

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
                log.sync()  # a checkpoint's steps are in the log before it exists
                checkpoints.save(self.state(), done)

            go_through(start, config.steps, step, due=due, save=save)
        return losses

    def step(self, step: int, factor: float, images: Tensor, labels: Tensor) -> float:
        """Train on this rank's part of a batch; the loss of the whole of it."""
        # every step draws from its own seed: a checkpoint needs no generator's state
        seed = seed_from("step", self.config.seed, step, self.rank)
        torch.manual_seed(seed)
        set_rates(self.peaks, factor)
        if images.dtype == torch.uint8:
            generator = torch.Generator().manual_seed(seed)
            images = augment(normalize(images), self.config.augment, generator)
        loss = self.head(self.backbone(images.to(self.float)), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.head_optimizer.step()
        return float(loss.detach())


class Log:
    """One JSON line a step on rank 0: {"step", "loss", "lr", "seconds"}.

    Opened at step `start`, it keeps the lines of the steps before: what was done after the
    checkpoint is done again, and is then there once.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.file: TextIO | None = None
        if dist.get_rank():
            return
        kept = [line for line in _lines(path) if line["step"] < start]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(path, "a")  # noqa: SIM115

    def write(self, step: int, loss: float, lr: float, seconds: float) -> None:
        if self.file is not None:
            record = {"step": step, "loss": loss, "lr": lr, "seconds": round(seconds, 6)}
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def sync(self) -> None:
        if self.file is not None:
            os.fsync(self.file.fileno())

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log up to the first that a kill has torn."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


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
    kind, args = config.backbone, config.factory_args()
    if kind == "auto":
        kind = "mlp" if config.data == "synthetic" else "small"
    if kind == "mlp":
        return VectorNet(config.features, config.hidden, config.embedding, **args)
    if kind == "small":
        side = config.image_size
        return SmallFaceNet(side, side, config.channels, config.embedding, **args)
    return load_backbone(kind)(**{"num_classes": config.embedding, **args})


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


@contextlib.contextmanager
def _process_group(config: LargeConfig) -> Iterator[torch.device]:
    """The group of torchrun's processes, of the caller, or of this process alone; its device."""
    device = torch.device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # cuBLAS is deterministic with a workspace of a fixed size alone
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if dist.is_initialized():
        yield device
        return
    # gloo beside NCCL: the checkpoints' threads talk on the host
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        store, rank, world = next(rendezvous("env://"))
        store = fresh_store(store, rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    yield device
    # not after an error: it waits for ranks that may be gone
    dist.destroy_process_group()


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic operations where torch has them; a warning names those that are not."""
    # not use_deterministic_algorithms: it imports torch's compiler
    former = torch.get_deterministic_debug_mode()
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    # a pass over every new tensor, for programs that read what they have not written
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(former)
        deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def _first_rank_first() -> Iterator[None]:
    """Rank 0 does the work, then the others."""
    if dist.get_rank():
        dist.barrier()
    yield
    if not dist.get_rank():
        dist.barrier()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One run a folder: rank 0's lock; a restart waits until the former process is gone."""
    with contextlib.ExitStack() as held:
        trouble = None
        if dist.get_rank() == 0:
            try:
                held.enter_context(locked(folder, seconds=LOCK_SECONDS))
            except RuntimeError as error:
                trouble = str(error)
        _agree(trouble)
        yield


def _prepare(config: LargeConfig, folder: Path) -> None:
    """The configuration in the folder; a run that has another one is refused."""
    trouble = None
    if dist.get_rank() == 0:
        path = folder / CONFIG
        if path.exists():
            unlike = differences(LargeConfig.load(path), config)
            trouble = (
                "\n  ".join([f"{folder}: holds a run that differs", *unlike]) if unlike else None
            )
        if trouble is None:
            write_text(path, config.to_json())
    _agree(trouble)


def _agree(trouble: str | None) -> None:
    """Rank 0's refusal, raised on every rank."""
    box = [trouble]
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        raise RunError(box[0])

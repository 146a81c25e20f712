"""What a large run needs before it has a folder: the backbone, the pictures, room for the table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fused_losses.centers.head import ClassCenters
from fused_losses.centers.storage import PINNED, Storage
from fused_losses.datasets import ImageSet
from fused_losses.train.faces.backbone import (
    SmallFaceNet,
    call_factory,
    check_embeds,
    load_backbone,
)
from fused_losses.train.frame.heads import make_margin
from fused_losses.train.frame.options import OptionError, differences
from fused_losses.train.frame.preflight import (
    check_backend,
    check_machine,
    check_room,
    memory_of,
)
from fused_losses.train.frame.runs import RunError, check_folder
from fused_losses.train.frame.seeds import seed_from
from fused_losses.train.large.config import LargeConfig
from fused_losses.train.large.data import SyntheticVectors, load
from fused_losses.train.large.group import first_does


def ready(config: LargeConfig) -> nn.Module:
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
    if config.storage:
        _check_storage(config)
    torch.manual_seed(seed_from("weights", config.seed))
    return _backbone(config)


def _check_storage(config: LargeConfig) -> None:
    if config.storage != PINNED:
        check_folder("storage", config.storage)
    if config.storage == PINNED or config.device != "cpu":
        try:
            Storage(config.storage, torch.device(config.device))
        except ValueError as error:
            raise OptionError("storage", str(error).partition(": ")[2]) from error


def read_images(config: LargeConfig) -> ImageSet:
    """The set, on every rank; OptionError on all where the first cannot read it."""
    found: list[ImageSet] = []
    try:
        first_does(lambda: found.append(load(config)))  # it leaves the set's index for the others
    except RunError as error:
        raise OptionError("data", str(error)) from error
    return found[0] if found else load(config)


def check_same(config: LargeConfig, path: Path) -> None:
    """RunError where the folder has a run of another configuration."""
    unlike = differences(LargeConfig.load(path), config) if path.exists() else []
    if unlike:
        raise RunError("\n  ".join([f"{path.parent}: holds a run that differs", *unlike]))


def check_batch(config: LargeConfig, backbone: nn.Module, images: ImageSet) -> None:
    """OptionError on all ranks where the backbone cannot train on a batch's smallest part."""
    shape = (
        (images.features,)
        if isinstance(images, SyntheticVectors)
        else (config.channels, config.image_size, config.image_size)
    )
    world = dist.get_world_size()
    check_embeds(backbone, shape, config, dim=config.embedding)
    part = min(config.batch_size, len(images)) // world
    if part > 1:
        return
    try:
        check_embeds(backbone, shape, config, dim=config.embedding, rows=part, training=True)
    except OptionError as error:
        of = f"of which a rank of {world} has {part}" if world > 1 else "of all pictures"
        text = f"expected more than {config.batch_size}, {of}: {error.text}"
        raise OptionError("batch_size", text) from error


def make_head(
    config: LargeConfig, classes: int, device: torch.device, storage: str | None
) -> ClassCenters:
    """The configured head over this many classes."""
    return ClassCenters(
        classes,
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
        storage=storage,
        seed=seed_from("head", config.seed) % 2**31,
        precision=config.precision,
        backend=None if config.backend == "auto" else config.backend,
        nonfinite={"stop": "raise", "skip": "skip"}[config.nonfinite],
    )


def check_head(config: LargeConfig, classes: int, device: torch.device) -> None:
    """OptionError, on all ranks, for a head that cannot be, or has no room."""
    world = dist.get_world_size()
    rows = -(-classes // world) * config.sub_centers
    option = "sub_centers" if config.sub_centers > classes else "classes"
    option = "storage" if config.storage else option
    dtype = getattr(torch, config.dtype)
    check_room(option, rows, config.embedding, dtype, _room(config, device))
    try:
        make_head(config, world, device, None)
    except (ValueError, TypeError) as error:
        name, _, told = str(error).partition(": ")
        raise (OptionError(name, told) if name in vars(config) else RunError(str(error))) from error


def _room(config: LargeConfig, device: torch.device) -> int:
    """Bytes of the disk, the GPU or the machine that a rank's rows lie in."""
    if config.storage and config.storage != PINNED:
        place = Path(config.storage).absolute()
        return shutil.disk_usage(next(one for one in (place, *place.parents) if one.exists())).total
    return memory_of(torch.device("cpu") if config.storage == PINNED else device)


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
        own: dict[str, Any] = {"features": config.features, "hidden": config.hidden}
        return call_factory(VectorNet, config, **own, embedding=config.embedding)
    if kind == "small":
        own = {"height": config.image_size, "width": config.image_size, "channels": config.channels}
        return call_factory(SmallFaceNet, config, **own, embedding=config.embedding)
    return call_factory(load_backbone(kind), config, num_classes=config.embedding)

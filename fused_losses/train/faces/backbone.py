"""Backbones: pictures [B, channels, H, W] -> embeddings [B, D], not normalised."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_losses.train.faces.augment import normalize
from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.frame.memory import is_memory
from fused_losses.train.frame.options import OptionError

OPTIONS = {"height": "image_size", "width": "image_size", "num_classes": "embedding"}
WIDTHS = (16, 32, 64, 128)


class BackboneConfig(Protocol):
    """What a factory is called by."""

    @property
    def backbone(self) -> str: ...

    def factory_args(self) -> dict[str, Any]: ...


class SmallFaceNet(nn.Module):
    """Four convolutions, each halving the picture, and one linear map: two CPU cores suffice.

    Pooling comes before BatchNorm and activation (the same maxima, a quarter of the work), and
    weights lie channels-last: both measured, four times faster than the textbook order.
    The last BatchNorm has no scale: embeddings keep unit variance, as the ArcFace recipe has it.
    """

    def __init__(
        self, height: int, width: int, channels: int = 1, embedding: int = 128, dropout: float = 0.3
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = channels
        for after in WIDTHS:
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.MaxPool2d(2, ceil_mode=True),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.1, inplace=True),
            ]
            before, height, width = after, (height + 1) // 2, (width + 1) // 2
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.embed = nn.Linear(before * height * width, embedding, bias=False)
        self.normalize = nn.BatchNorm1d(embedding, affine=False)
        # torch's overloads leave it out
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, images: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, D]
        images = images.contiguous(memory_format=torch.channels_last)
        return self.normalize(self.embed(self.dropout(self.features(images).flatten(1))))


def load_backbone(path: str) -> Callable[..., nn.Module]:
    """The factory at "package.module:factory"."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        text = f"expected 'small' or 'package.module:factory', got {path!r}"
        raise OptionError("backbone", text)
    try:
        factory: Callable[..., nn.Module] = getattr(importlib.import_module(module_name), name)
    # a module of the user's can fail in any way
    except Exception as error:
        raise OptionError("backbone", f"{path!r} cannot be imported ({_told(error)})") from error
    if not callable(factory):
        raise OptionError("backbone", f"{path!r} is not callable")
    return factory


def call_factory(
    factory: Callable[..., nn.Module], config: BackboneConfig, **own: int
) -> nn.Module:
    """factory(**own, **backbone_args); OptionError where that is no module."""
    args = config.factory_args()
    try:
        backbone = factory(**own, **args)
    except Exception as error:
        option = "backbone_args" if args else "backbone"
        if is_memory(error) and not args:
            largest = max(own, key=own.__getitem__)
            option = OPTIONS.get(largest, largest)
        given = ", ".join(f"{name}={value!r}" for name, value in {**own, **args}.items())
        text = f"{config.backbone!r} cannot be built with {given} ({_told(error)})"
        raise OptionError(option, text) from error
    if not isinstance(backbone, nn.Module):
        text = f"expected a module from {config.backbone!r}, got {type(backbone).__name__}"
        raise OptionError("backbone", text)
    return backbone


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def build(config: TrainConfig) -> nn.Module:
    """The configured backbone; a factory is called as factory(num_classes=D, **backbone_args).

    `num_classes` is the size of the last layer in torchvision and timm, so that layer embeds.
    """
    height, width = config.size()
    channels = config.picture_channels()
    if config.backbone == "small":
        own = {"height": height, "width": width, "channels": channels}
        return call_factory(SmallFaceNet, config, **own, embedding=config.embedding)
    return call_factory(load_backbone(config.backbone), config, num_classes=config.embedding)


def embedding_size(backbone: nn.Module, config: TrainConfig) -> int:
    """D, read off one forward pass, so that any module that embeds pictures will do."""
    return check_embeds(backbone, (config.picture_channels(), *config.size()), config)


def check_embeds(
    backbone: nn.Module,
    shape: tuple[int, ...],
    config: BackboneConfig,
    *,
    dim: int | None = None,
    rows: int = 2,
    training: bool = False,
) -> int:
    """D of the embeddings of inputs of this shape; OptionError where they have none, or not `dim`.

    training: as in a step; averages of batches stay as they are.
    """
    parameter = next(backbone.parameters(), None)
    if parameter is None:
        raise OptionError("backbone", f"{config.backbone!r} has no parameters to train")
    was_training, buffers = backbone.training, [b.clone() for b in backbone.buffers()]
    backbone.train(training)
    probe = torch.zeros(rows, *shape, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad():
            out = backbone(probe)
            for buffer, kept in zip(backbone.buffers(), buffers, strict=True):
                buffer.copy_(kept)
    except Exception as error:
        text = f"{config.backbone!r} fails on inputs {tuple(probe.shape)}: {_told(error)}"
        raise OptionError("backbone", text) from error
    finally:
        backbone.train(was_training)
    if not isinstance(out, Tensor) or out.dim() != 2 or out.shape[0] != rows:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise OptionError(
            "backbone", f"expected embeddings [{rows}, D] for {rows} inputs, got {got}"
        )
    if dim not in (None, out.shape[1]):
        text = f"expected embeddings of {dim} numbers, the --embedding, got {out.shape[1]}"
        raise OptionError("backbone", text)
    return out.shape[1]


def views(images: Tensor) -> list[Tensor]:  # [n, channels, H, W]
    """The pictures as they are and a little to each side, each with its mirror image."""
    height, width = images.shape[-2:]
    by = max(1, round(0.04 * width))
    padded = F.pad(images, (by, by, by, by), mode="replicate")
    shifted = [
        padded[:, :, top : top + height, left : left + width]
        for top, left in ((by, by), (0, by), (2 * by, by), (by, 0), (by, 2 * by))
    ]
    return [view for one in shifted for view in (one, one.flip(-1))]


@torch.no_grad()
def embed(
    backbone: nn.Module,
    images: Tensor,  # [n, channels, H, W] uint8
    *,
    batch: int = 256,
) -> Tensor:  # [n, D], rows of norm 1
    """Embeddings for evaluation: the direction of the sum over a picture's `views`."""
    was_training = backbone.training
    backbone.eval()
    device = next(backbone.parameters()).device
    out = []
    for part in images.split(batch):
        each = views(normalize(part.to(device)))
        none = torch.zeros((), device=device)
        rows = sum((F.normalize(backbone(view).float()) for view in each), none)
        out.append(F.normalize(rows).cpu())
    backbone.train(was_training)
    return torch.cat(out)

"""Backbones: pictures [B, channels, H, W] -> embeddings [B, D], not normalised."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_losses.train.faces.augment import normalize
from fused_losses.train.faces.config import TrainConfig

WIDTHS = (16, 32, 64, 128)


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
        raise ValueError(f"backbone: expected 'small' or 'package.module:factory', got {path!r}")
    try:
        factory: Callable[..., nn.Module] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"backbone: {path!r} cannot be imported ({error})") from error
    if not callable(factory):
        raise ValueError(f"backbone: {path!r} is not callable")
    return factory


def build(config: TrainConfig) -> nn.Module:
    """The configured backbone; a factory is called as factory(num_classes=D, **backbone_args).

    `num_classes` is the size of the last layer in torchvision and timm, so that layer embeds.
    """
    height, width = config.size()
    channels = config.picture_channels()
    if config.backbone == "small":
        return SmallFaceNet(height, width, channels, config.embedding, **config.factory_args())
    factory = load_backbone(config.backbone)
    return factory(**{"num_classes": config.embedding, **config.factory_args()})


def embedding_size(backbone: nn.Module, config: TrainConfig) -> int:
    """D, read off one forward pass, so that any module that embeds pictures will do."""
    height, width = config.size()
    was_training = backbone.training
    backbone.eval()
    parameter = next(backbone.parameters())
    probe = torch.zeros(2, config.picture_channels(), height, width, device=parameter.device)
    try:
        with torch.no_grad():
            out = backbone(probe)
    except Exception as error:
        raise ValueError(
            f"backbone: {config.backbone!r} fails on pictures {tuple(probe.shape)}: {error}"
        ) from error
    finally:
        backbone.train(was_training)
    if not isinstance(out, Tensor) or out.dim() != 2 or out.shape[0] != 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"backbone: expected embeddings [2, D] for 2 pictures, got {got}")
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

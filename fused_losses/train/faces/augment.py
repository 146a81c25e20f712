"""Augmentation in plain torch, on whole batches, from a seeded generator.

One affine map per picture (flip, rotation, scale, shift), then contrast, brightness and a patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Strengths: each drawn uniformly from [-value, value] per picture, each picture its own."""

    rotation: float = 0.0  # degrees
    scale: float = 0.0  # log of the zoom
    shift: float = 0.0  # share of the picture
    brightness: float = 0.0  # in units of `normalize`
    contrast: float = 0.0  # log of the factor
    patch: float = 0.0  # probability that a patch is blanked
    flip: bool = True


STRENGTHS = {
    "light": Augmentation(shift=0.05),
    "full": Augmentation(
        rotation=10, scale=0.1, shift=0.08, brightness=0.2, contrast=0.2, patch=0.5
    ),
}


def normalize(images: Tensor) -> Tensor:
    """uint8 -> float32 around 0; fixed constants, so that no picture's pixels leak into another."""
    return (images.float() - 112.0) / 50.0


def augment(
    images: Tensor,  # [B, channels, height, width] float
    kind: str,
    generator: torch.Generator,  # on the CPU: the same draws for every device
) -> Tensor:
    """A changed copy of each picture, of the same shape."""
    if kind == "none" or len(images) == 0:
        return images
    strength = STRENGTHS[kind]
    n, _, height, width = images.shape

    def draw(most: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * most

    turn = draw(math.radians(strength.rotation))
    zoom = torch.exp(draw(strength.scale))
    mirror = torch.where(draw(1.0) < 0, -1.0, 1.0) if strength.flip else torch.ones(n)
    # grid_sample's square [-1, 1]^2 is stretched to the picture: undone, or a turn would shear
    aspect = height / width
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    top = [cos * mirror, -sin * aspect, draw(2 * strength.shift)]
    bottom = [sin / aspect * mirror, cos, draw(2 * strength.shift)]
    maps = torch.stack(top + bottom, 1).view(n, 2, 3).to(images)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    mean = images.mean((1, 2, 3), keepdim=True)
    factor = torch.exp(draw(strength.contrast)).view(-1, 1, 1, 1).to(images)
    offset = draw(strength.brightness).view(-1, 1, 1, 1).to(images)
    images = (images - mean) * factor + mean + offset
    if strength.patch:
        blank = _patches(n, height, width, strength.patch, generator).to(images.device)
        images = images.masked_fill(blank, 0.0)
    return images


def _patches(n: int, height: int, width: int, share: float, generator: torch.Generator) -> Tensor:
    """Where a patch of 0.3 x 0.3 of the picture is blanked. [n, 1, height, width] bool"""

    def span(length: int) -> Tensor:
        size = max(1, round(0.3 * length))
        start = torch.randint(0, length - size + 1, (n, 1), generator=generator)
        at = torch.arange(length)
        return (at >= start) & (at < start + size)

    chosen = torch.rand(n, generator=generator) < share
    return (span(height)[:, :, None] & span(width)[:, None, :] & chosen[:, None, None])[:, None]

"""The network of the glyph recipe, and how its pictures are changed while it learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 64, 128, 256)


class GlyphNet(nn.Module):
    """Four 3x3 convolutions of stride 2 and one linear map: 4 million products a picture of 32x32.

    The last BatchNorm has no scale, as in the ArcFace recipe: embeddings keep unit variance.
    """

    def __init__(self, size: int, embedding: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for after in WIDTHS:
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.1, inplace=True),
            ]
            before, size = after, (size + 1) // 2
        self.features = nn.Sequential(*layers)
        self.embed = nn.Linear(before * size * size, embedding, bias=False)
        self.normalize = nn.BatchNorm1d(embedding, affine=False)
        # torch's overloads leave it out
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, pictures: Tensor) -> Tensor:  # [B, 1, size, size] -> [B, D]
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        return self.normalize(self.embed(self.features(pictures).flatten(1)))


def normalize(pictures: Tensor) -> Tensor:
    """uint8 -> float32 around 0: ink covers about a fifth of a picture."""
    return (pictures.float() - 50.0) / 85.0


@dataclass(frozen=True)
class Changes:
    """Strengths: each drawn uniformly from [-value, value] per picture, each picture its own."""

    stretch: float = 0.12  # log of the zoom, across and down apart
    slant: float = 0.15  # shear: fonts lean
    shift: float = 0.06  # share of the picture
    weight: float = 0.7  # log of the exponent of the ink: below 0 bolder, above 0 thinner
    noise: float = 0.15  # deviation of grey levels, in units of `normalize`


def change(pictures: Tensor, changes: Changes, generator: torch.Generator) -> Tensor:
    """[B, 1, size, size] uint8 -> float32 as of `normalize`, each picture as another font had it.

    Draws on the CPU, so that every device sees the same.
    """
    n, device = len(pictures), pictures.device

    def drawn(most: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * most

    across, down = drawn(changes.stretch).exp(), drawn(changes.stretch).exp()
    rows = [across, drawn(changes.slant), drawn(2 * changes.shift)]
    rows += [torch.zeros(n), down, drawn(2 * changes.shift)]
    maps = torch.stack(rows, 1).view(n, 2, 3).to(device)
    ink = pictures.float() / 255.0
    grid = F.affine_grid(maps, list(ink.shape), align_corners=False)
    ink = F.grid_sample(ink, grid, align_corners=False)
    exponent = drawn(changes.weight).exp().view(-1, 1, 1, 1).to(device)
    noise = torch.randn(ink.shape, generator=generator).to(device)
    strength = drawn(changes.noise).view(-1, 1, 1, 1).to(device)
    # an exponent has no slope at 0: clamped ink keeps the picture finite
    return normalize(255.0 * ink.clamp(0, 1) ** exponent) + noise * strength

"""The data sets of a large run, and a synthetic one that needs no files whatever its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fused_losses import datasets
from fused_losses.base.rounding import hashed
from fused_losses.datasets.base import Corrupt
from fused_losses.datasets.glyphs import load_glyphs
from fused_losses.train.large.config import LargeConfig


def hashed_normal(keys: Tensor, width: int, *, seed: int) -> Tensor:  # [n] int64
    """Standard normal numbers [n, width] float32: row i is a function of (seed, keys[i]) alone."""
    start = hashed(hashed(seed, keys), torch.tensor(0))
    counters = hashed(start[:, None], torch.arange(2 * width))
    # 53 bits in (0, 1]: the logarithm must not meet 0
    uniform = (((counters >> 11) & ((1 << 53) - 1)).double() + 1) * 2.0**-53
    radius, turn = uniform.chunk(2, dim=1)
    return (torch.sqrt(-2 * radius.log()) * torch.cos(2 * math.pi * turn)).float()


class Cyclic:
    """Labels i mod classes without a list of them."""

    def __init__(self, n: int, classes: int) -> None:
        self.n, self.classes = n, classes

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, indices: Tensor) -> Tensor:
        return indices % self.classes


class SyntheticVectors:
    """A class is a direction, its vectors lie around it: an `ImageSet` of floats, none stored.

    x_i = m_c + noise e_i with m_c, e_i standard normal [features], c = i mod classes.
    """

    names: Sequence[str] | None = None  # of classes that have none

    def __init__(self, classes: int, samples: int, features: int, noise: float, seed: int) -> None:
        self.classes, self.features, self.noise = classes, features, noise
        self.seed = seed % 2**62  # twice it is an int64
        self.labels: Any = Cyclic(classes * samples, classes)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int] | Tensor) -> Tensor:  # [B] -> [B, features] float32
        indices = torch.as_tensor(indices)
        means = hashed_normal(self.labels[indices], self.features, seed=2 * self.seed)
        return means + self.noise * hashed_normal(indices, self.features, seed=2 * self.seed + 1)


def load(config: LargeConfig) -> datasets.ImageSet:
    """The set that the configuration names."""
    kind, _, place = config.data.partition(":")
    if kind == "synthetic":
        return SyntheticVectors(
            config.classes, config.samples, config.features, config.noise, config.seed
        )
    if kind == "glyphs":
        return load_glyphs([place] if place else None, size=config.image_size)
    reader = {
        "folders": datasets.ImageFolders,
        "recordio": datasets.RecordIO,
        "webdataset": datasets.TarShards,
    }[kind]
    corrupt = cast(Corrupt, config.corrupt)  # an option is a string
    return reader(place, size=config.image_size, channels=config.channels, corrupt=corrupt)

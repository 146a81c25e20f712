"""The data sets of a large run, and a synthetic one that needs no files whatever its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fused_losses import datasets
from fused_losses.datasets.base import Corrupt
from fused_losses.datasets.glyphs import load_glyphs
from fused_losses.train.large.config import LargeConfig

_SPREAD = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64
_MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # splitmix64's multipliers, as int64


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al., 2014): int64 in, well mixed int64 out."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def hashed_normal(keys: Tensor, width: int, *, seed: int) -> Tensor:  # [n] int64
    """Standard normal numbers [n, width] float32: row i is a function of (seed, keys[i]) alone."""
    start = _mix(_mix(keys * _SPREAD + seed))
    counters = start[:, None] + torch.arange(2 * width) * _SPREAD
    # 53 bits in (0, 1]: the logarithm must not meet 0
    uniform = (((_mix(counters) >> 11) & ((1 << 53) - 1)).double() + 1) * 2.0**-53
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
        self.classes, self.features, self.noise, self.seed = classes, features, noise, seed
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

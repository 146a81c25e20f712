"""A set of glyphs: drawings by fonts, one class a character, read at random by index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_losses.datasets.base import Samples, check_indices
from fused_losses.datasets.files import StoredFile
from fused_losses.datasets.glyphs.fonts import SkippedFont


@dataclass(frozen=True)
class Font:
    """A face that drew something. Fonts of one `design` never stand on both sides of a split."""

    file: str
    family: str
    style: str
    design: int

    def __str__(self) -> str:
        return f"{self.family} {self.style}"


@dataclass(frozen=True)
class Glyphs(Samples):
    """An `ImageSet` of drawings [1, size, size] uint8, ink 255 on 0. Made by `load_glyphs`.

    transform: what `set[index]` does to a picture; `dataclasses.replace` gives another.
    Any thread may read. Memory: three int64 a drawing; pictures stay in the file.
    """

    file: StoredFile
    start: int  # of the pictures in the file, bytes
    size: int
    images: Tensor  # [n] int64, place of each drawing's picture
    labels: Tensor  # [n] int64 in [0, classes)
    faces: Tensor  # [n] int64, index into `fonts`
    names: tuple[str, ...]  # the character of each class; of look-alikes the first
    fonts: tuple[Font, ...]
    skipped: tuple[SkippedFont, ...]  # fonts that gave nothing, and why
    transform: Callable[[Tensor], Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The pictures of B indices in [0, n). [B, 1, size, size] uint8; IndexError outside."""
        places = self.images[torch.tensor(check_indices(indices, len(self)), dtype=torch.int64)]
        length = self.size * self.size
        parts = [
            self.file.read(self.start + place * length, length, f"picture {place}")
            for place in places.tolist()
        ]
        if not parts:
            return torch.empty(0, 1, self.size, self.size, dtype=torch.uint8)
        flat = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
        return flat.view(len(parts), 1, self.size, self.size)

    def designs(self) -> Tensor:
        """[n] int64: the design of each drawing's font."""
        return torch.tensor([font.design for font in self.fonts], dtype=torch.int64)[self.faces]

    def where(self, kept: Tensor) -> Glyphs:  # [n] bool
        """Only these drawings; the classes keep their numbers."""
        return replace(
            self, images=self.images[kept], labels=self.labels[kept], faces=self.faces[kept]
        )

    def of_classes(self, classes: Tensor) -> Glyphs:  # [c] int64, distinct
        """Only these classes, numbered from 0 in the order given."""
        new = torch.full((self.classes,), -1).index_put((classes,), torch.arange(len(classes)))
        labels = new[self.labels]
        kept = self.where(labels >= 0)
        names = tuple(self.names[i] for i in classes.tolist())
        return replace(kept, labels=labels[labels >= 0], names=names)

    def one_a_class(self) -> Tensor:
        """[at most classes] int64: an index for each class drawn, of its face with most classes."""
        drawn = torch.bincount(self.faces, minlength=len(self.fonts))
        rank = drawn.argsort(descending=True, stable=True).argsort()[self.faces]
        order = (self.labels * len(self.fonts) + rank).argsort(stable=True)
        labels = self.labels[order]
        first = torch.ones(len(labels), dtype=torch.bool)
        first[1:] = labels[1:] != labels[:-1]
        return order[first]

"""What every set of pictures offers.

A set is read at random by index: labels are at hand from the start, pictures are decoded when read.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fused_losses.datasets.decoding import check_channels, check_size, decode_picture

MAX_CLASSES = 1 << 31  # beyond it a label is taken for damage


class ImageSet(Protocol):
    """Pictures with class labels, decoded at one size when they are read."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor:
        """[n] int64 in [0, classes)."""
        ...

    @property
    def classes(self) -> int: ...

    @property
    def names(self) -> Sequence[str] | None:
        """Of the classes, if they have any."""
        ...

    def read(self, indices: Sequence[int] | Tensor) -> Tensor:
        """[B, channels, height, width] uint8, in the order of the B indices in [0, n)."""
        ...


def check_transform(transform: Callable[[Tensor], Any] | None) -> Callable[[Tensor], Any] | None:
    if transform is not None and not callable(transform):
        raise TypeError(
            f"transform: expected a function of a picture [channels, height, width], got "
            f"{type(transform).__name__}"
        )
    return transform


def check_indices(indices: Sequence[int] | Tensor, n: int) -> list[int]:
    """The indices as a list, or an error that names the first outside [0, n)."""
    if isinstance(indices, Tensor):
        if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise TypeError(
                f"indices: expected one dimension of integers, got shape {tuple(indices.shape)}, "
                f"{indices.dtype}"
            )
        places = indices.tolist()
    else:
        places = [operator.index(i) for i in indices]
    for i in places:
        if not 0 <= i < n:
            raise IndexError(f"indices: expected values in [0, {n}), got {i}")
    return places


class Samples(ABC):
    """What torch's DataLoader asks of an `ImageSet`: one picture and its class at an index."""

    transform: Callable[[Tensor], Any] | None

    if TYPE_CHECKING:  # of the ImageSet that this is
        labels: Tensor

        def read(self, indices: Sequence[int] | Tensor) -> Tensor: ...

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """(`transform` of the picture [channels, height, width] uint8, its class).

        index in [0, n), else IndexError: a loop over the set ends there.
        """
        picture = self.read([index])[0]
        return (self.transform(picture) if self.transform else picture), int(self.labels[index])


class EncodedImages(Samples):
    """An ImageSet over encoded pictures: a reader says where their bytes are.

    A copy or a pickled set opens its files anew when it is made or read, and raises DataError
    where one of them has changed.
    """

    def __init__(
        self,
        labels: Tensor,  # [n] int64
        classes: int,
        names: Sequence[str] | None,
        size: int | tuple[int, int],
        channels: int,
        transform: Callable[[Tensor], Any] | None,
    ) -> None:
        self.labels = labels
        self.classes = classes
        self.names = names
        self.size = check_size(size)
        self.channels = check_channels(channels)
        self.transform = check_transform(transform)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The picture's bytes as they are stored; index in [0, n)."""

    @abstractmethod
    def where(self, index: int) -> str:
        """File and record of a picture, for messages."""

    def read(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The pictures of B indices in [0, n). [B, channels, height, width] uint8

        Any thread may call it. Raises IndexError for an index outside, DataError for a picture
        that can't be read. Memory O(the result and one encoded picture).
        """
        places = check_indices(indices, len(self))
        pictures = torch.empty(len(places), self.channels, *self.size, dtype=torch.uint8)
        for row, i in zip(pictures, places, strict=True):
            row.copy_(decode_picture(self.encoded(i), self.size, self.channels, self.where(i)))
        return pictures

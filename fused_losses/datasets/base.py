"""What every set of pictures offers.

A set is read at random by index: labels are at hand from the start, pictures are decoded when read.
"""

from __future__ import annotations

import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from fused_losses.base.files import DataError
from fused_losses.datasets.decoding import check_channels, check_size, decode_picture

MAX_CLASSES = 1 << 31  # beyond it a label is taken for damage
MAX_PASSED_OVER = 64  # pictures in a row: more are no accident

Corrupt = Literal["raise", "skip"]  # what happens at a picture that can't be read


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


def check_corrupt(corrupt: Corrupt) -> Corrupt:
    if corrupt not in get_args(Corrupt):
        raise ValueError(f'corrupt: expected "raise" or "skip", got {corrupt!r}')
    return corrupt


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
        (picture,), (place,) = self.read_whole([index])
        return (self.transform(picture) if self.transform else picture), int(self.labels[place])

    def read_whole(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """(pictures [B, channels, height, width] uint8, the index of each, [B] int64).

        As `read`; but a set that passes over what can't be read puts another picture in its place.
        """
        return self.read(indices), torch.as_tensor(indices, dtype=torch.int64)


class EncodedImages(Samples):
    """An ImageSet over encoded pictures: a reader says where their bytes are.

    A copy or a pickled set opens its files anew when it is made or read, and raises DataError
    where one of them has changed.
    skipped: index -> reason of each picture that was passed over, with corrupt="skip".
    """

    def __init__(
        self,
        labels: Tensor,  # [n] int64
        classes: int,
        names: Sequence[str] | None,
        size: int | tuple[int, int],
        channels: int,
        transform: Callable[[Tensor], Any] | None,
        corrupt: Corrupt,
    ) -> None:
        self.labels = labels
        self.classes = classes
        self.names = names
        self.size = check_size(size)
        self.channels = check_channels(channels)
        self.transform = check_transform(transform)
        self.corrupt = check_corrupt(corrupt)
        self.skipped: dict[int, str] = {}

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
        that can't be read, whatever `corrupt` is: `read_whole` passes over them. Memory O(the
        result and one encoded picture).
        """
        return self._gather(check_indices(indices, len(self)), self._decode)

    def read_whole(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """(pictures [B, channels, height, width] uint8, the index of each, [B] int64).

        As `read`; but with corrupt="skip" the next picture that can be read stands in the place of
        one that can't, which is put down in `skipped` and warned of. Raises DataError where
        MAX_PASSED_OVER pictures follow each other that can't be read.
        """
        places = check_indices(indices, len(self))
        if self.corrupt == "skip":
            found = [self._next_readable(place) for place in places]
            pictures = self._gather(range(len(found)), lambda i: found[i][1])
            return pictures, torch.tensor([place for place, _ in found], dtype=torch.int64)
        return self.read(places), torch.tensor(places, dtype=torch.int64)

    def _gather(self, places: Sequence[int], picture: Callable[[int], Tensor]) -> Tensor:
        pictures = torch.empty(len(places), self.channels, *self.size, dtype=torch.uint8)
        for row, place in zip(pictures, places, strict=True):
            row.copy_(picture(place))
        return pictures

    def _decode(self, index: int) -> Tensor:
        return decode_picture(self.encoded(index), self.size, self.channels, self.where(index))

    def _next_readable(self, index: int) -> tuple[int, Tensor]:
        """(index, picture) of the first that can be read, from this one on and around the end."""
        for further in range(min(MAX_PASSED_OVER, len(self))):
            place = (index + further) % len(self)
            if place in self.skipped:
                continue
            try:
                return place, self._decode(place)
            except DataError as error:
                self.skipped[place] = str(error)
                warnings.warn(f"passed over: {error}", stacklevel=4)
        raise DataError(
            f"{self.where(index)}: expected a picture that can be read among it and the "
            f"{MAX_PASSED_OVER - 1} after it; the last reason: {list(self.skipped.values())[-1]}"
        )


def read_labelled(
    image_set: ImageSet, indices: Sequence[int] | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices, pictures, labels) of a batch: what was read, where the set passes over some."""
    if isinstance(image_set, Samples):
        pictures, indices = image_set.read_whole(indices)
    else:
        pictures, indices = image_set.read(indices), torch.as_tensor(indices)
    return indices, pictures, image_set.labels[indices]

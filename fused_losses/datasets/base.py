"""What every set of pictures offers, and how encoded bytes become a tensor.

A set is read at random by index: labels are at hand from the start, pictures are decoded when read.
"""

from __future__ import annotations

import io
import operator
import os
import stat
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

# no format that starts another program (EPS) or is a list of drawing commands (WMF)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
MAX_PIXELS = 1 << 26  # of an encoded picture; 256 MiB decoded at four bytes a pixel
MAX_ENCODED = 1 << 28  # bytes of an encoded picture
MAX_CLASSES = 1 << 31  # beyond it a label is taken for damage


class DataError(ValueError):
    """Data that cannot be what it claims; the message names file, record and what was expected."""


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


def check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of pictures; one integer means a square."""
    pair = (size, size) if isinstance(size, int) and not isinstance(size, bool) else size
    if (
        not isinstance(pair, tuple | list)
        or len(pair) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    ):
        raise TypeError(f"size: expected an integer or (height, width), got {size!r}")
    if min(pair) < 1 or pair[0] * pair[1] > MAX_PIXELS:
        raise ValueError(f"size: expected 1 to {MAX_PIXELS} pixels, got {size!r}")
    return int(pair[0]), int(pair[1])


def check_channels(channels: int) -> int:
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 (grey) or 3 (RGB), got {channels!r}")
    return channels


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


def decode_picture(
    encoded: bytes,
    size: tuple[int, int],
    channels: int,
    where: str,  # what an error names
) -> Tensor:
    """An encoded picture at a size. [channels, height, width] uint8

    Shrinks and grows by averaging over the covered pixels (Pillow's BOX). Raises DataError for
    bytes that are no picture of FORMATS or claim more than MAX_PIXELS, before they are decoded.
    """
    try:
        from PIL import Image
    except ImportError:
        raise RuntimeError(
            "reading pictures needs Pillow: pip install 'fused-losses[train]'"
        ) from None
    height, width = size
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{where}: expected a picture of at most {MAX_PIXELS} pixels, got "
                    f"{image.width} x {image.height}"
                )
            image = image.convert("L" if channels == 1 else "RGB")
            image = image.resize((width, height), Image.Resampling.BOX)
            flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except DataError:
        raise
    # Pillow's decoders raise whatever their parsing trips over
    except Exception as error:
        raise DataError(
            f"{where}: not a picture that can be read ({type(error).__name__}: {error})"
        ) from None
    return flat.view(height, width, channels).permute(2, 0, 1).contiguous()


class EncodedImages(ABC):
    """An ImageSet over encoded pictures: a reader says where their bytes are."""

    def __init__(
        self,
        labels: Tensor,  # [n] int64
        classes: int,
        names: Sequence[str] | None,
        size: int | tuple[int, int],
        channels: int,
    ) -> None:
        self.labels = labels
        self.classes = classes
        self.names = names
        self.size = check_size(size)
        self.channels = check_channels(channels)

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


class StoredFile:
    """A file read at offsets, from any thread; a read past its end is an error, not a short read.

    Not a memory map: a page that faults holds the interpreter's lock, and a file cut short while
    mapped kills the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # a pipe would wait here for its writer
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened ({error.strerror})") from None
        # closed when the last reader lets go of it
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: expected a regular file")
        self.size = status.st_size

    def read(self, offset: int, length: int, what: str) -> bytes:
        """`length` bytes at `offset`; DataError if the file does not hold them."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise DataError(
                f"{self.path}: {what}: expected {length} bytes at offset {offset}, the file ends "
                f"at {self.size}"
            )
        parts, end = [], offset + length
        while offset < end:
            try:
                part = os.pread(self._descriptor, end - offset, offset)
            except OSError as error:
                raise DataError(
                    f"{self.path}: {what}: cannot be read at offset {offset} ({error.strerror})"
                ) from None
            if not part:
                raise DataError(f"{self.path}: {what}: the file was cut short to {offset} bytes")
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class OpenFiles:
    """The files last read, kept open: at most `limit`, for sets of thousands of shards."""

    def __init__(self, limit: int = 128) -> None:
        self._limit = limit
        self._files: OrderedDict[Path, StoredFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> StoredFile:
        with self._lock:
            file = self._files.pop(path, None) or StoredFile(path)
            self._files[path] = file
            if len(self._files) > self._limit:
                self._files.popitem(last=False)
            return file

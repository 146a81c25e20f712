"""WebDataset's tar shards: members key.jpg and key.cls (or key.json with "label"), read in place.

The key is a member's path up to the first dot of its file name; members of one key follow each
other. A shard's headers are walked once; after that a picture is one read at an offset.
"""

from __future__ import annotations

import tarfile
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.files import DataError
from fused_losses.datasets.base import Corrupt, EncodedImages, check_corrupt
from fused_losses.datasets.decoding import check_channels, check_size, decode_picture
from fused_losses.datasets.files import OpenFiles, StoredFile
from fused_losses.datasets.sampler import check_ranks, shuffled
from fused_losses.datasets.side_files import Cache
from fused_losses.datasets.tar_index import NAMES, shard_index, shard_paths


def _check_classes(path: Path, labels: Tensor, classes: int | None) -> None:
    if classes is not None and len(labels) and int(labels.max()) >= classes:
        raise DataError(
            f"{path}: expected classes in [0, {classes}), got {int(labels.max())} at its picture "
            f"{int(labels.argmax())}"
        )


def _member_name(file: StoredFile, offset: int) -> str:
    """The name in the header before a member's bytes; a long name is cut to 100 characters."""
    try:
        block = file.read(offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE, "a header")
        name = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").name
    except (DataError, tarfile.TarError):
        return f"at offset {offset}"
    return f"{name!r} at offset {offset}"


class TarShards(EncodedImages):
    """The pictures of tar shards, at random by index, nothing extracted.

    shards: a pattern ("faces-{000000..000147}.tar", "faces-*.tar") or a list of paths. classes:
    how many there are (None: the largest label and one). transform: what `set[index]` does to a
    picture. corrupt: "skip" puts the next picture in the place of one that can't be read
    (`skipped`). cache: where each shard's offsets are
    kept (True: beside it), while the shard stays the same. Raises DataError that names shard and
    member for links, sparse members, pictures without class or above MAX_ENCODED bytes, headers
    that are none, shards cut short. Time O(members) small reads once; memory 24 bytes a picture.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        size: int | tuple[int, int],
        channels: int = 3,
        classes: int | None = None,
        transform: Callable[[Tensor], Any] | None = None,
        corrupt: Corrupt = "raise",
        cache: Cache = True,
    ) -> None:
        if classes is not None and classes < 1:
            raise ValueError(f"classes: expected at least 1 or None, got {classes}")
        self.shards = shard_paths(shards)
        indexes, stamps = [], {}
        for path in self.shards:
            index, file = shard_index(path, cache)
            indexes.append(index)
            stamps[path] = file.stamp
        for path, index in zip(self.shards, indexes, strict=True):
            _check_classes(path, index["labels"], classes)
        self._offsets, self._sizes, labels = (
            torch.cat([index[name] for index in indexes]) for name in NAMES
        )
        if not len(labels):
            raise DataError(
                f"{self.shards[0]}: expected pictures in {len(indexes)} shards, got none"
            )
        counts = torch.tensor([len(index["labels"]) for index in indexes])
        self._ends: list[int] = counts.cumsum(0).tolist()
        self._files = OpenFiles(stamps)
        known = int(labels.max()) + 1 if classes is None else classes
        super().__init__(labels, known, None, size, channels, transform, corrupt)

    def _shard(self, index: int) -> Path:
        return self.shards[bisect_right(self._ends, index)]

    def encoded(self, index: int) -> bytes:
        file = self._files.get(self._shard(index))
        place, length = int(self._offsets[index]), int(self._sizes[index])
        return file.read_bounded(place, length, f"picture {index}")

    def where(self, index: int) -> str:
        shard = self._shard(index)
        return f"{shard}: member {_member_name(self._files.get(shard), int(self._offsets[index]))}"


def stream_shards(
    shards: str | Path | Sequence[str | Path],
    *,
    size: int | tuple[int, int],
    batch: int,
    channels: int = 3,
    classes: int | None = None,
    rank: int = 0,
    world: int = 1,
    seed: int | None = None,
    epoch: int = 0,
    corrupt: Corrupt = "raise",
    cache: Cache = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of a rank's shards in their order: ([b, channels, h, w] uint8, classes [b] int64).

    The shards are divided over the ranks in the order of a permutation of (seed, epoch), or as
    they come without a seed; only a rank's own shards are opened. Pictures within a shard keep
    their order; the last batch may be shorter. Ranks see different numbers of pictures: for steps
    that all ranks take together use TarShards with EpochBatches. corrupt: with "skip" a picture
    that can't be read is left out, with a warning. Errors as TarShards.
    """
    size, channels = check_size(size), check_channels(channels)
    skip = check_corrupt(corrupt) == "skip"
    paths = shard_paths(shards)
    check_ranks(rank, world)
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    order = range(len(paths))
    if seed is not None:
        order = shuffled(torch.arange(len(paths)), len(paths), seed=seed, epoch=epoch).tolist()
    return _stream(
        [paths[i] for i in order[rank::world]], size, channels, classes, batch, skip, cache
    )


def _stream(
    paths: list[Path],
    size: tuple[int, int],
    channels: int,
    classes: int | None,
    batch: int,
    skip: bool,
    cache: Cache,
) -> Iterator[tuple[Tensor, Tensor]]:
    pictures, labels = [], []
    for path in paths:
        index, file = shard_index(path, cache)
        _check_classes(path, index["labels"], classes)
        for offset, length, label in zip(*(index[n].tolist() for n in NAMES), strict=True):
            where = f"{path}: member {_member_name(file, offset)}"
            try:
                encoded = file.read_bounded(offset, length, "a picture")
                pictures.append(decode_picture(encoded, size, channels, where))
            except DataError as error:
                if not skip:
                    raise
                warnings.warn(f"passed over: {error}", stacklevel=3)
                continue
            labels.append(label)
            if len(labels) == batch:
                yield torch.stack(pictures), torch.tensor(labels)
                pictures, labels = [], []
    if labels:
        yield torch.stack(pictures), torch.tensor(labels)

"""What was learnt from a large file, kept beside it so that it is learnt once.

A side file holds a line (checksum of the rest; JSON: format, stamps, names), then int64 tensors. It
counts only for the very files (size and time of change) that it was made from; any other, or a
damaged one, is made anew.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fused_losses.base.files import write_atomically

FORMAT = "fused_losses.datasets 1"
MAX_HEAD = 1 << 28
MAX_INDEX = 1 << 32  # bytes of tensors, where the data's own size does not say

Index = dict[str, Tensor]  # name -> [n] int64
Cache = str | Path | bool | None  # True: beside the data; a folder; False or None: not kept


def side_path(cache: Cache, path: Path) -> Path | None:
    """Where the index of a data file is kept."""
    if cache is None or cache is False:
        return None
    if cache is True:
        return path.with_name(path.name + ".index")
    # two shards of one name in two folders are two files
    name = f"{path.name}-{zlib.crc32(str(path.resolve()).encode()):08x}.index"
    return Path(cache) / name


def remembered(
    side: Path | None,
    stamps: object,  # what JSON can hold; changes when the data does
    make: Callable[[], tuple[Index, Any]],
    fits: Callable[[Index, Any], bool],
    most: int = MAX_INDEX,
) -> tuple[Index, Any]:
    """`make()`, or what it returned last time if the stamps are the same: tensors and a JSON value.

    fits: whether what is kept can be of this data, for a file may hold anything; a KeyError or
    TypeError is a no. most: the bytes of its tensors. A folder that can't be written gives a
    warning, and the index is not kept.
    """
    if side is None:
        return make()
    found = _load(side, stamps, most)
    try:
        if found is not None and fits(*found):
            return found
    except (KeyError, TypeError, AttributeError):
        pass
    tensors, extra = make()
    try:
        _save(side, stamps, tensors, extra)
    except OSError as error:
        warnings.warn(
            f"{side}: the index cannot be kept ({error.strerror}); pass cache= a folder that can "
            "be written",
            stacklevel=3,
        )
    return tensors, extra


def _save(side: Path, stamps: object, tensors: Index, extra: object) -> None:
    """Written aside and renamed: a reader sees the old file, none, or the whole new one."""
    head = {
        "format": FORMAT,
        "stamps": stamps,
        "names": [[name, len(t)] for name, t in tensors.items()],
        "extra": extra,
    }
    parts = [json.dumps(head).encode() + b"\n"]
    parts += [t.contiguous().numpy().data.cast("B") for t in tensors.values()]
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    side.parent.mkdir(parents=True, exist_ok=True)

    def fill(file: BinaryIO) -> None:
        file.write(b"%08x " % crc)
        for part in parts:
            file.write(part)

    # two processes may index one set at the same time
    write_atomically(side, fill, alone=False)


def _load(side: Path, stamps: object, most: int = MAX_INDEX) -> tuple[Index, object] | None:
    """None where there is none that fits, whatever the reason."""
    try:
        with side.open("rb") as file:
            expected, line = int(file.read(9), 16), file.readline(MAX_HEAD)
            head, crc = json.loads(line), zlib.crc32(line)
            if head["format"] != FORMAT or head["stamps"] != stamps:
                return None
            counts = [int(count) for _, count in head["names"]]
            total = 8 * sum(counts)
            if min(counts) < 0 or total > most:
                return None
            if os.fstat(file.fileno()).st_size - file.tell() != total:
                return None
            tensors = {}
            for (name, _), count in zip(head["names"], counts, strict=True):
                array = bytearray(file.read(8 * count))
                crc = zlib.crc32(array, crc)
                tensors[name] = (
                    torch.frombuffer(array, dtype=torch.int64)
                    if count
                    else torch.zeros(0, dtype=torch.int64)
                )
            return (tensors, head["extra"]) if crc == expected else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError):
        return None


def within(values: Tensor, start: int, stop: int) -> bool:
    """Whether all values lie in [start, stop)."""
    return not len(values) or (int(values.min()) >= start and int(values.max()) < stop)


def rising(values: Tensor) -> bool:
    return bool((values[1:] > values[:-1]).all())

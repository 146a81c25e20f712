"""Faces as InsightFace packs them with MXNet: train.rec, train.idx and property, without mxnet."""

from __future__ import annotations

import math
import os
import re
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from torch import Tensor

from fused_losses.base.files import DataError
from fused_losses.datasets.base import Corrupt, EncodedImages
from fused_losses.datasets.files import StoredFile, is_there, stamp
from fused_losses.datasets.record_parts import (
    FIRST,
    HEADER,
    LAST,
    PART,
    WHOLE,
    Record,
    frame,
    pack,
    peek,
    read_part,
    read_record,
)
from fused_losses.datasets.side_files import (
    Cache,
    Index,
    remembered,
    rising,
    side_path,
    within,
)

EXACT = 1 << 24  # integers that float32 holds exactly
MAX_KEY = 1 << 62
MAX_IDX_LINE = 64
MAX_PROPERTY = 1 << 10
# the sides of the pictures are floats in some files
PROPERTY = re.compile(rb"\s*(\d{1,9})\s*(?:,\s*\d{1,9}(?:\.\d*)?\s*){2}")


# ---- where the records are ----------------------------------------------------------------------


def _read_idx(path: Path, rec: StoredFile) -> tuple[array, array]:
    """(keys, offsets) from lines "key<tab>offset"."""
    keys, offsets = array("q"), array("q")
    with path.open("rb") as lines:
        while line := lines.readline(MAX_IDX_LINE):
            fields = line.split()
            if len(fields) != 2 or not all(f.isdigit() and int(f) < MAX_KEY for f in fields):
                raise DataError(
                    f"{path}: line {len(keys) + 1}: expected a key and an offset, got {line[:40]!r}"
                )
            key, offset = int(fields[0]), int(fields[1])
            if offset % 4 or offset + PART.size > rec.size:
                raise DataError(
                    f"{path}: line {len(keys) + 1}: key {key}: expected an offset in "
                    f"{rec.path.name} ({rec.size} bytes) and a multiple of 4, got {offset}"
                )
            keys.append(key)
            offsets.append(offset)
    return keys, offsets


def _scan(file: StoredFile) -> tuple[array, array]:
    """(ids, offsets) of all records, by walking the file from its start."""
    keys, offsets, offset = array("q"), array("q"), 0
    while offset < file.size:
        what = f"record {len(keys)} of the file"
        start, cflag = offset, FIRST
        while cflag not in (WHOLE, LAST):
            cflag, length = read_part(file, offset, what, first=offset == start)
            offset += PART.size + -(-length // 4) * 4
        if cflag == WHOLE and length >= HEADER.size:
            key = HEADER.unpack(file.read(start + PART.size, HEADER.size, what))[2]
        else:
            key = read_record(file, start, what).key
        if key >= MAX_KEY:
            raise DataError(
                f"{file.path}: {what}: expected an id below 2^62 at offset {start}, got {key}"
            )
        keys.append(key)
        offsets.append(start)
    return keys, offsets


def _places(rec: StoredFile, idx: Path) -> tuple[Tensor, Tensor]:
    """(keys [n], rising; offsets [n])"""
    listed = is_there(idx)
    keys, offsets = (
        torch.tensor(t, dtype=torch.int64) for t in (_read_idx(idx, rec) if listed else _scan(rec))
    )
    if not len(keys):
        raise DataError(f"{idx if listed else rec.path}: expected records, got none")
    keys, order = keys.sort()
    twice = keys[1:][keys[1:] == keys[:-1]]
    if not len(twice):
        return keys, offsets[order]
    if listed:
        raise DataError(f"{idx}: expected distinct keys, got {int(twice[0])} more than once")
    # some writers leave every id at 0; then the records count in the file's order
    return torch.arange(len(keys)), offsets


def _integer(file: StoredFile, what: str, label: float, stop: int, meaning: str) -> int:
    if not math.isfinite(label) or label != math.floor(label) or not 0 <= label < stop:
        raise DataError(f"{file.path}: {what}: expected {meaning} in [0, {stop}), got {label}")
    return int(label)


def _kinds(rec: StoredFile, keys: Tensor, offsets: Tensor) -> tuple[range, range]:
    """Which rows are pictures, and which identities.

    Record 0, when it has labels and no picture, says at which keys the identities' records start
    and end (0: there are none); pictures have the keys from 1 up to there. Without such a record
    all are pictures.
    """
    n = len(keys)
    nothing = range(n), range(0)
    if keys[0] != 0:
        return nothing
    zero = read_record(rec, int(offsets[0]), "key 0")
    if not zero.several or zero.payload:
        return nothing
    if len(zero.labels) < 2:
        raise DataError(
            f"{rec.path}: key 0: expected the first and the last key of identities, got one label"
        )
    first, last = (
        _integer(rec, "key 0", label, 2 * n + 2, "a key of identities") for label in zero.labels[:2]
    )
    # float32 labels have keys beyond 2^24 only rounded
    if first > EXACT:
        first = _first_identity(rec, offsets, first)
    if last > EXACT:
        last = int(keys[-1]) + 1
    # some writers say 0 for no identities, others leave the identities out of the index
    if last == 0 or int(keys[-1]) == first - 1:
        last = first
    if not 1 <= first <= last:
        raise DataError(f"{rec.path}: key 0: expected 1 <= first <= last key, got {first}, {last}")
    counted = torch.arange(min(last, n))
    gaps = (keys[: len(counted)] != counted).nonzero()
    if len(gaps) or last > n:
        missing = int(gaps[0]) if len(gaps) else n
        raise DataError(
            f"{rec.path}: key {missing}: expected a record, since key 0 counts to {last}, got none"
        )
    return range(1, first), range(first, last)


def _first_identity(rec: StoredFile, offsets: Tensor, rounded: int) -> int:
    """The first key without a picture among those that round to this one."""
    spread = 1 << (rounded.bit_length() - 24)
    for key in range(rounded - spread, min(rounded + spread + 1, len(offsets))):
        if not peek(rec, int(offsets[key]), f"key {key}")[1]:
            return key
    # none: the index has the pictures alone
    return len(offsets) if abs(len(offsets) - rounded) <= spread else rounded


def _apart(rec: StoredFile, key: int, total: int) -> int:
    """The bytes of the records up to a key: at most the file's, or parts are read many times."""
    if total > rec.size:
        raise DataError(
            f"{rec.path}: key {key}: expected records that do not overlap, those up to it take "
            f"{total} bytes of {rec.size}"
        )
    return total


def _build_index(rec: StoredFile, idx: Path, classes: int | None) -> Index:
    keys, offsets = _places(rec, idx)
    images, identities = _kinds(rec, keys, offsets)
    labels, total = array("q"), 0
    for row in images:
        key, offset = int(keys[row]), int(offsets[row])
        label, picture, size = peek(rec, offset, f"key {key}")
        total = _apart(rec, key, total + size)
        if not picture:
            raise DataError(
                f"{rec.path}: key {key}: expected a picture in the record at offset {offset}, got "
                "none"
            )
        # a float32 label can't tell classes beyond 2^24 apart
        labels.append(_integer(rec, f"key {key}", label, min(classes or EXACT, EXACT), "a class"))
    for row in identities:
        key = int(keys[row])
        total = _apart(rec, key, total + peek(rec, int(offsets[row]), f"key {key}")[2])
    pictures, people = (slice(rows.start, rows.stop) for rows in (images, identities))
    return {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "keys": keys[pictures].clone(),
        "offsets": offsets[pictures].clone(),
        "identity_keys": keys[people].clone(),
        "identity_offsets": offsets[people].clone(),
    }


def _read_property(path: Path) -> int | None:
    """The number of classes from "classes,height,width", if there is such a file."""
    if not is_there(path):
        return None
    with path.open("rb") as file:
        text = file.read(MAX_PROPERTY)
    fields = PROPERTY.fullmatch(text)
    if fields is None:
        raise DataError(f"{path}: expected classes,height,width, got {text[:40]!r}")
    if not 1 <= int(fields[1]) <= EXACT:
        raise DataError(f"{path}: expected 1 to {EXACT} classes, got {int(fields[1])}")
    return int(fields[1])


def _fits(index: Index, rec: StoredFile, classes: int | None) -> bool:
    """Whether an index is one that `_build_index` can have made of this file."""
    labels, keys, offsets = index["labels"], index["keys"], index["offsets"]
    people, places = index["identity_keys"], index["identity_offsets"]
    records = torch.cat([offsets, places])
    return (
        len(labels) == len(keys) == len(offsets)
        and len(people) == len(places)
        and within(labels, 0, min(classes or EXACT, EXACT))
        and within(torch.cat([keys, people]), 0, MAX_KEY)
        and rising(keys)
        and within(records, 0, rec.size)
        and not bool((records % 4).any())
    )


def _rec_path(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".rec" else path.with_name(path.name + ".rec")


# ---- the set ------------------------------------------------------------------------------------


class RecordIO(EncodedImages):
    """The pictures of a .rec file, by key; its .idx and property files lie beside it.

    path: the .rec file, or its path without the suffix. Without the .idx file the .rec file is
    walked from its start. The class is a record's first label. Header records as InsightFace
    writes them (record 0, and one for each identity) are no pictures. transform: what
    `set[index]` does to a picture. corrupt: "skip" puts the next picture in the place of one that
    can't be read (`skipped`). cache: where labels and
    offsets are kept (True: beside the .rec file), for as long as the three files stay the same.

    Raises DataError that names file, key and offset for damage: on opening for what the index
    needs (framing, header and label of every record), in `read` for the rest. RecordIO has no
    checksum: changed bytes inside a picture are found only if the picture can't be decoded, those
    of a label only if no class has it. Time O(n) small reads once; memory 24 bytes a picture.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        size: int | tuple[int, int],
        channels: int = 3,
        transform: Callable[[Tensor], Any] | None = None,
        corrupt: Corrupt = "raise",
        cache: Cache = True,
    ) -> None:
        self.path = _rec_path(path)
        self._file = StoredFile(self.path)
        idx, about = self.path.with_suffix(".idx"), self.path.with_name("property")
        classes = _read_property(about)
        beside = [stamp(os.stat(file)) if is_there(file) else None for file in (idx, about)]
        index, _ = remembered(
            side_path(cache, self.path),
            [self._file.stamp, *beside],
            lambda: (_build_index(self._file, idx, classes), None),
            lambda index, _: _fits(index, self._file, classes),
            # an index is smaller than what it tells of
            most=self._file.size,
        )
        self.keys, self._offsets = index["keys"], index["offsets"]
        self._identities = index["identity_keys"], index["identity_offsets"]
        if not len(self.keys):
            raise DataError(f"{self.path}: expected pictures, got none")
        if classes is None:
            classes = int(index["labels"].max()) + 1
        super().__init__(index["labels"], classes, None, size, channels, transform, corrupt)

    def record(self, index: int) -> Record:
        """A picture's whole record; index in [0, n)."""
        return read_record(self._file, int(self._offsets[index]), f"key {int(self.keys[index])}")

    def encoded(self, index: int) -> bytes:
        return self.record(index).payload

    def where(self, index: int) -> str:
        return f"{self.path}: key {int(self.keys[index])}: offset {int(self._offsets[index])}"

    def identities(self) -> Tensor:
        """[I, 2] int64: the keys [first, stop) of each identity's pictures, as its record says.

        Empty where the file has none. The labels are float32: exact up to key 2^24. Raises
        DataError for a record that holds no such range. Time O(I) small reads.
        """
        ranges = array("q")
        for key, offset in zip(*(t.tolist() for t in self._identities), strict=True):
            what = f"key {key}"
            labels = read_record(self._file, offset, what).labels
            stop = int(self.keys[-1]) + 2
            bounds = [_integer(self._file, what, b, stop, "a key of pictures") for b in labels[:2]]
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
                raise DataError(
                    f"{self.path}: {what}: expected the first and the last key of an identity's "
                    f"pictures at offset {offset}, got {labels[:2]}"
                )
            ranges.extend(bounds)
        return torch.tensor(ranges, dtype=torch.int64).view(-1, 2)


# ---- writing ------------------------------------------------------------------------------------


def write_records(
    path: str | Path, pictures: Iterable[tuple[bytes, int]], *, size: tuple[int, int]
) -> None:
    """Writes encoded pictures with their classes as InsightFace does: path.rec, .idx, property.

    pictures: (bytes, class) in the order of the classes 0, 1, 2 ... without gaps. size: the
    (height, width) that the property file states. The header records are written, too. Files
    take their names when they are whole. Raises ValueError for classes out of order, or none.
    """
    rec = _rec_path(path)
    parts = {s: rec.with_name(f"{rec.name}{s}.partial") for s in (".rec", ".idx", ".property")}
    try:
        with parts[".rec"].open("wb") as out, parts[".idx"].open("w") as lines:
            people = _write_pictures(out, lines, pictures)
        parts[".property"].write_text(f"{people},{size[0]},{size[1]}\n")
        os.replace(parts[".property"], rec.with_name("property"))
        os.replace(parts[".idx"], rec.with_suffix(".idx"))
        os.replace(parts[".rec"], rec)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _write_pictures(out: BinaryIO, lines: TextIO, pictures: Iterable[tuple[bytes, int]]) -> int:
    """The number of identities."""

    def write(record: Record) -> None:
        lines.write(f"{record.key}\t{out.tell()}\n")
        out.write(frame(pack(record)))

    write(Record((0.0, 0.0), 0, b"", several=True))
    starts: list[int] = []
    key = 1
    for encoded, label in pictures:
        if label not in (len(starts) - 1, len(starts)) or label < 0:
            raise ValueError(
                f"pictures: expected class {max(len(starts) - 1, 0)} or {len(starts)} at picture "
                f"{key - 1}, got {label}"
            )
        if label == len(starts):
            starts.append(key)
        write(Record((float(label),), key, bytes(encoded), several=False))
        key += 1
    if not starts:
        raise ValueError("pictures: expected at least one, got none")
    for person, bounds in enumerate(zip(starts, [*starts[1:], key], strict=True)):
        write(Record(bounds, key + person, b"", several=True))
    # the same size as when it was written first
    out.seek(0)
    out.write(frame(pack(Record((key, key + len(starts)), 0, b"", several=True))))
    return len(starts)

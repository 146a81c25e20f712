"""What lies where in tar shards: their names, their members, the pictures with their classes."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fused_losses.datasets.base import MAX_CLASSES, MAX_ENCODED, SUFFIXES, DataError, StoredFile
from fused_losses.datasets.side_files import Cache, Index, remembered, side_path, stamp

PICTURES = frozenset(suffix[1:] for suffix in SUFFIXES)
MAX_LABEL = 1 << 20  # bytes of a .cls or .json member
MAX_HEADER = 1 << 20  # bytes of a long name or a pax header
MAX_SHARDS = 1 << 20
BRACES = re.compile(r"\{([^{}]*)\}")
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)


# ---- names of shards ----------------------------------------------------------------------------


def _expand(pattern: str) -> list[str]:
    """The names that {000..147} and {a,b} stand for."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    inside = found[1]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if ends is None:
        choices = inside.split(",")
    else:
        first, last = int(ends[1]), int(ends[2])
        if not first <= last < first + MAX_SHARDS:
            raise ValueError(
                f"shards: expected {{first..last}} of 1 to {MAX_SHARDS} numbers, got {{{inside}}}"
            )
        choices = [f"{number:0{len(ends[1])}d}" for number in range(first, last + 1)]
    tails = _expand(pattern[found.end() :])
    if len(choices) * len(tails) > MAX_SHARDS:
        raise ValueError(f"shards: expected at most {MAX_SHARDS} names, got {pattern!r}")
    return [pattern[: found.start()] + choice + tail for choice in choices for tail in tails]


def shard_paths(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """The shards that a pattern names: {000..147}, {a,b}, *, ? and [] work; or a list of paths.

    Raises ValueError if there is none, or one twice.
    """
    if isinstance(shards, str | Path):
        paths: list[str] = []
        for name in _expand(str(shards)):
            paths += sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    else:
        paths = [str(path) for path in shards]
    if not paths or len(set(paths)) < len(paths):
        what = "none" if not paths else "one of them twice"
        raise ValueError(f"shards: expected distinct files, {shards!r} names {what}")
    return [Path(path) for path in paths]


# ---- one shard ----------------------------------------------------------------------------------


class _Headers(io.RawIOBase):
    """A shard as tarfile reads it: never more than a header's worth at once."""

    def __init__(self, file: StoredFile) -> None:
        self._file, self._at = file, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, length: int = -1) -> bytes:
        if not 0 <= length <= MAX_HEADER:
            raise DataError(
                f"{self._file.path}: expected a header of at most {MAX_HEADER} bytes at offset "
                f"{self._at}, got one of {length}"
            )
        length = max(0, min(length, self._file.size - self._at))
        data = self._file.read(self._at, length, "a header")
        self._at += length
        return data


def _members(file: StoredFile) -> Iterator[tarfile.TarInfo]:
    """The shard's regular files, checked: whole, stored as they are, inside the shard."""
    # a header that is no header ends the list without a word, so the end mark is checked, too
    after = 0
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:", errorlevel=2) as archive:
            while (member := archive.next()) is not None:
                # typeshed does not tell of the list
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                end = member.offset_data + member.size
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise DataError(
                        f"{file.path}: member {member.name!r}: expected a regular file at offset "
                        f"{member.offset}, got a link, a sparse file or a device"
                    )
                if member.size < 0 or end > file.size:
                    raise DataError(
                        f"{file.path}: member {member.name!r}: expected {member.size} bytes at "
                        f"offset {member.offset_data}, the shard ends at {file.size}"
                    )
                after = archive.offset
                if not member.isdir():
                    yield member
    except DataError:
        raise
    # tarfile raises whatever its parsing trips over
    except Exception as error:
        raise DataError(
            f"{file.path}: expected the header of a member at offset {after} "
            f"({type(error).__name__}: {error})"
        ) from None
    if file.read(after, tarfile.BLOCKSIZE, "the end mark") != bytes(tarfile.BLOCKSIZE):
        raise DataError(
            f"{file.path}: expected the header of a member or the end mark at offset {after}"
        )


def _label(file: StoredFile, member: tarfile.TarInfo, kind: str) -> int:
    """The class in a .cls member (a number) or a .json one ("label")."""
    what = f"member {member.name!r}"
    if member.size > MAX_LABEL:
        raise DataError(
            f"{file.path}: {what}: expected at most {MAX_LABEL} bytes, got {member.size}"
        )
    text = file.read(member.offset_data, member.size, what)
    try:
        if kind == "cls":
            label = int(text) if re.fullmatch(rb"\s*\d{1,18}\s*", text) else None
        else:
            label = json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        label = None
    if type(label) is not int or not 0 <= label < MAX_CLASSES:
        raise DataError(
            f"{file.path}: {what}: expected a class in [0, {MAX_CLASSES}), got {text[:40]!r}"
        )
    return label


def _samples(file: StoredFile) -> Iterator[tuple[int, int, int]]:
    """(offset, size, class) of every picture, in the shard's order."""
    key, parts = None, {}
    for member in _members(file):
        found = KEY.fullmatch(member.name)
        kind = found[2].lower() if found else ""
        part = "picture" if kind in PICTURES else kind
        if found is None or part not in ("picture", "cls", "json"):
            continue
        if found[1] != key:
            if key is not None:
                yield _sample(file, key, parts)
            key, parts = found[1], {}
        if part in parts:
            raise DataError(
                f"{file.path}: member {member.name!r}: expected one {part} of a key, got two"
            )
        parts[part] = member
    if key is not None:
        yield _sample(file, key, parts)


def _sample(file: StoredFile, key: str, parts: dict[str, tarfile.TarInfo]) -> tuple[int, int, int]:
    picture, kind = parts.get("picture"), "cls" if "cls" in parts else "json"
    if picture is None or kind not in parts:
        raise DataError(
            f"{file.path}: key {key!r}: expected a picture and a .cls or .json member, got "
            f"{[member.name for member in parts.values()]}"
        )
    if not 1 <= picture.size <= MAX_ENCODED:
        raise DataError(
            f"{file.path}: member {picture.name!r}: expected 1 to {MAX_ENCODED} bytes, got "
            f"{picture.size}"
        )
    return picture.offset_data, picture.size, _label(file, parts[kind], kind)


def shard_index(path: Path, cache: Cache) -> Index:
    """offsets, sizes, labels [n] int64 of a shard's pictures."""

    def build() -> tuple[Index, None]:
        columns = array("q"), array("q"), array("q")
        for sample in _samples(StoredFile(path)):
            for column, value in zip(columns, sample, strict=True):
                column.append(value)
        names = ("offsets", "sizes", "labels")
        tensors = (torch.tensor(column, dtype=torch.int64) for column in columns)
        return dict(zip(names, tensors, strict=True)), None

    if not path.is_file():
        raise DataError(f"{path}: expected a tar shard, there is no such file")
    return remembered(side_path(cache, path), stamp(path), build)[0]

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

from fused_losses.base.files import DataError
from fused_losses.datasets.base import MAX_CLASSES
from fused_losses.datasets.decoding import SUFFIXES
from fused_losses.datasets.files import MAX_ENCODED, StoredFile
from fused_losses.datasets.side_files import Cache, Index, remembered, side_path, within

PICTURES = frozenset(suffix[1:] for suffix in SUFFIXES)
MAX_LABEL = 1 << 20  # bytes of a .cls or .json member
MAX_HEADER = 1 << 20  # bytes of a long name or a pax header
MAX_SHARDS = 1 << 20
MAX_PADDING = 1 << 26  # bytes from the end mark on
MAX_SAID = 16  # names of members in a message
COMPRESSED = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ", "zstd": b"\x28\xb5\x2f\xfd"}
# beside key.jpg and key.cls, as some writers call them: key.input.jpg, key.target.cls
ALIASES = {"picture": "input.", "cls": "target.", "json": "target."}
BRACES = re.compile(r"\{([^{}]*)\}")
NAMES = ("offsets", "sizes", "labels")
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
    _check_end(file, after)


def _check_end(file: StoredFile, after: int) -> None:
    """The end mark is a block of zeros, and behind it are only zeros, or the shard goes on there.

    tarfile stops at the first such block, be it between two members or two archives.
    """
    if file.read(after, tarfile.BLOCKSIZE, "the end mark") != bytes(tarfile.BLOCKSIZE):
        raise DataError(
            f"{file.path}: expected the header of a member or the end mark at offset {after}"
        )
    if file.size - after > MAX_PADDING:
        raise DataError(
            f"{file.path}: expected at most {MAX_PADDING} bytes from the end mark at offset "
            f"{after} on, got {file.size - after}"
        )
    for offset in range(after, file.size, MAX_HEADER):
        part = file.read(offset, min(MAX_HEADER, file.size - offset), "the end mark")
        if part.strip(b"\0"):
            there = offset + len(part) - len(part.lstrip(b"\0"))
            raise DataError(
                f"{file.path}: expected only zeros behind the end mark at offset {after}, got "
                f"bytes at {there}: two archives in one file, or a block of zeros between members"
            )


def _check_plain(file: StoredFile) -> None:
    """A compressed shard can't be read at offsets."""
    start = file.read(0, min(6, file.size), "the first bytes")
    for name, magic in COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{file.path}: expected an uncompressed tar, whose pictures are read at their "
                f"offsets, got one compressed by {name}: decompress it once"
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
        place = "a number" if kind == "cls" else 'a number under "label"'
        raise DataError(
            f"{file.path}: {what}: expected a class in [0, {MAX_CLASSES}), {place}, got "
            f"{text[:40]!r}; classes with names are numbered when the shards are written"
        )
    return label


def _part(kind: str) -> str | None:
    """What the member key.kind is to its key: "picture", "cls", "json", or nothing."""
    end = kind.rpartition(".")[2]
    part = "picture" if end in PICTURES else end
    return part if part in ALIASES and kind in (end, ALIASES[part] + end) else None


def _samples(file: StoredFile) -> Iterator[tuple[int, int, int]]:
    """(offset, size, class) of every picture, in the shard's order."""
    key, parts, names = None, {}, []
    seen, kinds = False, set()
    for member in _members(file):
        found = KEY.fullmatch(member.name)
        if found is None:
            continue
        kind = found[2].lower()
        part = _part(kind)
        if part is None and len(kinds) < MAX_SAID:
            kinds.add(f"key.{kind}")
        if part is not None and found[1] != key:
            if parts:
                yield _sample(file, key, parts, names)
            key, parts, names, seen = found[1], {}, [], True
        if found[1] == key and len(names) < MAX_SAID:
            names.append(member.name)
        if part in parts:
            raise DataError(
                f"{file.path}: member {member.name!r}: expected one {part} of a key, got two"
            )
        if part is not None:
            parts[part] = member
    if parts:
        yield _sample(file, key, parts, names)
    if kinds and not seen:
        raise DataError(
            f"{file.path}: expected members key.jpg (or another picture) and key.cls or key.json, "
            f"got none, but {', '.join(sorted(kinds))}"
        )


def _sample(
    file: StoredFile, key: str | None, parts: dict[str, tarfile.TarInfo], names: list[str]
) -> tuple[int, int, int]:
    picture, kind = parts.get("picture"), "cls" if "cls" in parts else "json"
    if picture is None or kind not in parts:
        raise DataError(
            f"{file.path}: key {key!r}: expected a picture and a .cls or .json member, got {names}"
        )
    if not 1 <= picture.size <= MAX_ENCODED:
        raise DataError(
            f"{file.path}: member {picture.name!r}: expected 1 to {MAX_ENCODED} bytes, got "
            f"{picture.size}"
        )
    return picture.offset_data, picture.size, _label(file, parts[kind], kind)


def shard_index(path: Path, cache: Cache) -> tuple[Index, StoredFile]:
    """offsets, sizes, labels [n] int64 of a shard's pictures, and the shard itself."""
    if not path.is_file():
        raise DataError(f"{path}: expected a tar shard, there is no such file")
    file = StoredFile(path)

    def build() -> tuple[Index, None]:
        _check_plain(file)
        columns = array("q"), array("q"), array("q")
        for sample in _samples(file):
            for column, value in zip(columns, sample, strict=True):
                column.append(value)
        tensors = (torch.tensor(column, dtype=torch.int64) for column in columns)
        return dict(zip(NAMES, tensors, strict=True)), None

    def fits(index: Index, _: object) -> bool:
        offsets, sizes, labels = (index[name] for name in NAMES)
        return (
            len(offsets) == len(sizes) == len(labels)
            and within(labels, 0, MAX_CLASSES)
            and within(sizes, 1, MAX_ENCODED + 1)
            and within(offsets, tarfile.BLOCKSIZE, file.size)
            and within(offsets + sizes, 0, file.size)
        )

    # an index is smaller than what it tells of
    index, _ = remembered(side_path(cache, path), file.stamp, build, fits, most=file.size)
    return index, file

"""Files that data lies in: read at offsets by any thread, opened anew by a copy."""

from __future__ import annotations

import os
import stat
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

from fused_losses.base.files import DataError

MAX_ENCODED = 1 << 28  # bytes of an encoded picture

Stamp = list[int]  # [size, time of change in ns]: what tells that a file is still the same


def stamp(status: os.stat_result) -> Stamp:
    return [status.st_size, status.st_mtime_ns]


def is_there(path: Path) -> bool:
    """Whether there is a file of this name; DataError where something else has it."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: expected a file or nothing, got a folder or a device")
    return path.is_file()


class StoredFile:
    """A file read at offsets, from any thread; a read past its end is an error, not a short read.

    A copy, and what another process unpickles, opens the path anew. DataError where that is no
    longer the file that was opened: known is the stamp that it must have.
    Not a memory map: a page that faults holds the interpreter's lock, and a file cut short while
    mapped kills the process.
    """

    def __init__(self, path: Path, known: Stamp | None = None) -> None:
        self.path = path
        try:
            # a pipe would wait here for its writer
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise DataError(f"{path}: cannot be opened ({reason})") from None
        # closed when the last reader lets go of it
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: expected a regular file")
        self.size = status.st_size
        self.stamp = stamp(status)
        # a copy may be made after the working folder has changed
        self._place = Path(os.path.abspath(path))
        if known is not None and known != self.stamp:
            raise DataError(
                f"{path}: expected the file as it was when the set was opened, {known[0]} bytes "
                f"changed at {known[1]} ns, got {self.size} bytes changed at {self.stamp[1]} ns"
            )

    def __reduce__(self) -> tuple[type[StoredFile], tuple[Path, Stamp]]:
        return StoredFile, (self._place, self.stamp)

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

    def read_bounded(self, offset: int, length: int, what: str, most: int = MAX_ENCODED) -> bytes:
        """`read`, after a check that it is not too much to hold: an encoded picture, by default."""
        if not 1 <= length <= most:
            raise DataError(
                f"{self.path}: {what}: expected 1 to {most} bytes at offset {offset}, got {length}"
            )
        return self.read(offset, length, what)

    def whole(self, what: str, most: int = MAX_ENCODED) -> bytes:
        """All bytes of a file of 1 to `most` bytes."""
        return self.read_bounded(0, self.size, what, most)


class OpenFiles:
    """The files last read, kept open: at most `limit`, for sets of thousands of shards.

    stamps: of every file that may be asked for. A copy has none of them open.
    """

    def __init__(self, stamps: dict[Path, Stamp], limit: int = 128) -> None:
        self._stamps = stamps
        self._limit = limit
        self._files: OrderedDict[Path, StoredFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[dict[Path, Stamp], int]]:
        return OpenFiles, (self._stamps, self._limit)

    def get(self, path: Path) -> StoredFile:
        with self._lock:
            file = self._files.pop(path, None) or StoredFile(path, self._stamps[path])
            self._files[path] = file
            if len(self._files) > self._limit:
                self._files.popitem(last=False)
            return file

"""One record of MXNet's RecordIO: its parts, its header, its bytes.

A record is one or more parts: magic, cflag << 29 | length, the bytes, zeros up to four. A part
ends early where the record itself holds the magic (at a multiple of four), which is left out and
put back when the parts are joined. A record's bytes are a header (flag, label, id, id2), `flag`
more float32 labels, then the encoded picture.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fused_losses.base.files import DataError
from fused_losses.datasets.files import MAX_ENCODED, StoredFile

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
PART = struct.Struct("<II")  # magic, cflag << 29 | length
HEADER = struct.Struct("<IfQQ")  # flag, label, id, id2
WHOLE, FIRST, MIDDLE, LAST = range(4)  # cflag
MAX_RECORD = 1 << 29  # bytes; MXNet writes none as long
MAX_LABELS = 1 << 16
MAX_PARTS = 1 << 16
MAX_HELD = MAX_ENCODED + (1 << 20)  # bytes of a record that is read: a picture and its labels


@dataclass(frozen=True)
class Record:
    """One record: its labels (one number, or several), its ids, the picture's bytes (or none)."""

    labels: tuple[float, ...]
    key: int
    payload: bytes
    several: bool  # the labels follow the header: `flag` says how many
    id2: int = 0


def read_part(file: StoredFile, offset: int, what: str, first: bool) -> tuple[int, int]:
    """(cflag, length) of the part at an offset, checked."""
    magic, word = PART.unpack(file.read(offset, PART.size, what))
    if magic != MAGIC:
        raise DataError(
            f"{file.path}: {what}: expected the magic 0x{MAGIC:08x} at offset {offset}, got "
            f"0x{magic:08x}"
        )
    cflag, length = word >> 29, word & (MAX_RECORD - 1)
    expected = (WHOLE, FIRST) if first else (MIDDLE, LAST)
    if cflag not in expected:
        raise DataError(
            f"{file.path}: {what}: expected part {expected[0]} or {expected[1]} at offset "
            f"{offset}, got {cflag}"
        )
    if offset + PART.size + length > file.size:
        raise DataError(
            f"{file.path}: {what}: expected {length} bytes after offset {offset}, the file ends at "
            f"{file.size}"
        )
    return cflag, length


def _read_parts(file: StoredFile, offset: int, what: str) -> tuple[bytes, int]:
    """(a record's bytes, where the next record starts)."""
    parts, total, cflag = [], 0, FIRST
    while cflag not in (WHOLE, LAST):
        cflag, length = read_part(file, offset, what, first=not parts)
        total += length + len(MAGIC_BYTES)
        if total > MAX_HELD:
            raise DataError(
                f"{file.path}: {what}: expected a record of at most {MAX_HELD} bytes, its parts up "
                f"to offset {offset} hold {total}"
            )
        if len(parts) == MAX_PARTS:
            raise DataError(
                f"{file.path}: {what}: expected a record of at most {MAX_PARTS} parts, got more up "
                f"to offset {offset}"
            )
        parts.append(file.read(offset + PART.size, length, what))
        offset += PART.size + -(-length // 4) * 4
    return MAGIC_BYTES.join(parts), offset


def _parse(file: StoredFile, content: bytes, offset: int, what: str) -> Record:
    if len(content) < HEADER.size:
        raise DataError(
            f"{file.path}: {what}: expected a header of {HEADER.size} bytes in the record at "
            f"offset {offset}, got {len(content)} bytes"
        )
    flag, label, key, id2 = HEADER.unpack_from(content)
    start = HEADER.size + 4 * flag
    if start > len(content):
        raise DataError(
            f"{file.path}: {what}: expected {flag} labels in the record at offset {offset}, which "
            f"holds {len(content)} bytes"
        )
    if flag > MAX_LABELS:
        raise DataError(
            f"{file.path}: {what}: expected at most {MAX_LABELS} labels in the record at offset "
            f"{offset}, got {flag}"
        )
    labels = struct.unpack_from(f"<{flag}f", content, HEADER.size) if flag else (label,)
    return Record(labels, key, content[start:], flag > 0, id2)


def read_record(file: StoredFile, offset: int, what: str) -> Record:
    return _parse(file, _read_parts(file, offset, what)[0], offset, what)


def peek(file: StoredFile, offset: int, what: str) -> tuple[float, bool, int]:
    """(first label, whether a picture follows, bytes of the record), without the picture."""
    cflag, length = read_part(file, offset, what, first=True)
    if cflag == WHOLE and length >= HEADER.size + 4:
        head = file.read(offset + PART.size, HEADER.size + 4, what)
        flag, label = HEADER.unpack_from(head)[:2]
        if HEADER.size + 4 * flag <= length:
            first = struct.unpack_from("<f", head, HEADER.size)[0] if flag else label
            return first, length > HEADER.size + 4 * flag, PART.size + length
    content, stop = _read_parts(file, offset, what)
    record = _parse(file, content, offset, what)
    return record.labels[0], bool(record.payload), stop - offset


def frame(content: bytes) -> bytes:
    """A record's bytes as parts that hold no magic at a multiple of four."""
    if len(content) >= MAX_HELD:
        raise ValueError(f"records: expected under {MAX_HELD} bytes each, got {len(content)}")
    cuts, at = [], content.find(MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            cuts.append(at)
        at = content.find(MAGIC_BYTES, at + (4 if at % 4 == 0 else 1))
    starts, stops = [0, *(cut + 4 for cut in cuts)], [*cuts, len(content)]
    out = []
    for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        last = number == len(cuts)
        cflag = (WHOLE if last else FIRST) if number == 0 else (LAST if last else MIDDLE)
        out.append(PART.pack(MAGIC, cflag << 29 | (stop - start)) + content[start:stop])
    return b"".join(out) + bytes(-len(content) % 4)


def pack(record: Record) -> bytes:
    flag, label = (len(record.labels), 0.0) if record.several else (0, record.labels[0])
    more = struct.pack(f"<{flag}f", *record.labels[:flag])
    return HEADER.pack(flag, label, record.key, record.id2) + more + record.payload

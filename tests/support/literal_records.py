"""RecordIO as other programs write it: word by word, with InsightFace's header records."""

from __future__ import annotations

import struct
from pathlib import Path

from dataset_pictures import png, write

MAGIC = struct.pack("<I", 0xCED7230A)
CLASSES = [0, 0, 1, 2, 2, 2]


def framed(content: bytes) -> bytes:
    """A record as dmlc's writer puts it: word by word."""
    out, piece, first = b"", b"", True
    for i in range(0, len(content) - len(content) % 4, 4):
        word = content[i : i + 4]
        if word == MAGIC:
            out += MAGIC + struct.pack("<I", (1 if first else 2) << 29 | len(piece)) + piece
            piece, first = b"", False
        else:
            piece += word
    piece += content[len(content) - len(content) % 4 :]
    out += MAGIC + struct.pack("<I", (0 if first else 3) << 29 | len(piece)) + piece
    return out + b"\0" * (-len(out) % 4)


def content(labels: float | list[float], key: int, payload: bytes) -> bytes:
    if isinstance(labels, list):
        head = struct.pack("<IfQQ", len(labels), 0.0, key, 0)
        return head + struct.pack(f"<{len(labels)}f", *labels) + payload
    return struct.pack("<IfQQ", 0, labels, key, 0) + payload


def lay_out(folder: Path, records: dict[int, bytes], index: bool = True) -> Path:
    """Files of these records (key -> content), in the order given."""
    data, lines = b"", ""
    for key, one in records.items():
        lines += f"{key}\t{len(data)}\n"
        data += framed(one)
    if index:
        write(folder / "train.idx", lines.encode())
    return write(folder / "train.rec", data)


def insightface(pictures: list[bytes] | None = None) -> dict[int, bytes]:
    """Record 0, six pictures of three people, three identities."""
    pictures = pictures or [png(i) for i in range(6)]
    records = {0: content([7.0, 10.0], 0, b"")}
    for i, (picture, label) in enumerate(zip(pictures, CLASSES, strict=True)):
        # some writers give a picture two labels, of which the first is the class
        labels = [float(label), 0.0] if i == 1 else float(label)
        records[i + 1] = content(labels, i + 1, picture)
    for key, (start, stop) in enumerate([(1, 3), (3, 4), (4, 7)], start=7):
        records[key] = content([float(start), float(stop)], key, b"")
    return records

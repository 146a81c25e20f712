"""What a fuzzer makes of a file: mutated bytes, or another content of the right form."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import torch

Mutate = Callable[[bytes, random.Random], bytes]

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, 1 << 63)
ODD = [None, True, -1, 0, 1 << 70, 0.5, float("nan"), float("inf"), "", "x" * 300, "../../x.png"]
# what would run code if anything ran it, and marks that formats give a meaning
TOKENS = (
    b"cos\nsystem\n(S'exit 3'\ntR",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x06exit 3\x85R",
    b"cbuiltins\neval\n(Vexit(3)\ntR",
    b"\n",
    b"../../",
    b"%s",
    bytes(512),
    b"\xff\xda",
    b"\xff\xd8\xff",
    b"IDAT",
    b"q\x00h\x00\x86",
    b"PK\x01\x02",
    struct.pack("<I", 0xCED7230A),
    b"-1",
    b"9" * 30,
)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Cut, bytes and numbers changed, parts left out, repeated, put elsewhere or added."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(out) + 1) if draw.random() < 0.5 else draw.randrange(64)
        length = draw.choice((1, 2, 4, 8, 64, 512, 4096))
        kind = draw.randrange(8)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            out[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            form = draw.choice(("<I", ">I", "<Q", ">Q", "<H", ">H"))
            number = draw.choice(EXTREMES) & ((1 << 8 * struct.calcsize(form)) - 1)
            out[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            out[at:at] = out[at : at + length] * draw.choice((1, 2, 50))
        elif kind == 5:
            out[at:at] = bytes(length)
        elif kind == 6:
            out[at:at] = draw.choice(TOKENS)
        else:
            other = draw.randrange(len(out) + 1)
            out[at : at + length] = out[other : other + length]
    return bytes(out)


def with_checksum(data: bytes) -> bytes:
    """A side file that is right as far as its checksum goes."""
    return b"%08x " % zlib.crc32(data[9:]) + data[9:]


def other_pickle(mutate: Mutate) -> Mutate:
    """An archive of torch.save with a mutated pickle, and the checksum that it then has."""

    def instead(data: bytes, draw: random.Random) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as new:
            for name in archive.namelist():
                part = archive.read(name)
                new.writestr(name, mutate(part, draw) if name.endswith("data.pkl") else part)
        return out.getvalue()

    return instead


def other_values(data: bytes, draw: random.Random) -> bytes:
    """What torch.save has stored, with something else in one place."""
    out = io.BytesIO()
    torch.save(elsewhere(torch.load(io.BytesIO(data), weights_only=True), draw), out)
    return out.getvalue()


def other_json(data: bytes, draw: random.Random) -> bytes:
    return json.dumps(elsewhere(json.loads(data), draw)).encode()


def elsewhere(value: Any, draw: random.Random) -> Any:
    """The value with something else in one to three places: left out, added, another."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = _changed(value, draw)
    return value


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict | list | tuple) and value and draw.random() < 0.9:
        pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
        place = draw.randrange(len(pairs))
        key, part = pairs[place]
        kind = draw.randrange(8)
        if kind == 0:
            del pairs[place]
        elif kind == 1:
            pairs.append((f"{key}!", part))
        else:
            pairs[place] = key, _changed(part, draw)
        if isinstance(value, dict):
            return dict(pairs)
        return type(value)(one for _, one in pairs)
    if isinstance(value, torch.Tensor) and draw.random() < 0.7:
        shape = draw.choice([(), (0,), (3,), (2, 2), tuple(value.shape)])
        kind = draw.choice([torch.float32, torch.int64, torch.bool, value.dtype])
        return torch.zeros(shape, dtype=kind)
    return draw.choice([*ODD, [], {}, [[[]]], {"a": 1}])

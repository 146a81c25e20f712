"""Mutated files for every reader, under limits of memory and time; run as a program of its own.

Prints one JSON object: reader -> [tried, refused]. Any exception but DataError ends it.
"""

from __future__ import annotations

import json
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from dataset_pictures import encode, pixels, png, tar
from literal_records import insightface, lay_out

from fused_losses.base.files import DataError
from fused_losses.centers.insightface import InsightFaceTable
from fused_losses.datasets import RecordIO, TarShards, read_bin
from fused_losses.datasets.decoding import FORMATS, decode_picture
from fused_losses.datasets.glyphs import cache as glyph_cache

MEMORY = 1 << 30  # bytes beyond what the imports take
SECONDS = 5.0  # of this process, a file
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, 1 << 63)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Cut, bytes and numbers changed, parts left out, repeated, put elsewhere or added."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(out) + 1) if draw.random() < 0.5 else draw.randrange(64)
        length = draw.choice((1, 2, 4, 8, 64, 512, 4096))
        kind = draw.randrange(7)
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
        else:
            other = draw.randrange(len(out) + 1)
            out[at : at + length] = out[other : other + length]
    return bytes(out)


def everything_of(found: RecordIO | TarShards) -> None:
    for index in range(min(len(found), 8)):
        found.read([index])
    if isinstance(found, RecordIO):
        found.identities()


def with_checksum(data: bytes) -> bytes:
    """A side file that is right as far as its checksum goes."""
    return b"%08x " % zlib.crc32(data[9:]) + data[9:]


def readers(folder: Path) -> dict[str, tuple[Path, Callable[[], object], Callable]]:
    """name -> (the file to be mutated, what reads it, what is done to the mutated bytes)."""
    plain = lambda data: data
    made: dict[str, tuple[Path, Callable[[], object], Callable]] = {}

    def add(name: str, path: Path, read: Callable[[], object], then: Callable = plain) -> None:
        made[name] = (path, read, then)

    def records(at: Path, cache: object = False) -> Callable[[], None]:
        return lambda: everything_of(RecordIO(at, size=(6, 5), cache=cache))

    rec = lay_out(folder / "listed", insightface())
    add("rec", rec, records(rec))
    (folder / "listed" / "property").write_bytes(b"3,112,112")
    add("idx", rec.with_suffix(".idx"), records(rec))
    add("property", rec.with_name("property"), records(rec))
    scanned = lay_out(folder / "scanned", insightface(), index=False)
    add("rec without idx", scanned, records(scanned))
    kept = lay_out(folder / "kept", insightface())
    records(kept, True)()
    add("side file", kept.with_name("train.rec.index"), records(kept, True))
    add(
        "side file, checksum", kept.with_name("train.rec.index"), records(kept, True), with_checksum
    )

    members = [(f"{i}.{e}", d) for i in range(3) for e, d in (("png", png(i)), ("cls", b"%d" % i))]
    shard = folder / "x.tar"
    shard.write_bytes(tar(members))
    add("tar", shard, lambda: everything_of(TarShards([shard], size=4, cache=False)))

    arrays = [numpy.frombuffer(png(i), dtype=numpy.uint8) for i in range(4)]
    for protocol in (0, 2, 5):
        path = folder / f"{protocol}.bin"
        path.write_bytes(pickle.dumps((arrays, numpy.array([1, 0])), protocol))
        add(f"bin {protocol}", path, lambda path=path: read_bin(path).read(range(2), 4))

    for form in FORMATS:
        path = folder / form
        path.write_bytes(encode(pixels(1, (40, 30)), form))
        add(form, path, lambda path=path: decode_picture(path.read_bytes(), (112, 112), 3, "x"))

    for name, new in (("zip", True), ("legacy", False)):
        path = folder / name / "checkpoint_gpu_0.pt"
        path.parent.mkdir()
        weight = torch.ones(5, 3)
        content = {"state_dict_softmax_fc": {"weight": weight}, "global_step": numpy.int64(2)}
        torch.save(content, path, _use_new_zipfile_serialization=new)

        def read(path: Path = path) -> None:
            table = InsightFaceTable(path.parent)
            table.rows(0, min(table.num_classes, 100))

        add(f"insightface {name}", path, read)

    glyphs = folder / "x.glyphs"
    head = {"format": glyph_cache.FORMAT, "drawings": 2, "size": 4, "fonts": [["f", "f", "f", 0]]}
    columns = numpy.array([65, 66, 0, 0, 0, 1], dtype="<i8").tobytes()
    glyphs.write_bytes(json.dumps(head | {"skipped": []}).encode() + b"\n" + columns + bytes(32))
    add("glyphs", glyphs, lambda: glyph_cache.read(glyphs).read([0, 1]))
    return made


def run(tries: int, seed: int) -> dict[str, list[int]]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        made = readers(Path(folder))
        for _, read, _ in made.values():
            read()  # as they are they can be read
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for name, (path, read, then) in made.items():
            whole, refused = path.read_bytes(), 0
            for number in range(tries):
                draw = random.Random(f"{seed} {name} {number}")
                path.write_bytes(then(mutated(whole, draw)))
                start = time.process_time()
                try:
                    read()
                except DataError:
                    refused += 1
                except BaseException:
                    print(f"{name}: seed {seed}, number {number}", file=sys.stderr)
                    raise
                took = time.process_time() - start
                assert took < SECONDS, f"{name}: seed {seed}, number {number}: {took} s"
            path.write_bytes(whole)
            counts[name] = [tries, refused]
    return counts


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))

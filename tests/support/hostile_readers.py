"""Every reader of files, with a whole file each that a fuzzer mutates."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from dataset_pictures import encode, pixels, png, tar, two_people
from literal_records import insightface, lay_out
from mutations import Mutate, mutated, other_json, other_pickle, other_values, with_checksum

from fused_losses.base.files import DataError
from fused_losses.centers.checkpoint import CheckpointError, Checkpoints
from fused_losses.centers.insightface import InsightFaceTable
from fused_losses.datasets import ImageFolders, RecordIO, TarShards, read_bin
from fused_losses.datasets.decoding import FORMATS, decode_picture
from fused_losses.datasets.glyphs import cache as glyph_cache
from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.faces.data import Pictures
from fused_losses.train.faces.loop import FoldTraining, check_result
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.files import RunFileError
from fused_losses.train.frame.log import read_log
from fused_losses.train.glyphs.config import GlyphConfig
from fused_losses.train.glyphs.report import read_stage
from fused_losses.train.large.config import LargeConfig


@dataclass(frozen=True)
class Reader:
    """What reads a file, and which errors may come of another content."""

    path: Path
    read: Callable[[], object]
    errors: tuple[type[Exception], ...] = (DataError,)
    then: Callable[[bytes], bytes] = lambda data: data  # done to the mutated bytes
    instead: Mutate | None = None  # of mutated bytes: another content of the right form


def all_readers(folder: Path) -> dict[str, Reader]:
    made: dict[str, Reader] = {}
    for some in (records, shards, folders, bins, pictures, insightface_files, glyph_files):
        made |= some(folder)
    return made | run_files(folder) | states(folder) | sharded(folder)


# ---- pictures -----------------------------------------------------------------------------------


def everything_of(found: RecordIO | TarShards | ImageFolders) -> None:
    for index in range(min(len(found), 8)):
        found.read([index])
    if isinstance(found, RecordIO):
        found.identities()


def other_head(data: bytes, draw: random.Random) -> bytes:
    """A side file whose JSON line says something else."""
    line, _, rest = data[9:].partition(b"\n")
    return with_checksum(bytes(9) + other_json(line, draw) + b"\n" + rest)


def side_files(name: str, side: Path, read: Callable[[], object]) -> dict[str, Reader]:
    return {
        f"side file, {name}": Reader(side, read),
        f"side file, {name}, checksum": Reader(side, read, then=with_checksum),
        f"side file, {name}, values": Reader(side, read, instead=other_head),
    }


def records(folder: Path) -> dict[str, Reader]:
    def reads(at: Path, cache: object = False) -> Callable[[], None]:
        return lambda: everything_of(RecordIO(at, size=(6, 5), cache=cache))

    rec = lay_out(folder / "listed", insightface())
    (folder / "listed" / "property").write_bytes(b"3,112,112")
    scanned = lay_out(folder / "scanned", insightface(), index=False)
    kept = lay_out(folder / "kept", insightface())
    reads(kept, True)()
    return {
        "rec": Reader(rec, reads(rec)),
        "idx": Reader(rec.with_suffix(".idx"), reads(rec)),
        "property": Reader(rec.with_name("property"), reads(rec)),
        "rec without idx": Reader(scanned, reads(scanned)),
        **side_files("rec", kept.with_name("train.rec.index"), reads(kept, True)),
    }


def shards(folder: Path) -> dict[str, Reader]:
    long = "f" * 200
    members = [
        (f"{name}.{end}", data)
        for i, name in enumerate(["0", long, "1"])
        for end, data in (("png", png(i)), ("json", b'{"label": %d}' % i))
    ]
    members[1] = ("0.cls", b"0")
    made = {}
    for name in ("USTAR", "GNU", "PAX"):
        path = folder / f"{name}.tar"
        some = members[:2] + members[4:] if name == "USTAR" else members
        path.write_bytes(tar(some, getattr(tarfile, f"{name}_FORMAT")))
        read = lambda path=path, kept=False: everything_of(TarShards([path], size=4, cache=kept))
        made[f"tar, {name}"] = Reader(path, read)
    read(kept=True)
    side = folder / "PAX.tar.index"
    return made | side_files("tar", side, lambda: read(kept=True))


def folders(folder: Path) -> dict[str, Reader]:
    root = two_people(folder / "people")
    read = lambda: everything_of(ImageFolders(root, size=(6, 5), cache=True))
    read()
    return side_files("folders", folder / "people.index", read)


def bins(folder: Path) -> dict[str, Reader]:
    arrays = [numpy.frombuffer(png(i), dtype=numpy.uint8) for i in range(4)]
    made = {}
    for protocol in (0, 2, 5):
        path = folder / f"{protocol}.bin"
        path.write_bytes(pickle.dumps((arrays, numpy.array([1, 0])), protocol))
        made[f"bin {protocol}"] = Reader(path, lambda path=path: read_bin(path).read(range(2), 4))
    return made


def pictures(folder: Path) -> dict[str, Reader]:
    made = {}
    for form in FORMATS:
        path = folder / form
        path.write_bytes(encode(pixels(1, (40, 30)), form))
        read = lambda path=path: decode_picture(path.read_bytes(), (112, 112), 3, "x")
        made[form] = Reader(path, read)
    return made


def glyph_files(folder: Path) -> dict[str, Reader]:
    path = folder / "x.glyphs"
    head = {"format": glyph_cache.FORMAT, "drawings": 2, "size": 4, "fonts": [["f", "f", "f", 0]]}
    columns = numpy.array([65, 66, 0, 0, 0, 1], dtype="<i8").tobytes()
    head |= {"skipped": [["a", "b"]]}
    path.write_bytes(json.dumps(head).encode() + b"\n" + columns + bytes(32))

    def read() -> None:
        found = glyph_cache.read(path)
        found.read([0, 1])
        found.designs()

    def other(data: bytes, draw: random.Random) -> bytes:
        line, _, rest = data.partition(b"\n")
        return other_json(line, draw) + b"\n" + rest

    return {"glyphs": Reader(path, read), "glyphs, values": Reader(path, read, instead=other)}


# ---- torch's files ------------------------------------------------------------------------------


def insightface_files(folder: Path) -> dict[str, Reader]:
    weight = torch.ones(5, 3)
    state = {"state": {1: {"momentum_buffer": weight}}, "param_groups": [{"params": [0, 1]}]}
    content = {"state_dict_softmax_fc": {"weight": weight}, "state_optimizer": state}
    made = {}

    def read(place: Path) -> None:
        table = InsightFaceTable(place)
        for name in table.names:
            table.rows(0, min(table.num_classes, 100), name)

    def add(name: str, file: str, value: object, **options: bool) -> Path:
        path = folder / name / file
        path.parent.mkdir()
        torch.save(value, path, **options)
        made[name] = Reader(path, lambda: read(path.parent))
        return path

    step = {"global_step": numpy.int64(2)}
    new = add("insightface", "checkpoint_gpu_0.pt", content | step)
    add(
        "insightface, old",
        "checkpoint_gpu_0.pt",
        content | step,
        _use_new_zipfile_serialization=False,
    )
    add("insightface, first", "rank_0_softmax_weight.pt", weight)
    again = lambda: read(new.parent)
    made["insightface, pickle"] = Reader(new, again, instead=other_pickle(mutated))
    plain = add("insightface, values", "checkpoint_gpu_0.pt", content | {"global_step": 2})
    made["insightface, values"] = Reader(plain, lambda: read(plain.parent), instead=other_values)
    return made


# ---- runs ---------------------------------------------------------------------------------------


def run_files(folder: Path) -> dict[str, Reader]:
    made = {}
    for kind in (TrainConfig, GlyphConfig, LargeConfig):
        path = folder / kind.__name__ / "config.json"
        path.parent.mkdir()
        path.write_text(kind().to_json())
        read = lambda kind=kind, path=path: kind.load(path)
        made[kind.__name__] = Reader(path, read, (RunFileError,))
        made[f"{kind.__name__}, values"] = Reader(path, read, (RunFileError,), instead=other_json)
    log = folder / "log.jsonl"
    lines = [{"name": "trained", "step": i, "loss": 0.5, "lr": 1e-3} for i in range(4)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made["log"] = Reader(log, lambda: read_log(log), (RunFileError,))
    stage = folder / "trained.json"
    names = "recall_at_1 recall_at_5 recall_at_1_of_centres step_ms head_ms peak_memory_mib classes"
    figures = dict.fromkeys([*names.split(), "queries"], 1)
    figures |= {"losses": [1.0], "untrained": {"recall_at_1": 0.5}}
    stage.write_text(json.dumps(figures))
    for name, instead in (("stage", None), ("stage, values", other_json)):
        made[name] = Reader(stage, lambda: read_stage(stage), (RunFileError,), instead=instead)
    return made


def states(folder: Path) -> dict[str, Reader]:
    """A fold's state, and its result."""
    config = TrainConfig(image_size="16x16", embedding=4, batch_size=4, steps=8)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8, generator=generator)
    people = Pictures(images, torch.arange(8) // 2, tuple("abcd"))
    training = FoldTraining(config, people, fold=0)
    training.step()
    path, ended = folder / "checkpoint.pt", folder / "fold.pt"
    whole = training.state()
    checkpoint.save(path, whole)
    whole = checkpoint.load(path)

    def go_on() -> None:
        training.load(whole)  # after a refusal it is half of each
        training._go_on(path)
        training.step()

    def result() -> None:
        try:
            check_result(checkpoint.load(ended))
        except (KeyError, TypeError) as error:
            raise RunFileError(str(error)) from error

    checkpoint.save(ended, training.result(people))
    made = {}
    for name, place, read in (("state", path, go_on), ("fold", ended, result)):
        errors = (RunFileError,) if name == "state" else (ValueError,)
        made[name] = Reader(place, read, errors)
        made[f"{name}, pickle"] = Reader(place, read, errors, instead=other_pickle(mutated))
        made[f"{name}, values"] = Reader(place, read, errors, instead=other_values)
    return made


def sharded(folder: Path) -> dict[str, Reader]:
    """A checkpoint of `Checkpoints`: what is not as it was written is not read at all."""
    home = folder / "checkpoints"
    state = {"net": {"w": torch.arange(40.0), "name": "x"}}
    with Checkpoints(home) as whole:
        whole.save(state, 3, asynchronous=False)
    step = home / "step-00000003"
    kept = shutil.copytree(step, folder / "kept-step")

    def read() -> None:
        state = {"net": {"w": torch.zeros(40), "name": ""}}
        with Checkpoints(home) as checkpoints:
            checkpoints.load(state)
        same = [(step / one.name).read_bytes() == one.read_bytes() for one in kept.iterdir()]
        assert all(same) or (step / "checksums.json").read_bytes() != _sums(kept)
        assert state["net"]["w"].equal(torch.arange(40.0)) and state["net"]["name"] == "x"

    return {
        f"checkpoints, {name}": Reader(step / name, read, (CheckpointError,))
        for name in (".metadata", "__0_0.distcp", "checksums.json")
    }


def _sums(folder: Path) -> bytes:
    return (folder / "checksums.json").read_bytes()

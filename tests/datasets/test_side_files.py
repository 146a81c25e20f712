"""What is kept beside the data: made anew where it is old, damaged, or cannot be of this data."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dataset_pictures import damaged, pixels, png, tar, two_people, write
from torch import Tensor

from fused_losses.datasets import ImageFolders, RecordIO, TarShards, write_records
from fused_losses.datasets.base import EncodedImages
from fused_losses.datasets.side_files import _load, remembered, side_path


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    return two_people(tmp_path / "faces")


def test_the_list_of_files_is_kept_while_no_folder_changes(faces: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    first = ImageFolders(faces, size=(6, 5), cache=kept)
    side = side_path(kept, faces)
    assert side.is_file()
    before = os.stat(side).st_mtime_ns
    again = ImageFolders(faces, size=(6, 5), cache=kept)
    assert os.stat(side).st_mtime_ns == before
    assert again.files == first.files and again.names == first.names
    assert again.labels.equal(first.labels)
    write(faces / "bo" / "c.png", png(5))
    os.utime(faces / "bo", ns=(1, 1))
    changed = ImageFolders(faces, size=(6, 5), cache=kept)
    assert len(changed) == 6 and changed.read([5])[0].equal(pixels(5))


def test_a_damaged_side_file_is_made_anew(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(40), "b": torch.zeros(0, dtype=torch.int64)}
    side, calls = tmp_path / "x.index", []

    def make() -> tuple:
        calls.append(1)
        return tensors, ["extra"]

    for _ in range(2):
        found, extra = remembered(side, [1, 2], make, lambda *_: True)
        assert extra == ["extra"] and found.keys() == tensors.keys()
        assert all(found[name].equal(tensors[name]) for name in tensors)
    assert len(calls) == 1
    whole = side.read_bytes()
    assert _load(side, [1, 3]) is None
    for seed in range(200):
        side.write_bytes(damaged(whole, seed))
        found = _load(side, [1, 2])
        assert found is None
    side.write_bytes(whole[:-1])
    remembered(side, [1, 2], make, lambda *_: True)
    assert len(calls) == 2 and side.read_bytes() == whole


def test_a_folder_that_cannot_be_written_gives_a_warning(tmp_path: Path) -> None:
    blocked = write(tmp_path / "file", b"") / "x.index"
    with pytest.warns(UserWarning, match="cannot be kept .* pass cache="):
        found, _ = remembered(blocked, 1, lambda: ({"a": torch.arange(3)}, None), lambda *_: True)
    assert found["a"].tolist() == [0, 1, 2]


def test_where_side_files_lie(tmp_path: Path) -> None:
    assert side_path(True, tmp_path / "a.tar") == tmp_path / "a.tar.index"
    assert side_path(False, tmp_path / "a.tar") is side_path(None, tmp_path / "a.tar") is None
    one, two = (side_path(tmp_path / "c", tmp_path / d / "a.tar") for d in ("x", "y"))
    assert one.parent == tmp_path / "c" and one != two


def rewritten(side: Path, change: Callable[[dict, list[Tensor]], object]) -> None:
    """Another content in a side file, with the checksum that it then has."""
    _, line, rest = side.read_bytes()[:9], *side.read_bytes()[9:].split(b"\n", 1)
    head, tensors = json.loads(line), []
    for _, count in head["names"]:
        tensors.append(torch.frombuffer(bytearray(rest[: 8 * count]), dtype=torch.int64))
        rest = rest[8 * count :]
    change(head, tensors)
    body = json.dumps(head).encode() + b"\n" + b"".join(t.numpy().tobytes() for t in tensors)
    side.write_bytes(b"%08x " % zlib.crc32(body) + body)


def put(name: str, place: int, value: int) -> Callable[[dict, list[Tensor]], object]:
    """One number of a named tensor becomes another."""

    def change(head: dict, tensors: list[Tensor]) -> None:
        (at,) = (i for i, (known, _) in enumerate(head["names"]) if known == name)
        tensors[at][place] = value

    return change


def without(name: str) -> Callable[[dict, list[Tensor]], object]:
    def change(head: dict, tensors: list[Tensor]) -> None:
        (at,) = (i for i, (known, _) in enumerate(head["names"]) if known == name)
        del tensors[at], head["names"][at]

    return change


def shorter(name: str) -> Callable[[dict, list[Tensor]], object]:
    def change(head: dict, tensors: list[Tensor]) -> None:
        (at,) = (i for i, (known, _) in enumerate(head["names"]) if known == name)
        tensors[at] = tensors[at][1:]
        head["names"][at][1] -= 1

    return change


def named(value: object) -> Callable[[dict, list[Tensor]], object]:
    return lambda head, _: head["extra"].__setitem__(0, value)


LIES: dict[str, list[Callable[[dict, list[Tensor]], object]]] = {
    "folders": [
        *(put("labels", 1, value) for value in (-1, 2, -(1 << 63))),
        *(put("folders", 1, value) for value in (-1, 0, 9)),
        *map(named, ["../../../x.png", "/x.png", "a/b.png", ".x.png", "x.txt", "..", "", 3, None]),
        *map(without, ["labels", "folders"]),
        shorter("labels"),
        lambda head, _: head.__setitem__("extra", "a.png"),
        lambda head, _: head["extra"].pop(),
    ],
    "recordio": [
        *(put("labels", 1, value) for value in (-1, 1 << 24, -(1 << 63))),
        *(put("offsets", 1, value) for value in (-4, 2, 1 << 40, -(1 << 63))),
        *(put("keys", 1, value) for value in (-1, 99, (1 << 63) - 1)),
        *(put("identity_offsets", 1, value) for value in (-4, 1 << 40)),
        *(change(name) for name in ("labels", "keys", "offsets") for change in (without, shorter)),
        *(change(f"identity_{name}") for name in ("keys", "offsets") for change in (without,)),
        shorter("identity_keys"),
    ],
    "tar": [
        *(put("labels", 1, value) for value in (-1, 1 << 31, -(1 << 63))),
        *(put("offsets", 1, value) for value in (-512, 0, 1 << 40, (1 << 63) - 1)),
        *(put("sizes", 1, value) for value in (-1, 0, 1 << 20, (1 << 63) - 1)),
        *(change(name) for name in ("labels", "offsets", "sizes") for change in (without, shorter)),
    ],
}


@pytest.mark.parametrize("kind", LIES)
def test_a_side_file_is_not_believed_for_its_checksum(tmp_path: Path, kind: str) -> None:
    classes = [0, 0, 1]
    if kind == "folders":
        for i, label in enumerate(classes):
            write(tmp_path / "data" / str(label) / f"{i}.png", png(i))
        (tmp_path / "data" / "2").mkdir()
        make, place = ImageFolders, tmp_path / "data"
    elif kind == "recordio":
        pictures = [(png(i), label) for i, label in enumerate(classes)]
        write_records(tmp_path / "data", pictures, size=(6, 5))
        (tmp_path / "property").unlink()
        make, place = RecordIO, tmp_path / "data.rec"
    else:
        members = [
            (f"{i}.{e}", d)
            for i in range(3)
            for e, d in (("png", png(i)), ("cls", b"%d" % classes[i]))
        ]
        make, place = TarShards, str(write(tmp_path / "data.tar", tar(members)))

    def opened() -> EncodedImages:
        return make(place, size=(6, 5), cache=tmp_path / "side")

    whole = opened()
    (side,) = (tmp_path / "side").iterdir()
    kept = side.read_bytes()
    rewritten(side, lambda *_: None)
    assert side.read_bytes() == kept
    for lie in LIES[kind]:
        rewritten(side, lie)
        assert side.read_bytes() != kept
        found = opened()
        assert found.labels.tolist() == classes and found.classes == whole.classes
        assert found.read(range(3)).equal(torch.stack([pixels(i) for i in range(3)]))
        # it was made anew
        assert side.read_bytes() == kept


def test_a_side_file_larger_than_its_data_is_not_read(tmp_path: Path) -> None:
    side = tmp_path / "x.index"
    head = {"format": "fused_losses.datasets 1", "stamps": 1, "names": [["a", 1 << 37]], "extra": 0}
    line = json.dumps(head).encode() + b"\n"
    side.write_bytes(b"00000000 " + line)
    os.truncate(side, 9 + len(line) + (1 << 40))
    assert _load(side, 1) is None
    for counts in ([["a", -1], ["b", 1]], [["a", 1e300]], [["a"]], [], "ab", [["a", "1"]]):
        line = json.dumps(head | {"names": counts}).encode() + b"\n"
        side.write_bytes(b"%08x " % zlib.crc32(line) + line)
        assert _load(side, 1) is None

"""Tar shards: what is read, by index and as a stream, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_pictures import damaged, outcome, pixels, png, tar, write

from fused_losses.datasets import DataError, TarShards, stream_shards
from fused_losses.datasets.tar_index import shard_paths

PAX = tarfile.PAX_FORMAT


def sample(number: int, label: int, kind: str = "cls") -> list[tuple[str, bytes]]:
    text = str(label).encode() if kind == "cls" else b'{"label": %d, "who": "x"}' % label
    return [(f"{number:06d}.png", png(number)), (f"{number:06d}.{kind}", text)]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Three shards of 3, 0 and 4 pictures with the classes 0, 1, 2, 0, 1, 2, 0."""
    samples = [sample(i, i % 3, "cls" if i % 2 else "json") for i in range(7)]
    for shard, part in enumerate((samples[:3], [], samples[3:])):
        members = [member for one in part for member in one]
        write(tmp_path / f"faces-{shard:03d}.tar", tar(members))
    return str(tmp_path / "faces-{000..002}.tar")


def opened(path: object, **options: object) -> TarShards:
    return TarShards(path, size=(6, 5), cache=False, **options)


def test_pictures_by_index(shards: str) -> None:
    found = opened(shards)
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and found.labels.dtype == torch.int64
    assert found.classes == 3 and found.names is None and len(found) == 7
    order = [6, 0, 3, 2]
    assert found.read(order).equal(torch.stack([pixels(i) for i in order]))
    assert opened(shards, classes=9).classes == 9


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_folders_long_names_and_other_members(tmp_path: Path, form: int) -> None:
    deep = "a.b/" + "d" * 90 + "/" + "long" * 20
    members = [
        ("__meta.txt", b"x"),
        (f"{deep}.seg.png", b"another picture of the key"),
        (f"{deep}.PNG", png(1)),
        (f"{deep}.cls", b" 4\n"),
        ("a.b/é.json", b'{"label": 2}'),
        ("a.b/é.webp", png(2)),
        ("a.b/é.txt", b"text"),
        ("nodot", b"x"),
        (".hidden", b"x"),
    ]
    found = opened([write(tmp_path / "x.tar", tar(members, form))])
    assert found.labels.tolist() == [4, 2] and found.classes == 5
    assert found.read([1, 0]).equal(torch.stack([pixels(2), pixels(1)]))


def test_names_that_other_writers_give(tmp_path: Path) -> None:
    members = [
        ("a.input.jpg", png(0)),
        ("a.target.cls", b"1"),
        ("b.input.png", png(1)),
        ("b.target.json", b'{"label": 0}'),
    ]
    found = opened([write(tmp_path / "x.tar", tar(members))])
    assert found.labels.tolist() == [1, 0]
    assert found.read([0, 1]).equal(torch.stack([pixels(0), pixels(1)]))


@pytest.mark.parametrize(("magic", "module"), [("gzip", gzip), ("bzip2", bz2), ("xz", lzma)])
def test_a_compressed_shard_is_named(tmp_path: Path, magic: str, module: Any) -> None:
    path = write(tmp_path / "x.tar.gz", module.compress(tar(sample(0, 0))))
    with pytest.raises(DataError, match=rf"gz: expected an uncompressed .* by {magic}: decompress"):
        opened([path])


def test_a_block_of_zeros_is_the_end(tmp_path: Path) -> None:
    """Python's tarfile stops at the first: what lies behind would be lost without a word."""
    one, two = (tar(sample(i, i)) for i in range(2))
    body = 4 * tarfile.BLOCKSIZE
    told = r"only zeros behind the end mark at offset 2048, got bytes at (\d+): two archives"
    for data, place in (
        (one + two, len(one)),
        (one[:body] + bytes(512) + two, body + 512),
        (one + b"x", len(one)),
        (one[:body] + bytes(1 << 20) + b"\0\1", body + (1 << 20) + 1),
    ):
        with pytest.raises(DataError, match=told.replace(r"(\d+)", str(place))):
            opened([write(tmp_path / "x.tar", data)])
    # padding of any writer
    for more in (512, 1 << 20):
        assert len(opened([write(tmp_path / "x.tar", one + bytes(more))])) == 1
    path = write(tmp_path / "x.tar", one)
    os.truncate(path, 1 << 40)
    with pytest.raises(DataError, match="at most 67108864 bytes from the end mark at offset 2048"):
        opened([path])


def test_folders_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in sample(1, 0):
            info = tarfile.TarInfo(f"a/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert opened([write(tmp_path / "x.tar", out.getvalue())]).read([0])[0].equal(pixels(1))


def test_an_index_is_built_once(shards: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    first = TarShards(shards, size=(6, 5), cache=kept)
    times = {name: os.stat(kept / name).st_mtime_ns for name in os.listdir(kept)}
    assert len(times) == 3
    again = TarShards(shards, size=(6, 5), cache=kept)
    assert again.labels.equal(first.labels) and again.read([5]).equal(first.read([5]))
    assert times == {name: os.stat(kept / name).st_mtime_ns for name in os.listdir(kept)}
    changed = write(tmp_path / "faces-001.tar", tar(sample(9, 5)))
    os.utime(changed, ns=(5, 5))
    assert TarShards(shards, size=(6, 5), cache=kept).labels.tolist() == [0, 1, 2, 5, 0, 1, 2, 0]


def test_names_of_shards(tmp_path: Path) -> None:
    names = [f"{d}-{i:02d}.tar" for d in ("a", "b") for i in (8, 9, 10)]
    paths = [write(tmp_path / name, b"") for name in names]
    assert shard_paths(str(tmp_path / "{a,b}-{08..10}.tar")) == paths
    assert shard_paths(str(tmp_path / "*.tar")) == sorted(paths)
    assert shard_paths(tmp_path / "{b,a}-*9.tar") == [paths[4], paths[1]]
    assert shard_paths(paths[:2]) == paths[:2]
    for bad in (str(tmp_path / "c-*.tar"), [], [paths[0], paths[0]]):
        with pytest.raises(ValueError, match="shards: expected distinct files"):
            shard_paths(bad)
    with pytest.raises(ValueError, match="expected {first..last}"):
        shard_paths("{9..1}.tar")
    with pytest.raises(ValueError, match="at most 1048576 names"):
        shard_paths("{0..9999}{0..9999}")
    with pytest.raises(DataError, match=r"gone\.tar: expected a tar shard"):
        opened([tmp_path / "gone.tar"])


# ---- streams ------------------------------------------------------------------------------------


def many(tmp_path: Path) -> str:
    for shard in range(5):
        members = [m for i in range(shard + 1) for m in sample(10 * shard + i, shard)]
        write(tmp_path / f"s{shard}.tar", tar(members))
    return str(tmp_path / "s{0..4}.tar")


def streamed(pattern: str, **options: object) -> list[int]:
    """The numbers of the pictures."""
    known = {pixels(10 * s + i).numpy().tobytes(): 10 * s + i for s in range(5) for i in range(5)}
    numbers = []
    for images, labels in stream_shards(pattern, size=(6, 5), cache=False, **options):
        found = [known[image.numpy().tobytes()] for image in images]
        assert labels.tolist() == [number // 10 for number in found]
        numbers.append(found)
    assert all(len(found) == options["batch"] for found in numbers[:-1])
    return [number for found in numbers for number in found]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_stream_every_picture_once(tmp_path: Path, world: int) -> None:
    pattern = many(tmp_path)
    everything = [10 * s + i for s in range(5) for i in range(s + 1)]
    assert streamed(pattern, batch=4) == everything
    for options in ({}, {"seed": 3, "epoch": 2}):
        parts = [
            streamed(pattern, batch=2, rank=rank, world=world, **options) for rank in range(world)
        ]
        assert sorted(n for part in parts for n in part) == everything
        # whole shards, in their order
        for part in parts:
            shards = list(dict.fromkeys(n // 10 for n in part))
            assert part == [10 * s + i for s in shards for i in range(s + 1)]


def test_the_order_of_shards_is_another_in_each_epoch(tmp_path: Path) -> None:
    pattern = many(tmp_path)
    orders = {tuple(streamed(pattern, batch=9, seed=0, epoch=epoch)) for epoch in range(6)}
    assert len(orders) >= 4
    assert streamed(pattern, batch=9, seed=0, epoch=1) in [list(order) for order in orders]


def test_a_rank_opens_only_its_own_shards(tmp_path: Path) -> None:
    pattern = many(tmp_path)
    (tmp_path / "s1.tar").write_bytes(b"damaged" * 200)
    assert streamed(pattern, batch=9, rank=0, world=2) == [0, 20, 21, 22, 40, 41, 42, 43, 44]
    with pytest.raises(DataError, match=r"s1\.tar: expected the header"):
        streamed(pattern, batch=9, rank=1, world=2)


def test_a_stream_checks_its_arguments_at_once(shards: str) -> None:
    for options, message in (
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"batch": 1, "rank": 1}, "rank: expected .* got 1 of 1"),
        ({"batch": 1, "size": 0}, "size: expected"),
        ({"batch": 1, "channels": 2}, "channels: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            stream_shards(shards, **{"size": 4, **options})


# ---- refusals -----------------------------------------------------------------------------------

PICTURE = ("a.png", png(0))


SHARDS = [
    (tar([PICTURE]), r"x\.tar: key 'a': expected a picture and a \.cls .* got \['a\.png'\]"),
    (tar([("a.cls", b"1")]), r"key 'a': expected a picture and .* got \['a\.cls'\]"),
    (tar([PICTURE, ("b.cls", b"1")]), "key 'a': expected a picture and"),
    (tar([PICTURE, ("a.jpg", b"x")]), r"member 'a\.jpg': expected one picture of a key"),
    (tar([("a.png", b""), ("a.cls", b"1")]), r"member 'a\.png': expected 1 to .* got 0"),
    (tar([PICTURE, ("a.cls", b"-1")]), r"member 'a\.cls': expected a class .* got b'-1'"),
    (tar([PICTURE, ("a.cls", b"1.0")]), "expected a class"),
    (tar([PICTURE, ("a.cls", b"9" * 4000)]), "expected a class"),
    (tar([PICTURE, ("a.cls", b"2147483648")]), r"expected a class in \[0, 2147483648\)"),
    (tar([PICTURE, ("a.json", b"{")]), r"member 'a\.json': expected a class"),
    (tar([PICTURE, ("a.json", b"[" * 100000)]), "expected a class"),
    (tar([PICTURE, ("a.json", b'{"label": true}')]), "expected a class"),
    (tar([PICTURE, ("a.json", b'{"class": 1}')]), "expected a class"),
    (
        tar([PICTURE, ("a.cls", b"")], type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        r"member 'a\.cls': expected a regular file at offset \d+, got a link",
    ),
    (tar([PICTURE, ("a.cls", b"")], type=tarfile.LNKTYPE, linkname="a.png"), "got a link"),
    (tar([PICTURE, ("a.cls", b"")], type=tarfile.FIFOTYPE), "expected a regular file"),
    (
        tar([PICTURE, ("a.cls", b"1")], tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.size": "9"}),
        "expected a regular file|expected the header of a member",
    ),
    (
        tar([PICTURE, ("a.cls", b"1")], PAX, pax_headers={"size": "-1024"}),
        r"x\.tar: .*expected",
    ),
    (tar([PICTURE, ("a.cls", b"1" * (1 << 20) + b"1")]), "expected at most 1048576 bytes"),
    (tar([("n" * (2 << 20) + ".png", b"x")], PAX), "a header of at most 1048576 bytes"),
    (tar([("n" * (2 << 20) + ".png", b"x")], tarfile.GNU_FORMAT), "a header of at most 1048576"),
    (
        tar([("a.left.jpg", png(0)), ("a.right.jpg", png(1)), ("a.txt", b"cat")]),
        r"expected members key\.jpg .* got none, but key\.left\.jpg, key\.right\.jpg, key\.txt",
    ),
    (tar([("a.left.jpg", png(0)), ("a.cls", b"1")]), r"a picture and .* got \['a\.cls'\]"),
    (
        tar([PICTURE, ("a.cls", b"cat")]),
        r"member 'a\.cls': expected a class .*, a number, got b'cat'; classes with names are num",
    ),
    (tar([PICTURE, ("a.json", b'{"label": "cat"}')]), 'a number under "label", got b\'{"label"'),
    (tar([("a.input.png", png(0)), PICTURE]), r"member 'a\.png': expected one picture of a key"),
    (tar([]), r"x\.tar: expected pictures in 1 shards, got none"),
    (b"", r"x\.tar: expected the header of a member at offset 0"),
    (png(0) * 9, "expected the header of a member at offset 0"),
    (tar(sample(0, 0))[:2048], r"x\.tar: the end mark: expected 512 bytes at offset 2048"),
    (tar(sample(0, 0))[:1500], "expected"),
]


@pytest.mark.parametrize(("data", "message"), SHARDS, ids=[m for _, m in SHARDS])
def test_shards_that_cannot_be_name_themselves(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened([write(tmp_path / "x.tar", data)])


def header(**changes: object) -> bytearray:
    info = tarfile.TarInfo("notes.txt")
    for name, value in changes.items():
        setattr(info, name, value)
    return bytearray(info.tobuf(tarfile.GNU_FORMAT))


@pytest.mark.parametrize(
    "size", [1 << 40, (1 << 63) - 1, -512, -1024], ids=["1 TiB", "2^63", "-512", "-1024"]
)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g"], ids=["file", "long", "pax", "global"])
def test_sizes_that_cannot_be(tmp_path: Path, size: int, kind: bytes) -> None:
    """Refused before memory is taken for them, and without an endless walk."""
    # after another member: tarfile itself stops where the first one leads back to the start
    block = header(size=0) + header(size=size, type=kind)
    with pytest.raises(DataError, match=r"x\.tar: .*expected"):
        opened([write(tmp_path / "x.tar", bytes(block) + bytes(4096))])


def test_a_header_that_is_none_ends_nothing_silently(tmp_path: Path) -> None:
    data = bytearray(tar(sample(0, 0) + sample(1, 1)))
    # the second picture's header; tarfile alone would stop there without a word
    data[2048 + 3] ^= 1
    with pytest.raises(DataError, match=r"member or the end mark at offset 2048"):
        opened([write(tmp_path / "x.tar", bytes(data))])


def test_classes_beyond_those_named(shards: str) -> None:
    with pytest.raises(
        DataError, match=r"000\.tar: expected classes in \[0, 2\), got 2 at its pic"
    ):
        opened(shards, classes=2)
    with pytest.raises(ValueError, match="classes: expected at least 1 or None, got 0"):
        opened(shards, classes=0)


def test_a_picture_that_cannot_be_read_names_shard_and_member(tmp_path: Path) -> None:
    members = [*sample(0, 0), ("b/7.png", b"not a picture"), ("b/7.cls", b"1")]
    found = opened([write(tmp_path / "x.tar", tar(members))])
    assert found.read([0])[0].equal(pixels(0))
    with pytest.raises(DataError, match=r"x\.tar: member 'b/7\.png' at offset \d+: not a picture"):
        found.read([1])
    with pytest.raises(DataError, match=r"x\.tar: member 'b/7\.png'"):
        list(stream_shards([tmp_path / "x.tar"], size=4, batch=1))


def test_damage_gives_data_or_an_error(tmp_path: Path) -> None:
    members = [member for i in range(3) for member in sample(i, i)]
    path, whole = tmp_path / "x.tar", tar(members, PAX)
    pictures, refused = [png(i) for i in range(3)], 0
    for seed in range(150):
        path.write_bytes(damaged(whole, seed))
        found = outcome(lambda: opened([path]))
        if isinstance(found, str):
            refused += 1
            continue
        assert len(found) <= 3
        for i in range(len(found)):
            assert len(found.encoded(i)) in [len(picture) for picture in pictures]
    assert refused >= 60


def test_truncation_never_changes_data(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.tar", tar(sample(0, 0) + sample(1, 1))
    end = 4 * 1024
    for length in range(0, len(whole), 256):
        path.write_bytes(whole[:length])
        found = outcome(lambda: opened([path]))
        assert isinstance(found, str) == (length < end + 512)
        if not isinstance(found, str):
            assert [found.encoded(i) for i in range(2)] == [png(0), png(1)]

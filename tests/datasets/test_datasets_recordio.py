"""RecordIO: against a literal writer of the format, and against damage."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch
from dataset_pictures import damaged, outcome, pixels, png, write
from literal_records import CLASSES, MAGIC, content, framed, insightface, lay_out
from torch import Tensor

from fused_losses.datasets import DataError, RecordIO, write_records
from fused_losses.datasets.files import StoredFile
from fused_losses.datasets.record_parts import read_record
from fused_losses.datasets.recordio import _first_identity


def opened(path: Path, **options: object) -> RecordIO:
    return RecordIO(path, size=(6, 5), cache=False, **options)


def check_faces(found: RecordIO) -> None:
    assert found.labels.tolist() == CLASSES and found.labels.dtype == torch.int64
    assert found.classes == 3 and found.names is None and len(found) == 6
    assert found.keys.tolist() == [1, 2, 3, 4, 5, 6]
    assert found.read([5, 0, 1]).equal(torch.stack([pixels(5), pixels(0), pixels(1)]))
    assert found.identities().tolist() == [[1, 3], [3, 4], [4, 7]]


@pytest.mark.parametrize("index", [True, False], ids=["idx", "scanned"])
def test_insightfaces_files(tmp_path: Path, index: bool) -> None:
    path = lay_out(tmp_path, insightface(), index)
    write(tmp_path / "property", b"3,112,112\n")
    check_faces(opened(path))
    check_faces(opened(tmp_path / "train"))


@pytest.mark.parametrize("index", [True, False], ids=["idx", "scanned"])
def test_record_zero_may_come_last(tmp_path: Path, index: bool) -> None:
    records = insightface()
    records[0] = records.pop(0)
    check_faces(opened(lay_out(tmp_path, records, index)))


def test_without_header_records_all_are_pictures(tmp_path: Path) -> None:
    records = {key: content(float(key % 2), key, png(key)) for key in (8, 0, 3)}
    found = opened(lay_out(tmp_path, records))
    assert found.keys.tolist() == [0, 3, 8] and found.labels.tolist() == [0, 1, 0]
    assert found.read([0, 1, 2]).equal(torch.stack([pixels(0), pixels(3), pixels(8)]))
    assert found.identities().shape == (0, 2)


def test_ids_that_are_all_zero_count_in_the_files_order(tmp_path: Path) -> None:
    records = {key: content(float(key), 0, png(key)) for key in range(3)}
    found = opened(lay_out(tmp_path, records, index=False))
    assert found.keys.tolist() == found.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("index", [True, False], ids=["idx", "scanned"])
@pytest.mark.parametrize("last", [0.0, 10.0])
def test_identities_that_are_not_there(tmp_path: Path, index: bool, last: float) -> None:
    """Record 0 says that there are none, or names those that the index leaves out."""
    records = {key: one for key, one in insightface().items() if key < 7}
    records[0] = content([7.0, last], 0, b"")
    found = opened(lay_out(tmp_path, records, index))
    assert found.keys.tolist() == [1, 2, 3, 4, 5, 6] and found.labels.tolist() == CLASSES
    assert found.read([5]).equal(pixels(5)[None]) and found.identities().shape == (0, 2)


def test_identities_that_the_index_leaves_out_are_passed_over(tmp_path: Path) -> None:
    path = lay_out(tmp_path, insightface())
    lines = (tmp_path / "train.idx").read_bytes().splitlines(keepends=True)
    write(tmp_path / "train.idx", b"".join(lines[:7]))
    found = opened(path)
    assert found.labels.tolist() == CLASSES and found.identities().shape == (0, 2)
    # some of them are damage
    write(tmp_path / "train.idx", b"".join(lines[:8]))
    with pytest.raises(DataError, match="key 8: expected a record, since key 0 counts to 10"):
        opened(path)


@pytest.mark.parametrize("text", [b"3,112.0,112", b" 3 , 112 , 96.5\n", b"3,112,112."])
def test_sides_in_a_property_may_be_floats(tmp_path: Path, text: bytes) -> None:
    path = lay_out(tmp_path, insightface())
    write(tmp_path / "property", text)
    assert opened(path).classes == 3


@pytest.mark.parametrize("name", ["train.rec", "train.idx", "property"])
def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    path = lay_out(tmp_path, insightface())
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}: expected a (regular file|file or nothing)"):
        opened(path)


def test_records_that_hold_too_much(tmp_path: Path) -> None:
    """Refused before memory is taken for them: the file is sparse, its parts are endless."""
    path = write(tmp_path / "x.rec", MAGIC + struct.pack("<I", (1 << 29) - 4) + bytes(24))
    os.truncate(path, (1 << 29) + 4)
    with pytest.raises(DataError, match=r"key 0: expected a record of at most 269484032 bytes"):
        opened(path)
    parts = MAGIC + struct.pack("<I", 1 << 29) + (MAGIC + struct.pack("<I", 2 << 29)) * 70000
    path = write(tmp_path / "y.rec", parts + MAGIC + struct.pack("<I", 3 << 29))
    with pytest.raises(DataError, match="expected a record of at most 65536 parts"):
        opened(path)
    labels = struct.pack("<IfQQ", 1 << 17, 0, 0, 0) + bytes(4 << 17) + b"x"
    with pytest.raises(DataError, match="expected at most 65536 labels .* got 131072"):
        opened(write(tmp_path / "z.rec", framed(labels)))
    with pytest.raises(ValueError, match="records: expected under 269484032 bytes each"):
        write_records(tmp_path / "w", [(bytes(1 << 29), 0)], size=(4, 4))


MAGICAL = {
    "at the start": MAGIC + b"abc",
    "at the end": b"abcd" + MAGIC,
    "twice on end": b"abcd" + MAGIC + MAGIC + b"x",
    "alone": MAGIC,
    "unaligned": b"a" + MAGIC + b"bcd" + MAGIC,
    "parts and a rest": b"abcd" + MAGIC + b"efghijkl" + MAGIC + b"mn",
    "overlapping an end": b"abcd" + MAGIC[:3],
}


@pytest.mark.parametrize("payload", MAGICAL.values(), ids=MAGICAL.keys())
def test_the_magic_inside_a_record(tmp_path: Path, payload: bytes) -> None:
    whole = content(4.0, 9, payload)
    path = write(tmp_path / "x.rec", framed(whole) + framed(content(5.0, 10, b"next")))
    record = read_record(StoredFile(path), 0, "x")
    assert (record.payload, record.labels, record.key) == (payload, (4.0,), 9)
    found = opened(path)
    assert [found.encoded(i) for i in (0, 1)] == [payload, b"next"]
    write_records(tmp_path / "out", [(payload, 0), (b"next", 0)], size=(6, 5))
    again = opened(tmp_path / "out.rec")
    assert [again.encoded(i) for i in (0, 1)] == [payload, b"next"]


def test_the_magic_inside_a_header(tmp_path: Path) -> None:
    key = struct.unpack("<Q", MAGIC + b"\0\0\0\0")[0]
    found = opened(write(tmp_path / "x.rec", framed(content(2.0, key, b"one"))))
    assert found.keys.tolist() == [key] and found.labels.tolist() == [2]
    assert found.encoded(0) == b"one"


def test_what_is_written_is_the_literal_layout(tmp_path: Path) -> None:
    pictures = [png(i) for i in range(5)] + [png(5)[:4] + MAGIC + png(5)]
    write_records(tmp_path / "train", zip(pictures, CLASSES, strict=True), size=(112, 96))
    records = insightface(pictures)
    records[2] = content(0.0, 2, pictures[1])
    expected = lay_out(tmp_path / "literal", records)
    for name in ("train.rec", "train.idx"):
        assert (tmp_path / name).read_bytes() == (expected.parent / name).read_bytes()
    assert (tmp_path / "property").read_text() == "3,112,96\n"
    assert sorted(os.listdir(tmp_path)) == [
        "literal",
        "property",
        "train.idx",
        "train.rec",
    ]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "pictures: expected at least one"),
        ([1], "expected class 0 or 0 at picture 0, got 1"),
        ([0, 2], "expected class 0 or 1 at picture 1, got 2"),
        ([0, 1, 0], "expected class 1 or 2 at picture 2, got 0"),
        ([-1], "at picture 0, got -1"),
    ],
)
def test_classes_are_written_in_order(tmp_path: Path, labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_records(tmp_path / "x", [(b"p", label) for label in labels], size=(4, 4))
    assert not list(tmp_path.iterdir())


def test_the_first_identity_is_found_where_float32_has_it_rounded(tmp_path: Path) -> None:
    path = lay_out(tmp_path, insightface())
    file = StoredFile(path)
    lines = (tmp_path / "train.idx").read_text().split()
    offsets = torch.tensor([int(field) for field in lines[1::2]])
    base = (1 << 26) + 99

    class Shifted:
        """Keys up to `base` are pictures, too."""

        def __len__(self) -> int:
            return base + len(offsets)

        def __getitem__(self, key: int) -> Tensor:
            return offsets[max(1, key - base)]

    # float32 has only every eighth integer there
    for rounded in range(base + 7 - 8, base + 7 + 9):
        assert _first_identity(file, Shifted(), rounded) == base + 7

    class Pictures(Shifted):
        """And no identities behind them."""

        def __len__(self) -> int:
            return base + 7

    for rounded in range(base + 7 - 8, base + 7 + 9):
        assert _first_identity(file, Pictures(), rounded) == base + 7


# ---- the side file ------------------------------------------------------------------------------


def test_labels_are_read_once(tmp_path: Path) -> None:
    path = lay_out(tmp_path, insightface())
    first = RecordIO(path, size=(6, 5))
    side = tmp_path / "train.rec.index"
    made = os.stat(side).st_mtime_ns
    check_faces(first)
    check_faces(RecordIO(path, size=(6, 5)))
    assert os.stat(side).st_mtime_ns == made
    write(tmp_path / "property", b"2,112,112")
    with pytest.raises(DataError, match="key 4: expected a class"):
        RecordIO(path, size=(6, 5))
    (tmp_path / "property").unlink()
    records = insightface()
    records[6] = content(3.0, 6, png(6))
    lay_out(tmp_path, records)
    os.utime(path, ns=(5, 5))
    assert RecordIO(path, size=(6, 5)).labels.tolist() == [0, 0, 1, 2, 2, 3]


# ---- damage -------------------------------------------------------------------------------------


def changed(key: int, one: bytes) -> dict[int, bytes]:
    return insightface() | {key: one}


RECORDS = [
    (changed(3, content(1.5, 3, b"x")), r"train.rec: key 3: expected a class in .*, got 1.5"),
    (changed(3, content(-1.0, 3, b"x")), "key 3: expected a class in .*, got -1.0"),
    (changed(3, content(float("nan"), 3, b"x")), "key 3: expected a class in .*, got nan"),
    (changed(3, content(float(1 << 24), 3, b"x")), "key 3: expected a class in"),
    (changed(3, content(1.0, 3, b"")), r"key 3: expected a picture .* offset \d+, got none"),
    (changed(3, b"short"), r"key 3: expected a header of 24 bytes .* offset \d+, got 5 bytes"),
    (
        changed(3, struct.pack("<IfQQ", 1 << 30, 0, 3, 0) + b"abcd"),
        r"key 3: expected 1073741824 labels in the record at offset \d+, which holds 28 bytes",
    ),
    (changed(0, content([7.0], 0, b"")), "key 0: expected the first and the last key"),
    (changed(0, content([0.0, 3.0], 0, b"")), "key 0: expected 1 <= first <= last"),
    (changed(0, content([8.0, 7.0], 0, b"")), "key 0: expected 1 <= first <= last"),
    (changed(0, content([7.0, 11.0], 0, b"")), "key 10: expected a record, .* to 11, got none"),
    (changed(0, content([1e30, 1e30], 0, b"")), "key 0: expected a key of identities"),
    (changed(0, content([1.0, 10.0], 0, b"")), "train.rec: expected pictures, got none"),
    ({k: v for k, v in insightface().items() if k != 5}, "key 5: expected a record"),
]


@pytest.mark.parametrize(("records", "message"), RECORDS, ids=[m for _, m in RECORDS])
def test_records_that_cannot_be_name_themselves(
    tmp_path: Path, records: dict[int, bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        opened(lay_out(tmp_path, records))


def test_identity_ranges_that_cannot_be(tmp_path: Path) -> None:
    for labels in ([5.0, 3.0], [1.0], [1.0, 99.0], 3.0):
        found = opened(lay_out(tmp_path, changed(8, content(labels, 8, b""))))
        with pytest.raises(DataError, match="key 8: expected"):
            found.identities()


LINES = [
    (b"x\t0\n", r"train.idx: line 1: expected a key and an offset, got b'x\\t0"),
    (b"1\n", "line 1: expected a key and an offset"),
    (b"1\t-4\n", "line 1: expected a key and an offset"),
    (b"1\t" + b"9" * 4000 + b"\n", "line 1: expected a key and an offset"),
    (b"1\t2\n", "line 1: key 1: expected an offset .* multiple of 4, got 2"),
    (b"1\t80000\n", r"line 1: key 1: expected an offset in train.rec \(\d+ bytes\)"),
    (b"9" * 30 + b"\t0\n", "line 1: expected a key"),
    (b"1\t0\n1\t0\n", "train.idx: expected distinct keys, got 1 more than once"),
    (b"", "train.idx: expected records, got none"),
    (b"1\t4\n", r"key 1: expected the magic 0xced7230a at offset 4, got 0x"),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[m for _, m in LINES])
def test_index_lines_that_cannot_be(tmp_path: Path, line: bytes, message: str) -> None:
    path = lay_out(tmp_path, insightface())
    write(tmp_path / "train.idx", line)
    with pytest.raises(DataError, match=message):
        opened(path)


FRAMES = [
    (b"", "train.rec: expected records, got none"),
    (MAGIC, "record 0 of the file: expected 8 bytes at offset 0"),
    (MAGIC + struct.pack("<I", 100) + b"x" * 50, "expected 100 bytes after offset 0"),
    (MAGIC + struct.pack("<I", 3 << 29), "expected part 0 or 1 at offset 0, got 3"),
    (MAGIC + struct.pack("<I", 4 << 29), "expected part 0 or 1 at offset 0, got 4"),
    (framed(bytes(30)) + b"junkjunk", "record 1 of the file: expected the magic .* offset 40"),
    (
        MAGIC + struct.pack("<I", 1 << 29) + framed(bytes(24)),
        "expected part 2 or 3 at offset 8, got 0",
    ),
    (MAGIC + struct.pack("<I", 1 << 29), "expected 8 bytes at offset 8"),
]


@pytest.mark.parametrize(("data", "message"), FRAMES, ids=[m for _, m in FRAMES])
def test_framing_that_cannot_be(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(write(tmp_path / "train.rec", data))


@pytest.mark.parametrize(
    "text", [b"", b"3,112", b"x,112,112", b"3.0,4,4", b"0,112,112", b"9" * 500]
)
def test_properties_that_cannot_be(tmp_path: Path, text: bytes) -> None:
    path = lay_out(tmp_path, insightface())
    write(tmp_path / "property", text)
    with pytest.raises(DataError, match="property: expected"):
        opened(path)


def test_a_missing_file_names_itself(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.rec: cannot be opened"):
        opened(tmp_path / "train")


@pytest.mark.parametrize("what", ["train.rec", "train.idx", "scanned"])
def test_damage_gives_data_or_an_error(tmp_path: Path, what: str) -> None:
    """Never another exception; records that the damage did not touch stay as they were."""
    pictures = [png(i) + MAGIC + b"tail" for i in range(6)]
    path = lay_out(tmp_path, insightface(pictures), index=what != "scanned")
    target = tmp_path / ("train.rec" if what == "scanned" else what)
    whole, sizes = target.read_bytes(), os.path.getsize(path)
    refused = changed_pictures = 0
    for seed in range(150):
        target.write_bytes(damaged(whole, seed))
        found = outcome(lambda: opened(path))
        if isinstance(found, str):
            refused += 1
            continue
        assert len(found) <= sizes // 8
        for i in range(len(found)):
            one = outcome(lambda i=i, found=found: found.encoded(i))
            changed_pictures += one not in pictures
    assert refused >= 60
    if what == "train.idx":
        # an offset points at a record or at none
        assert changed_pictures == 0


def test_truncation_never_changes_data(tmp_path: Path) -> None:
    pictures = [png(i) for i in range(6)]
    path = lay_out(tmp_path, insightface())
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        assert outcome(lambda: opened(path)) == "refused"
    # cut after the index was made: the pictures that are still there are the same
    path.write_bytes(whole)
    found = opened(path)
    os.truncate(path, len(whole) // 2)
    read = [outcome(lambda i=i: found.encoded(i)) for i in range(6)]
    assert read[0] == pictures[0] and read[5] == "refused"
    assert all(one in (picture, "refused") for one, picture in zip(read, pictures, strict=True))


def test_records_that_overlap_are_refused(tmp_path: Path) -> None:
    """An index of a million keys of one record would read it a million times."""
    path = lay_out(tmp_path, {key: content(0.0, key, png(key) + MAGIC * 3) for key in (1, 2)})
    write(tmp_path / "train.idx", b"".join(b"%d\t0\n" % key for key in range(1, 9)))
    with pytest.raises(DataError, match=r"rec: key [23]: expected records that do not overlap, th"):
        opened(path)

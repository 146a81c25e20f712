"""Copies of data sets: deep, pickled, in the workers of a DataLoader; each opens its files anew."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dataset_pictures import pixels, png, tar, write
from torch import Tensor
from torch.utils.data import DataLoader

from fused_losses.base.files import DataError
from fused_losses.datasets import (
    ImageFolders,
    RecordIO,
    TarShards,
    read_bin,
    write_records,
)
from fused_losses.datasets.base import EncodedImages
from fused_losses.datasets.files import StoredFile
from fused_losses.datasets.glyphs import Font, Glyphs

SIZE = (6, 5)
LABELS = [0, 0, 1]


def brighter(picture: Tensor) -> Tensor:
    return picture.float() + 1000


def records(folder: Path, first: int, **options: object) -> RecordIO:
    folder.mkdir(exist_ok=True)
    path = folder / "q.rec"
    write_records(path, [(png(first + i), label) for i, label in enumerate(LABELS)], size=SIZE)
    return RecordIO(path, size=SIZE, cache=False, **options)


def shards(folder: Path, first: int, **options: object) -> TarShards:
    members = [
        member
        for i, label in enumerate(LABELS)
        for member in ((f"{i}.png", png(first + i)), (f"{i}.cls", b"%d" % label))
    ]
    return TarShards([write(folder / "q.tar", tar(members))], size=SIZE, cache=False, **options)


def folders(folder: Path, first: int, **options: object) -> ImageFolders:
    for i, label in enumerate(LABELS):
        write(folder / "q" / str(label) / f"{i}.png", png(first + i))
    return ImageFolders(folder / "q", size=SIZE, **options)


def glyphs(folder: Path, first: int, **options: object) -> Glyphs:
    pictures = torch.stack([pixels(first + i, (5, 5))[:1] for i in range(3)])
    file = StoredFile(write(folder / "q.glyphs", pictures.numpy().tobytes()))
    columns = (torch.arange(3), torch.tensor(LABELS), torch.zeros(3, dtype=torch.int64))
    return Glyphs(file, 0, 5, *columns, ("a", "b"), (Font("f", "f", "f", 0),), (), **options)


def wanted(made: object, first: int) -> Tensor:
    if isinstance(made, Glyphs):
        return torch.stack([pixels(first + i, (5, 5))[:1] for i in range(3)])
    return torch.stack([pixels(first + i) for i in range(3)])


Make = Callable[..., EncodedImages | Glyphs]
SETS: dict[str, Make] = {
    "recordio": records,
    "tar": shards,
    "folders": folders,
    "glyphs": glyphs,
}
COPIES: dict[str, Callable[[object], object]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    **{f"pickle {p}": lambda made, p=p: pickle.loads(pickle.dumps(made, p)) for p in (2, 5)},
}
every_set = pytest.mark.parametrize("make", SETS.values(), ids=SETS.keys())


@every_set
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_outlives_what_it_was_made_from(
    tmp_path: Path, make: Make, copied: Callable
) -> None:
    """The number of a descriptor goes to whatever is opened next, when the first set is gone."""
    one = make(tmp_path / "one", 0)
    one.read([0])
    two = copied(one)
    del one
    other = make(tmp_path / "other", 50)
    assert two.read([0, 1, 2]).equal(wanted(two, 0))
    assert other.read([0, 1, 2]).equal(wanted(other, 50))
    assert two.labels.tolist() == LABELS


# each picture of a folder is a file of its own, opened whenever it is read
@pytest.mark.parametrize("make", [records, shards, glyphs])
def test_a_copy_of_a_file_that_has_changed_is_refused(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = make(Path(), 0)
    kept = pickle.dumps(one)
    # a set that is open goes on from another folder, and so does its copy
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    if make is not shards:
        assert pickle.loads(kept).read([0]).equal(one.read([0]))
    monkeypatch.chdir(tmp_path)
    make(Path(), 50)
    (path,) = tmp_path.glob("q.[rtg]*")
    os.utime(path, ns=(5, 5))
    with pytest.raises(DataError, match=r"q\.\w+: expected the file as it was when .* got \d+ byt"):
        pickle.loads(kept).read([0])
    path.unlink()
    with pytest.raises(DataError, match=r"q\.\w+: cannot be opened"):
        pickle.loads(kept).read([0])


def test_shards_that_change_behind_an_open_set(tmp_path: Path) -> None:
    """At most some are open at a time: those opened later must be what was indexed."""
    found = shards(tmp_path, 0)
    shards(tmp_path, 50)
    os.utime(tmp_path / "q.tar", ns=(5, 5))
    with pytest.raises(DataError, match=r"q\.tar: expected the file as it was when the set was op"):
        found.read([0])


def test_verification_sets_are_copied_with_their_pictures(tmp_path: Path) -> None:
    path = write(tmp_path / "x.bin", pickle.dumps(([png(0), png(1)], [True])))
    one = read_bin(path)
    path.unlink()
    for copied in COPIES.values():
        two = copied(one)
        assert two.read([1, 0], SIZE).equal(torch.stack([pixels(1), pixels(0)]))
        assert two.same.tolist() == [True]


@every_set
def test_a_set_is_indexed_and_looped_over(tmp_path: Path, make: Make) -> None:
    plain = make(tmp_path / "plain", 0)
    changed = make(tmp_path / "changed", 0, transform=brighter)
    expected = wanted(plain, 0)
    assert [label for _, label in plain] == LABELS and type(plain[1][1]) is int
    assert torch.stack([picture for picture, _ in plain]).equal(expected)
    picture, label = changed[2]
    assert picture.equal(expected[2].float() + 1000) and label == 1
    assert changed.read([2]).equal(expected[2:])
    for index in (3, -1):
        with pytest.raises(IndexError, match=rf"expected values in \[0, 3\), got {index}"):
            plain[index]
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        plain[0.5]


def test_a_transform_is_a_function(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="transform: expected a function of a picture .*, got str"):
        folders(tmp_path, 0, transform="flip")


def test_a_dataloader_reads_in_this_process_and_in_forked_ones(tmp_path: Path) -> None:
    for make in SETS.values():
        made = make(tmp_path, 0, transform=brighter)
        made.read([0])
        for workers in (0, 1):
            loader = DataLoader(
                made,
                batch_size=2,
                num_workers=workers,
                multiprocessing_context="fork" if workers else None,
            )
            batches = list(loader)
            assert torch.cat([pictures for pictures, _ in batches]).equal(wanted(made, 0) + 1000.0)
            assert torch.cat([labels for _, labels in batches]).tolist() == LABELS


@pytest.mark.processes
@pytest.mark.slow
def test_a_dataloader_reads_in_spawned_processes(tmp_path: Path) -> None:
    """One worker reads from all sets: each start of one imports PyTorch anew."""
    everything = torch.utils.data.ConcatDataset(
        [make(tmp_path, 0, transform=brighter) for make in SETS.values() if make is not glyphs]
    )
    loader = DataLoader(everything, batch_size=9, num_workers=1, multiprocessing_context="spawn")
    ((pictures, labels),) = loader
    assert pictures.equal(wanted(None, 0).repeat(3, 1, 1, 1) + 1000.0)
    assert labels.tolist() == LABELS * 3

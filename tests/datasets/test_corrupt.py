"""Pictures that can't be read: the run ends at the first, or goes on and says which they were."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from dataset_pictures import pixels, png, tar, write

from fused_losses.base.files import DataError
from fused_losses.datasets import (
    EpochBatches,
    ImageFolders,
    PrefetchReader,
    RecordIO,
    TarShards,
    stream_shards,
    write_records,
)

LABELS = [0, 0, 1, 1, 2]
BROKEN = (1, 4)  # of the pictures
STANDS_IN = [0, 2, 2, 3, 0]  # what is read at each index
SIZE = (6, 5)


def data(number: int) -> bytes:
    return png(number)[:50] if number in BROKEN else png(number)


def folders(folder: Path, **options: object) -> ImageFolders:
    for i, label in enumerate(LABELS):
        write(folder / str(label) / f"{i}.png", data(i))
    return ImageFolders(folder, size=SIZE, **options)


def records(folder: Path, **options: object) -> RecordIO:
    write_records(folder / "q.rec", [(data(i), l) for i, l in enumerate(LABELS)], size=SIZE)
    return RecordIO(folder / "q.rec", size=SIZE, cache=False, **options)


def shards(folder: Path, **options: object) -> TarShards:
    members = [
        member
        for i, label in enumerate(LABELS)
        for member in ((f"{i}.png", data(i)), (f"{i}.cls", b"%d" % label))
    ]
    return TarShards([write(folder / "q.tar", tar(members))], size=SIZE, cache=False, **options)


every_set = pytest.mark.parametrize("make", [folders, records, shards])


@every_set
def test_the_first_ends_the_run(tmp_path: Path, make: object) -> None:
    found = make(tmp_path)
    for read in (lambda: found.read([0, 1]), lambda: found.read_whole([1]), lambda: found[1]):
        with pytest.raises(DataError, match="not a picture that can be read"):
            read()
    sampler = EpochBatches(5, 5, seed=0)
    with PrefetchReader(found, sampler, stop=1) as batches, pytest.raises(DataError):
        next(batches)
    assert found.skipped == {}


@every_set
def test_others_stand_in_and_the_set_says_for_which(tmp_path: Path, make: object) -> None:
    found = make(tmp_path, corrupt="skip")
    with pytest.warns(UserWarning, match="passed over: .*not a picture that can be read") as told:
        pictures, indices = found.read_whole(range(5))
    assert indices.tolist() == STANDS_IN and len(told) == len(BROKEN)
    assert pictures.equal(torch.stack([pixels(i) for i in STANDS_IN]))
    assert sorted(found.skipped) == list(BROKEN)
    for place, reason in found.skipped.items():
        assert reason.startswith(found.where(place))
    # once is enough: those known are not tried again
    assert [label for _, label in found] == [LABELS[i] for i in STANDS_IN]
    assert found[4][0].equal(pixels(0))
    # what asks for this very picture is told
    with pytest.raises(DataError, match="not a picture"):
        found.read([1])
    assert copy.deepcopy(found).skipped == found.skipped


@every_set
def test_batches_have_the_labels_of_what_was_read(tmp_path: Path, make: object) -> None:
    found = make(tmp_path, corrupt="skip")
    sampler = EpochBatches(5, 3, seed=1)
    with pytest.warns(UserWarning), PrefetchReader(found, sampler, stop=2) as batches:
        for batch in batches:
            asked = sampler.batch(batch.step).tolist()
            assert batch.indices.tolist() == [STANDS_IN[i] for i in asked]
            assert batch.images.equal(torch.stack([pixels(int(i)) for i in batch.indices]))
            assert batch.labels.tolist() == [LABELS[i] for i in batch.indices]
    assert sorted(found.skipped) == list(BROKEN)


def test_streams_leave_them_out(tmp_path: Path) -> None:
    shards(tmp_path)
    options = {"size": SIZE, "batch": 9, "cache": False}
    with pytest.raises(DataError, match=r"member '1\.png' at offset \d+: not a picture"):
        list(stream_shards([tmp_path / "q.tar"], **options))
    with pytest.warns(UserWarning, match=r"passed over: .*member '\d\.png'") as told:
        ((pictures, labels),) = stream_shards([tmp_path / "q.tar"], corrupt="skip", **options)
    assert len(told) == 2 and labels.tolist() == [0, 1, 1]
    assert pictures.equal(torch.stack([pixels(i) for i in (0, 2, 3)]))


def test_a_set_without_readable_pictures_is_no_accident(tmp_path: Path) -> None:
    for i in range(70):
        write(tmp_path / "a" / f"{i:02d}.png", b"x" if i < 68 else png(i))
    found = ImageFolders(tmp_path, size=SIZE, corrupt="skip")
    told = r"00\.png: expected a picture that can be read among it and the 63 after it; the last re"
    with pytest.warns(UserWarning), pytest.raises(DataError, match=told):
        found.read_whole([0])
    assert len(found.skipped) == 64
    with pytest.warns(UserWarning):
        assert found.read_whole([64])[1].tolist() == [68]


def test_the_choice_is_one_of_two(tmp_path: Path) -> None:
    for make in (folders, records, shards):
        with pytest.raises(ValueError, match='corrupt: expected "raise" or "skip", got \'drop\''):
            make(tmp_path, corrupt="drop")
    with pytest.raises(ValueError, match='corrupt: expected "raise" or "skip"'):
        stream_shards([tmp_path / "q.tar"], size=SIZE, batch=1, corrupt=None)

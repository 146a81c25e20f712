"""insightface's files as people have them: numpy in them, old formats, damage, lies."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from dataset_pictures import damaged
from torch_files import DEEP, LONG, pickle_of, rewritten

from fused_losses.base.files import DataError
from fused_losses.centers import ClassCenters
from fused_losses.centers.insightface import InsightFaceTable, import_checkpoints

CLASSES, DIM = 5, 3


def saved(**changes: object) -> dict[str, object]:
    """What a rank saves, after two steps of SGD."""
    weight = torch.arange(CLASSES * DIM, dtype=torch.float32).view(CLASSES, DIM)
    state = {"state": {1: {"momentum_buffer": weight + 100}}, "param_groups": [{"params": [0, 1]}]}
    return {
        "epoch": 0,
        "global_step": 2,
        "state_dict_softmax_fc": {"weight": weight},
        "state_optimizer": state,
    } | changes


def file_of(folder: Path, content: object, **options: object) -> Path:
    path = folder / "checkpoint_gpu_0.pt"
    torch.save(content, path, **options)
    return path


def check(read: InsightFaceTable, step: int = 2) -> None:
    weight = saved()["state_dict_softmax_fc"]["weight"]
    assert (read.num_classes, read.dim, read.step) == (CLASSES, DIM, step)
    assert read.rows(0, CLASSES).equal(weight)
    assert read.rows(1, 4, "momentum_buffer").equal(weight[1:4] + 100)


NUMPY = [
    numpy.float64(0.1),
    numpy.float32(0.1),
    numpy.int64(-3),
    numpy.bool_(True),
    numpy.str_("cosine"),
    numpy.datetime64("2026-01-01"),
    numpy.complex64(1),
    numpy.arange(6).reshape(2, 3),
    numpy.array(["a", "b"]),
    numpy.float32([1, 2]).astype(">f4"),
]


@pytest.mark.parametrize("value", NUMPY, ids=lambda value: str(value.dtype))
@pytest.mark.parametrize("legacy", [False, True])
def test_numpy_anywhere(tmp_path: Path, value: object, legacy: bool) -> None:
    content = saved(best={"acc": [value, value]}, lr=value)
    content["state_optimizer"]["param_groups"][0]["lr"] = value
    path = file_of(tmp_path, content, _use_new_zipfile_serialization=not legacy)
    check(InsightFaceTable(tmp_path))
    if legacy:
        # numpy 1 has another name for the module
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
        check(InsightFaceTable(tmp_path))


@pytest.mark.parametrize("kind", ["<i8", ">i8", "<i4", "u2", "i1"])
def test_a_step_of_numpy(tmp_path: Path, kind: str) -> None:
    step = numpy.array(77).astype(kind)[()]
    file_of(tmp_path, saved(global_step=step))
    check(InsightFaceTable(tmp_path), step=77)


@pytest.mark.parametrize("step", [-1, 1 << 63, 2.0, "2", True, [2], numpy.float64(2)])
def test_steps_that_cannot_be(tmp_path: Path, step: object) -> None:
    file_of(tmp_path, saved(global_step=step))
    with pytest.raises(DataError, match=r"gpu_0\.pt: global_step: expected an integer in"):
        InsightFaceTable(tmp_path)


def test_the_legacy_format(tmp_path: Path) -> None:
    path = file_of(tmp_path, saved(), _use_new_zipfile_serialization=False)
    check(InsightFaceTable(tmp_path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"gpu_0\.pt: not a file of tensors that can be read"):
        InsightFaceTable(tmp_path)


def test_a_reason_is_said_whole(tmp_path: Path) -> None:
    file_of(tmp_path, saved(arguments=re.compile("x")))
    with pytest.raises(DataError, match="GLOBAL re._compile was not an allowed") as told:
        InsightFaceTable(tmp_path)
    assert "add_safe_globals" not in str(told.value) and "\n" not in str(told.value)


def test_another_number_of_classes_says_how_to_go_on(tmp_path: Path) -> None:
    file_of(tmp_path, saved())
    head = ClassCenters(7, DIM, margin=None, optimizer="sgd")
    told = r"expected a weight of shape \(5, 3\) .*\(7, 3\).* resize=True .* another number of "
    told += "classes than 5"
    with pytest.raises(ValueError, match=told):
        import_checkpoints(tmp_path, head)


@pytest.mark.parametrize("name", ["weight", "momentum_buffer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    """Before the head is written."""
    content = saved()
    table = content["state_dict_softmax_fc"]["weight"]
    if name != "weight":
        table = content["state_optimizer"]["state"][1][name]
    table[3, 1] = value
    file_of(tmp_path, content)
    read = InsightFaceTable(tmp_path)
    told = rf"gpu_0\.pt: {name}: expected finite numbers, got others in row 3, which is class 3"
    with pytest.raises(DataError, match=told):
        read.rows(0, CLASSES, name)
    assert read.rows(0, 3, name).isfinite().all()
    options = {"lr": 0.1, "momentum": 0.9}
    head = ClassCenters(CLASSES, DIM, margin=None, optimizer="sgd", optimizer_options=options)
    before = {key: value.clone() for key, value in head.state().items()}
    with pytest.raises(DataError, match=told):
        import_checkpoints(tmp_path, head)
    assert all(head.state()[key].equal(value) for key, value in before.items())


def test_an_optimiser_does_not_replace_the_table(tmp_path: Path) -> None:
    content = saved()
    content["state_optimizer"]["state"][1]["weight"] = torch.zeros(CLASSES, DIM)
    file_of(tmp_path, content)
    with pytest.raises(DataError, match="state_optimizer: expected states .* called 'weight'"):
        InsightFaceTable(tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {"state": {}, "param_groups": []},
        {"state": {1: [2]}, "param_groups": [{"params": [1]}]},
        {"state": {1: {"a": torch.zeros(2)}}, "param_groups": [{"params": [[1]]}]},
        {"state": 3, "param_groups": "ab"},
    ],
)
def test_an_optimiser_of_another_make_is_passed_over(tmp_path: Path, state: object) -> None:
    file_of(tmp_path, saved(state_optimizer=state))
    assert InsightFaceTable(tmp_path).names == ("weight",)


@pytest.mark.filterwarnings("ignore")  # torch on its own sparse and quantised tensors
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 3).to_sparse(),
        torch.zeros(2, 3, device="meta"),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.qint8),
        torch.zeros(2, 0),
        torch.zeros(2),
        [[1.0]],
    ],
    ids=["sparse", "meta", "complex", "integers", "quantised", "narrow", "vector", "list"],
)
def test_tables_that_are_none(tmp_path: Path, weight: object) -> None:
    file_of(tmp_path, saved(state_dict_softmax_fc={"weight": weight}))
    with pytest.raises(DataError, match=r"gpu_0\.pt: "):
        InsightFaceTable(tmp_path)


def test_packed_and_huge_archives_are_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, saved())
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in parts if name.endswith("data.pkl"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(pickled, bytes(1 << 24))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(DataError, match="data.pkl: expected a stored part, not a packed one"):
        InsightFaceTable(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(pickled, bytes((1 << 26) + 1))
    with pytest.raises(DataError, match="data.pkl: expected at most 67108864 bytes, got 67108865"):
        InsightFaceTable(tmp_path)


def test_what_would_take_hours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_losses.base.saved.MAX_STEPS", 2000)
    for pickled, told in ((DEEP, "tuples of at most"), (LONG, "at most 2000 instructions")):
        rewritten(file_of(tmp_path, saved()), pickled)
        with pytest.raises(DataError, match=rf"gpu_0\.pt: .*data\.pkl: expected {told}"):
            InsightFaceTable(tmp_path)
        # the format before torch 1.6 begins with pickles, the content is the fourth
        path = file_of(tmp_path, saved(), _use_new_zipfile_serialization=False)
        start = path.read_bytes().index(b"}", 200)
        path.write_bytes(path.read_bytes()[:start] + pickled[2:])
        with pytest.raises(DataError, match=rf"gpu_0\.pt: pickle at offset \d+: expected {told}"):
            InsightFaceTable(tmp_path)


def test_a_table_of_more_rows_than_are_stored_is_refused(tmp_path: Path) -> None:
    weight = torch.zeros(1, DIM).expand(1 << 40, DIM)
    file_of(tmp_path, saved(state_dict_softmax_fc={"weight": weight}))
    with pytest.raises(DataError, match=r"weight.*: expected a tensor of the bytes that are sto"):
        InsightFaceTable(tmp_path)


def test_a_step_of_thousands_of_digits(tmp_path: Path) -> None:
    path = file_of(tmp_path, saved(global_step=numpy.int64(2)))
    pickled = pickle_of(path)
    bytes_of_2 = b"X\x08\x00\x00\x00" + (2).to_bytes(8, "little")
    assert bytes_of_2 in pickled
    rewritten(path, pickled.replace(bytes_of_2, b"X\x88\x13\x00\x00" + b"A" * 5000))
    with pytest.raises(DataError, match=r"gpu_0\.pt: global_step: expected an integer in"):
        InsightFaceTable(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_damage_gives_data_or_an_error(tmp_path: Path, legacy: bool) -> None:
    path = file_of(tmp_path, saved(), _use_new_zipfile_serialization=not legacy)
    whole, refused = path.read_bytes(), 0
    for seed in range(200):
        path.write_bytes(damaged(whole, seed))
        try:
            read = InsightFaceTable(path.parent)
            for name in read.names:
                read.rows(0, min(read.num_classes, 100), name)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= 80

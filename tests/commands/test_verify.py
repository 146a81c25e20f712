"""`fused-losses verify`: what has one right answer, and the rows that the table must name."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_losses import cli, functional
from fused_losses.base import records
from fused_losses.base.disturbance import distance
from fused_losses.base.examples import TABLE
from fused_losses.primitives.distances import inputs as distances_inputs
from fused_losses.primitives.row_statistics import triton as row_statistics
from fused_losses.verify import command, forms
from fused_losses.verify import table as verify


def only(
    monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[Tensor], Tensor]
) -> list[verify.Row]:
    """The table of one row, whose answers are spoilt but those of the reference."""
    right = TABLE[name]

    def compared(result: Any) -> Tensor:
        return right.value(result) if right.value else result

    def spoilt(*args: Any, backend: str, **options: Any) -> Tensor:
        found = compared(right.function(*args, backend=backend, **options))
        return found if backend == "reference" else spoil(found)

    spoilt.__signature__ = inspect.signature(right.function)  # it takes what the function takes
    monkeypatch.setattr(verify, "TABLE", {name: replace(right, function=spoilt, value=None)})
    return list(verify.rows())


def test_every_public_function_has_an_example() -> None:
    known = {example.function for example in TABLE.values()}
    public = (getattr(functional, name) for name in functional.__all__)
    assert {f for f in public if not isinstance(f, type)} <= known


def test_the_table_names_every_kind_of_distance() -> None:
    assert {f"distances, {kind}" for kind in distances_inputs.KINDS} <= set(TABLE)


@pytest.mark.parametrize("name", ["topk, dot", "topk, own rows", "mine_triplets"])
def test_one_wrong_index_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(found: Tensor) -> Tensor:
        found = found.clone()
        found[0, 0] += 1
        return found

    assert all(row.passed and row.error == 0 for row in only(monkeypatch, name, lambda t: t))
    table = only(monkeypatch, name, wrong)
    assert table and not any(row.passed for row in table)


def test_another_shape_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    table = only(monkeypatch, "mine_triplets", lambda found: found[1:])
    assert table and not any(row.passed for row in table)


def test_a_wrong_count_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    table = only(
        monkeypatch,
        "distances, jaccard",
        lambda found: torch.where(found == found.max(), found + 1e-3, found),
    )
    assert table and not any(row.passed for row in table)


class SpoiltGradient(torch.autograd.Function):
    """The value as it is, its gradient by a function."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.spoil = spoil
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.spoil(grad), None


@pytest.mark.parametrize("name", ["info_nce", "multi_similarity", "kernel_mean", "SFace"])
def test_gradients_that_are_nan_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(found: Tensor) -> Tensor:
        return SpoiltGradient.apply(found, lambda grad: grad * torch.nan)

    table = only(monkeypatch, name, spoil)
    assert table and not any(row.passed for row in table)


SLOW = pytest.param("fast_ap", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["info_nce", "circle", "contrastive", "histogram", SLOW])
def test_a_bound_is_neither_below_honest_results_nor_empty(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(row.passed for row in only(monkeypatch, name, lambda found: found))
    # half a percent in a gradient is no rounding of float32
    spoil = lambda found: SpoiltGradient.apply(found, lambda grad: grad * 1.005)
    table = [row for row in only(monkeypatch, name, spoil) if row.dtype == "float32/fp32"]
    assert table and not any(row.passed for row in table)


def test_the_last_line_says_how_many_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    passing, failing = (
        verify.Row("circle", "cpu", "float32/fp32", (1, 2, 3), error, 1e-6)
        for error in (1e-7, float("nan"))
    )
    for table, last, status in (
        ([passing, passing], "2 passed, 0 failed", 0),
        ([passing, failing], "1 passed, 1 failed", 1),
        ([], "0 passed, 0 failed", 1),
    ):
        monkeypatch.setattr(verify, "rows", lambda table=table, **_: iter(table))
        said: list[str] = []
        assert command.run(said.append) == status
        assert said[-1] == last


def test_what_one_tensor_has_and_the_other_not_is_infinitely_far() -> None:
    inf, nan = torch.inf, torch.nan
    for got, want in ((nan, 1.0), (inf, 1.0), (1.0, nan), (-inf, inf), (nan, inf)):
        assert distance(torch.tensor([0.0, got]), torch.tensor([0.0, want])) == inf
    for both in (nan, inf, -inf, 2.0):
        assert distance(torch.tensor([both]), torch.tensor([both])) == 0


# ---- the command --------------------------------------------------------------------------------


def spoilt(monkeypatch: pytest.MonkeyPatch, name: str, run: Callable[..., Any]) -> None:
    """The table of one row, whose function is run."""
    right = TABLE[name]
    wrapped = lambda *args, **options: run(right.function, *args, **options)
    wrapped.__signature__ = inspect.signature(right.function)
    monkeypatch.setattr(verify, "TABLE", {name: replace(right, function=wrapped)})


def asked(**options: Any) -> tuple[int, list[str]]:
    """What `fused-losses verify` says of a small shape in float32."""
    said: list[str] = []
    chosen = verify.Chosen(dtypes=(torch.float32,), **options.pop("chosen", {}))
    status = command.run(said.append, "cpu", [(5, 7, 4)], chosen=chosen, **options)
    return status, said


def test_a_call_that_raises_is_a_row_that_fails(monkeypatch, tmp_path: Path) -> None:
    def breaks(function: Callable[..., Any], *args: Any, backend: str, **options: Any) -> Any:
        if backend == "bounded":
            raise ZeroDivisionError("by nothing\nand more")
        return function(*args, backend=backend, **options)

    spoilt(monkeypatch, "linear_cross_entropy", breaks)
    out = tmp_path / "of" / "it.jsonl"
    status, said = asked(out=out, chosen=dict(backends=("cpu", "bounded")))
    assert status == 1
    lines = [line for line in said if line.startswith("linear_cross_entropy")]
    assert [("FAIL" in line, "ZeroDivisionError: by nothing" in line) for line in lines] == [
        (" bounded " in line,) * 2 for line in lines
    ]
    assert {line.split()[1] for line in lines} == {"cpu", "bounded"}
    first, *rows, last = records.JsonLines(out)
    assert "machine" in first and last["ended"] == "whole" and last["failed_rows"] == 1
    assert [row["passed"] for row in rows] == [row["backend"] == "cpu" for row in rows]
    assert "FAIL ZeroDivisionError: by nothing |" in out.with_suffix(".md").read_text()


def test_truth_that_raises_fails_and_nothing_ends(monkeypatch) -> None:
    def breaks(function: Callable[..., Any], *args: Any, backend: str, **options: Any) -> Any:
        if backend == "reference":
            raise MemoryError
        return function(*args, backend=backend, **options)

    spoilt(monkeypatch, "linear_cross_entropy", breaks)
    status, said = asked()
    assert status == 1 and said[-1] == "0 passed, 1 failed"
    assert any(" reference " in line and "FAIL MemoryError" in line for line in said)


def test_rows_are_on_the_disk_before_the_next_is_known(monkeypatch, tmp_path: Path) -> None:
    out, seen = tmp_path / "it.jsonl", []

    def looks(function: Callable[..., Any], *args: Any, backend: str, **options: Any) -> Any:
        if backend == "bounded":
            seen.append([e["backend"] for e in records.JsonLines(out) if "backend" in e])
        return function(*args, backend=backend, **options)

    spoilt(monkeypatch, "linear_cross_entropy", looks)
    assert asked(out=out, chosen=dict(backends=("cpu", "bounded")))[0] == 0
    assert seen[0] and set(seen[0]) == {"cpu"}


def test_a_device_that_is_lost_ends_the_table_with_its_row(monkeypatch, tmp_path: Path) -> None:
    def gone(device: object = None) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    step = verify.VerifyStep(TABLE["circle"], torch.device("cuda"), (1, 2, 3))
    with pytest.raises(verify.DeviceLost, match="after circle on cuda.*KeyError: 'k'") as lost:
        verify._failed(step, "cuda", "float32/fp32", KeyError("k"))

    def rows(**_: object) -> Iterator[verify.Row]:
        yield verify.Row("circle", "cuda", "float32/fp32", (1, 2, 3), 0.0, 1.0)
        raise lost.value

    monkeypatch.setattr(verify, "rows", rows)
    status, said = asked(out=tmp_path / "it.jsonl")
    assert status == 1 and said[-2] == "1 passed, 1 failed"
    assert "what comes after this row was not checked" in said[-1]
    *_, row, end = records.JsonLines(tmp_path / "it.jsonl")
    assert row["note"] == "KeyError: 'k'" and "takes no more work" in end["ended"]


def test_the_table_is_narrowed() -> None:
    chosen = verify.Chosen(("info_nce", "topk, dot"), ("bounded",), (torch.bfloat16,))
    names = [step.example.name for step in verify.steps(("cpu",), None, chosen)]
    assert "info_nce, symmetric" in names and "topk, dot" in names and "topk, cosine" not in names
    assert not any(name.startswith("nested_info_nce") for name in names)
    one = chosen._replace(ops=("linear_cross_entropy",))
    found = list(verify.rows(on=("cpu",), shapes=[(5, 7, 4)], chosen=one))
    assert found and {(r.backend, r.dtype.partition("/")[0]) for r in found} == {
        ("bounded", "bfloat16")
    }


def test_a_gpu_is_given_the_shapes_of_other_forms(monkeypatch) -> None:
    properties = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = {(s.example.name, s.shape, s.dtypes, s.room) for s in verify.steps(("cuda",))}
    for form in forms.forms(3):
        assert (form.example, form.shape, (form.dtype,), form.room) in found
    assert ("linear_cross_entropy", (130, 229, 128), (torch.bfloat16,), None) in found
    assert {s.shape for s in verify.steps(("cuda",), [(5, 7, 4)])} == {(5, 7, 4)}


def test_little_room_is_for_one_call() -> None:
    usual = row_statistics.PARTIAL_BYTES
    with (
        pytest.raises(ZeroDivisionError),
        forms.within(forms.LittleRoom("primitives.row_statistics.triton", "PARTIAL_BYTES", 1)),
    ):
        assert row_statistics.PARTIAL_BYTES == 1
        raise ZeroDivisionError
    assert row_statistics.PARTIAL_BYTES == usual > 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--op info_nc", "argument --op: no row of the table is named 'info_nc'; did you mean"),
        ("--shape 3,4", "argument --shape: expected three sizes N,C,D from 1 on, got '3,4'"),
        ("--shape 3,4,0", "argument --shape: expected three sizes"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--backend gpu", "argument --backend: invalid choice: 'gpu'"),
    ],
)
def test_a_wrong_option_is_named(options: str, told: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", *options.split()])
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_the_status_is_on_a_terminal_alone() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), "\r\x1b[2K3 of 9"), (io.StringIO(), "")):
        records.StatusLine(stream).show("3 of 9")
        assert stream.getvalue() == shown

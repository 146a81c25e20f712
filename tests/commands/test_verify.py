"""`fused-losses verify`: what has one right answer, and the rows that the table must name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_losses import functional, verify
from fused_losses.base.disturbance import distance
from fused_losses.base.examples import TABLE
from fused_losses.primitives.distances import inputs as distances_inputs


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
        monkeypatch.setattr(verify, "rows", lambda on, shapes, table=table: iter(table))
        said: list[str] = []
        assert verify.run(said.append) == status
        assert said[-1] == last


def test_what_one_tensor_has_and_the_other_not_is_infinitely_far() -> None:
    inf, nan = torch.inf, torch.nan
    for got, want in ((nan, 1.0), (inf, 1.0), (1.0, nan), (-inf, inf), (nan, inf)):
        assert distance(torch.tensor([0.0, got]), torch.tensor([0.0, want])) == inf
    for both in (nan, inf, -inf, 2.0):
        assert distance(torch.tensor([both]), torch.tensor([both])) == 0

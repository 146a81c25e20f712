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
from fused_losses.base.examples import TABLE
from fused_losses.primitives.distances import inputs as distances_inputs


def only(
    monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[Tensor], Tensor]
) -> list[verify.Row]:
    """The table of one exact row, whose answers are spoilt but those of the reference."""
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
    assert {row.bound for row in TABLE.values()} <= {*verify.ROOM, "unjudged"}


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

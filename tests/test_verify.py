"""`fused-losses verify`: what has one right answer, and the ops that the table must name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_losses import verify
from fused_losses.primitives.distances import inputs as distances_inputs

Op = Callable[..., Tensor]


def only(monkeypatch: pytest.MonkeyPatch, name: str, op: Op) -> list[verify.Row]:
    """The table of one exact op, which stands in the place of the right one."""
    right = verify.EXACT[name]

    def told(x: Tensor, w: Tensor, y: Tensor, backend: str) -> Tensor:
        return (right if backend == "reference" else op)(x, w, y, backend=backend)

    monkeypatch.setattr(verify, "OPS", {})
    monkeypatch.setattr(verify, "EXACT", {name: told})
    return list(verify.rows())


def test_the_table_names_every_kind_of_distance() -> None:
    named = {*verify.OPS, *verify.EXACT}
    assert {f"distances, {kind}" for kind in distances_inputs.KINDS} <= named
    assert set(verify.JUMPS) <= set(verify.OPS)


@pytest.mark.parametrize("name", ["topk, dot", "topk, own rows", "batch-hard mining"])
def test_one_wrong_index_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify.EXACT[name]

    def wrong(*inputs: Tensor, backend: str) -> Tensor:
        found = right(*inputs, backend=backend).clone()
        found[0, 0] += 1
        return found

    assert all(row.passed and row.error == 0 for row in only(monkeypatch, name, right))
    table = only(monkeypatch, name, wrong)
    assert table and not any(row.passed for row in table)


def test_another_shape_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify.EXACT["batch-hard mining"]
    table = only(
        monkeypatch,
        "batch-hard mining",
        lambda *inputs, backend: right(*inputs, backend=backend)[1:],
    )
    assert table and not any(row.passed for row in table)


def test_a_wrong_count_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify.EXACT["distances, jaccard"]

    def wrong(*inputs: Tensor, backend: str) -> Tensor:
        found = right(*inputs, backend=backend)
        return torch.where(found == found.max(), found + 1e-3, found)

    table = only(monkeypatch, "distances, jaccard", wrong)
    assert table and not any(row.passed for row in table)

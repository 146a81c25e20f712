"""The extreme positive and negative of each row: the columns, and what is missing or NaN."""

from __future__ import annotations

import pytest
import torch
from conftest import require
from torch import Tensor

from fused_losses.primitives.topk import extremes as module
from fused_losses.primitives.topk.extremes import Extremes, extremes


def formula(
    x: Tensor, y: Tensor, numbers: tuple[Tensor, Tensor], kind: str, largest: tuple, own: bool
) -> tuple[Tensor, Tensor]:
    """Columns [2 N] (0 over none) and found [N], from the matrix in float64."""
    x, y = (t.double().nan_to_num(0) for t in (x, y))
    score = x @ y.T if kind == "dot" else (x[:, None] - y).square().sum(2)
    same = numbers[0][:, None] == numbers[1]
    one = torch.eye(*same.shape, dtype=torch.bool) & own
    columns, some = [], []
    for mask, far in zip((same & ~one, ~same & ~one), largest, strict=True):
        hidden = torch.where(mask, score if far else -score, -torch.inf)
        columns.append(torch.where(mask.any(1), hidden.argmax(1), 0))
        some.append(mask.any(1))
    return torch.cat(columns), some[0] & some[1]


@pytest.mark.parametrize("helped", [True, False])
@pytest.mark.parametrize("kind", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_columns(
    dtype: torch.dtype, own: bool, kind: str, helped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("cpu")
    if not helped:
        monkeypatch.setattr(module, "helpers", lambda *_: None)
    # coarse numbers: ties are many
    x = torch.randint(-3, 4, (23, 5)).to(dtype)
    y = x if own else torch.randint(-3, 4, (17, 5)).to(dtype)
    # the last label stands alone
    of_x = torch.tensor([*(i % 4 for i in range(22)), 9], dtype=torch.int32)
    of_y = of_x if own else torch.arange(17, dtype=torch.int32) % 5
    for largest in ((True, False), (False, True), (True, True)):
        got = extremes(x, y, of_x, of_y, kind=kind, largest=largest, skip_self=own, backend="cpu")
        columns, found = formula(x, y, (of_x, of_y), kind, largest, own)
        assert torch.equal(got.columns, columns) and torch.equal(got.found, found)
        assert torch.equal(got.rows, torch.arange(23).repeat(2))
        assert not got.all_found
        assert not helped or got.mark is None


@pytest.mark.parametrize("helped", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_marked(
    bad: float, helped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("cpu")
    if not helped:
        monkeypatch.setattr(module, "helpers", lambda *_: None)
    x, y = torch.randn(6, 3), torch.randn(5, 3)
    numbers = lambda t: torch.arange(len(t), dtype=torch.int32) % 2

    def found(x: Tensor, y: Tensor) -> Extremes:
        given = (x, y, numbers(x), numbers(y))
        return extremes(*given, kind="dot", largest=(True, False), backend="cpu")

    y[2, 1] = bad
    mark = found(x, y).mark
    assert mark is not None and mark.isnan()
    if bad != bad:
        columns, _ = formula(x, y, (numbers(x), numbers(y)), "dot", (True, False), False)
        assert torch.equal(found(x, y).columns, columns)
    # of x the distances tell
    mark = found(y, x).mark
    assert mark is None if helped else mark == 0

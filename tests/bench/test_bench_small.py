"""The suite of small batches: its rivals compute what ours do, and its table says who is faster."""

from __future__ import annotations

import pytest
import torch

from fused_losses.bench import measure, small
from fused_losses.bench.measure import Result
from fused_losses.bench.micro import peers
from fused_losses.bench.table import CASES

MAKERS = {name: CASES[name].make for name, _ in small.SHAPES}


@pytest.mark.parametrize("name", MAKERS)
def test_every_rival_agrees_with_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (32, 50, 16) if name == "margin_softmax" else (32, 16)
    # what torch.compile makes of the others is tested with them
    monkeypatch.setattr(torch, "compile", lambda f: f)
    case = small.chosen(MAKERS[name](*shape))
    assert case.ours == ["fused fp32"] and {"fused fp32", "eager"} <= set(case.providers)
    results = measure.paired(case, 1)
    assert {r.name: r.error for r in results if r.error} == {}
    known = set(case.ours) | set(small.RIVALS)
    assert set(case.providers) <= known
    if peers.peer("pytorch_metric_learning.losses") and name not in ("info_nce", "margin_softmax"):
        assert "pytorch-metric-learning" in case.providers


def test_table_of_ratios() -> None:
    def of(ours: list[float], eager: list[float]) -> list[Result]:
        return [Result("fused fp32", ours), Result("eager", eager)]

    found = [
        ("A", 64, of([1.0], [2.0])),
        ("A", 32, of([2.0, 4.0], [1.0, 3.0])),
        ("B", 64, of([], [])),
    ]
    lines = small.crossings(found)
    assert lines[2] == "| loss | rival | N=32 | N=64 |"
    assert lines[4:6] == ["| A | ours, ms | 3.00 | 1.00 |", "| A | eager | 0.62x | 2.00x |"]
    assert lines[7] == "| B | eager |  |  |"

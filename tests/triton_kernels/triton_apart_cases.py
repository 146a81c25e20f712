"""Pairs apart in Triton's interpreter, against float64; run by `test_interpreted.py`."""

from __future__ import annotations

import apart_cases
import pytest

from fused_losses.primitives.pairs import triton as backend


@pytest.mark.parametrize("case", apart_cases.CASES, ids=lambda c: c.name)
def test_against_float64(case: apart_cases.Apart) -> None:
    apart_cases.check(case, backend)


@pytest.mark.parametrize("triangle", (False, True))
def test_several_blocks(triangle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is one block at these sizes, cut into several ragged ones."""
    monkeypatch.setattr(backend, "SWEEP_ROWS", 32)
    monkeypatch.setattr(backend, "PARTIAL_BYTES", 16 * 2 * 32 * 5)
    monkeypatch.setattr(backend.gpu, "ROW_BLOCK", 32)
    monkeypatch.setattr(backend.gpu, "MAX_CHUNK", 64)
    case = apart_cases.Apart(n=53, m=70, labels=4, cols=not triangle, triangle=triangle)
    apart_cases.check(case, backend)
    if not triangle:
        apart_cases.check(apart_cases.Apart(n=41, m=70, values=20), backend)

"""Forward mode on hard data, drawn, for every function."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from draws import CASES, DRAWS, Draw, unjudged
from fuzz_settings import drawn
from hypothesis import given
from tangent_draws import MORE_THAN_ONE, judge


@pytest.mark.parametrize("name", list(CASES))
def test_tangents(name: str) -> None:
    @drawn(3)
    @given(DRAWS)
    def check(draw: Draw) -> None:
        if draw.dtype.itemsize == 2:
            draw = replace(draw, dtype=torch.float32)
        alone = name in MORE_THAN_ONE and 1 in draw.shape[:2]
        if alone or unjudged(CASES[name], draw):
            return
        for call, error, bound in judge(CASES[name], draw):
            assert error <= bound, (draw, call, error, bound)

    check()


def test_found() -> None:
    """One row has no pair: the logarithm of no shared negatives had a NaN tangent."""
    draw = Draw((1, 33, 2), "tiny", "one class", torch.float32, 909804101)
    for call, error, bound in judge(CASES["unpg_margin_softmax"], draw):
        assert error <= bound, (call, error, bound)

"""Forward mode on hard data, drawn, for every function."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from draws import CASES, Draw, unjudged
from fuzz_settings import draws_of, of_function
from tangent_draws import MORE_THAN_ONE, judge


@pytest.mark.parametrize("name", list(CASES))
def test_tangents(name: str) -> None:
    def judged(draw: Draw) -> bool:
        alone = name in MORE_THAN_ONE and 1 in draw.shape[:2]
        return not alone and not unjudged(CASES[name], draw)

    for draw in draws_of(name, of_function(name, 3), judged):
        wide = replace(draw, dtype=torch.float32) if draw.dtype.itemsize == 2 else draw
        for call, error, bound in judge(CASES[name], wide):
            assert error <= bound, (wide, call, error, bound)


FOUND = {
    # the logarithm of no shared negatives
    "a row without a pair": (
        "unpg_margin_softmax",
        Draw((1, 33, 2), "tiny", "one class", torch.float32, 909804101),
    ),
    # classes' tangents in a sweep were rounded otherwise than those of the targets
    "classes of one coordinate": (
        "one_label_ActivePassive",
        Draw((29, 3, 1), "aligned", "all distinct", torch.float32, 2035269348),
    ),
    # the power of two that brings zeros near 1
    "a prefix of zeros": (
        "nested_margin_softmax_some_rows",
        Draw((16, 16, 7), "sparse", "as they are", torch.float64, 1434336575),
    ),
}


@pytest.mark.parametrize("find", list(FOUND))
def test_found(find: str) -> None:
    name, draw = FOUND[find]
    for call, error, bound in judge(CASES[name], draw):
        assert error <= bound, (call, error, bound)

"""NaN and inf in drawn places: which results they reach, for every function."""

from __future__ import annotations

import pytest
import torch
from draws import CASES, DRAWS, Draw
from fuzz_settings import drawn
from hypothesis import given
from planted import judge


@pytest.mark.parametrize("name", list(CASES))
def test_rows_that_are_not_finite(name: str) -> None:
    @drawn(3)
    @given(DRAWS)
    def check(draw: Draw) -> None:
        for backend, faults in judge(CASES[name], draw):
            assert not faults, (draw, backend, faults)

    check()


FOUND = {
    # mined: a row with inf was left out of the least and the highest similarity, and the loss was 0
    "nothing to mine": (
        "multi_similarity_mined",
        Draw((5, 29, 65), "plain", "as they are", torch.float32, 1745980010),
    ),
    # the angle of a NaN cosine was 0: a label's own centre with inf cost nothing
    "no angle": (
        "margin_SphereFace",
        Draw((1, 2, 31), "integers", "skewed", torch.bfloat16, 1714469428),
    ),
}


@pytest.mark.parametrize("find", list(FOUND))
def test_found(find: str) -> None:
    name, draw = FOUND[find]
    for backend, faults in judge(CASES[name], draw):
        assert not faults, (backend, faults)

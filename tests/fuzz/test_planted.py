"""NaN and inf in drawn places: which results they reach, for every function."""

from __future__ import annotations

import pytest
import torch
from draws import CASES, Draw
from fuzz_settings import draws_of, of_function
from planted import PLANTED, judge


@pytest.mark.parametrize("name", PLANTED)
def test_rows_that_are_not_finite(name: str) -> None:
    for draw in draws_of(name, of_function(name, 3)):
        for backend, faults in judge(CASES[name], draw):
            assert not faults, (draw, backend, faults)


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
    # a margin's clamp made a finite score of an infinite one
    "a margin over inf": (
        "unpg_margin_softmax_parted",
        Draw((7, 1, 17), "far", "skewed", torch.float64, 1043790940),
    ),
}


@pytest.mark.parametrize("find", list(FOUND))
def test_found(find: str) -> None:
    name, draw = FOUND[find]
    for backend, faults in judge(CASES[name], draw):
        assert not faults, (backend, faults)

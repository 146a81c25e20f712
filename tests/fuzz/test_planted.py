"""NaN and inf in drawn places: which results they reach, for every function."""

from __future__ import annotations

import pytest
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

"""Float64 against 60 digits where it cancels: every backend, and the literal formulas, too."""

from __future__ import annotations

import pytest
from digit_draws import NEAR, ROWS, judge


@pytest.mark.float64
@pytest.mark.parametrize("near", list(NEAR))
@pytest.mark.parametrize("name, opposite", ROWS)
def test_many_digits(name: str, opposite: bool, near: str) -> None:
    for who, errors, bounds in judge(name, opposite, near, (3, 4)):
        within = all(e <= b for e, b in zip(errors, bounds, strict=True))
        assert within, (who, errors, bounds)

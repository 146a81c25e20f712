"""Hard data, drawn: every loss and similarity against its literal formula in float64.

`draws` says what is drawn and what is allowed; docs/reliability.md what it found.
"""

from __future__ import annotations

import os

import pytest
from draws import CASES, DRAWS, Draw, excess, refused
from hypothesis import HealthCheck, Phase, given, settings
from pair_cases import Case

# of a function, over its variants; FUSED_LOSSES_FUZZ=1000 looks longer
EACH = int(os.environ.get("FUSED_LOSSES_FUZZ", "50"))


def _examples(case: Case) -> int:
    family = case.name.split("_")[0]
    return max(4, -(-EACH // sum(name.split("_")[0] == family for name in CASES)))


@pytest.mark.parametrize("name", list(CASES))
def test_hard_data(name: str) -> None:
    case = CASES[name]

    @settings(
        derandomize=True,
        max_examples=_examples(case),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(DRAWS)
    def check(draw: Draw) -> None:
        if refused(case, draw):
            return
        share, found = excess(case, draw)
        assert share <= 1, (draw, found)

    check()

"""Drawn calls in Triton's interpreter, one a function; run by `test_interpreted.py`."""

from __future__ import annotations

import zlib
from random import Random

import pytest
from draws import CASES, Call, any_draw, judge
from interpreted_draws import ONE_EACH, REFUSED, judged, small


@pytest.mark.parametrize("name", ONE_EACH)
def test_hard_data(name: str) -> None:
    for verdict in judged(name, any_draw(Random(zlib.crc32(name.encode())))):
        assert verdict.share <= 1, verdict


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_judged_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="backend='triton' cannot run kind"):
        list(judge(CASES[name], small(any_draw(Random(1))), [Call("triton")]))

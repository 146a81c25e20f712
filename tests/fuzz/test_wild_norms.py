"""Rows of norms from 1e-40 to 1e30, drawn: what their length does not change, or multiplies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from draws import CASES, DRAWS, Draw, unjudged
from fuzz_settings import drawn
from hypothesis import given
from hypothesis import strategies as st
from wild_norms import JUDGED, NAMES, UNIT, judge, lengths


@pytest.mark.parametrize("name", NAMES)
def test_lengths(name: str) -> None:
    case = JUDGED[name]

    @drawn(3)
    @given(DRAWS, st.sampled_from(lengths(name)))
    def check(draw: Draw, length: str) -> None:
        if draw.dtype == torch.float16:
            draw = replace(draw, dtype=torch.float32)
        if unjudged(CASES[name.removesuffix("_unit")], draw):
            return
        for call, errors, bounds in judge(case, draw, length):
            within = all(e <= b for e, b in zip(errors, bounds, strict=True))
            assert within, (draw, length, call, errors, bounds)

    check()


def test_what_is_judged() -> None:
    """No formula has lost its degree: normalised losses, metrics of a direction or a root."""
    assert {name for name in UNIT if name not in NAMES} == set()
    metrics = (
        "euclidean",
        "cityblock",
        "chebyshev",
        "minkowski",
        "cosine",
        "correlation",
        "angular",
    )
    assert {f"pairwise_{name}" for name in metrics} <= set(NAMES)

"""Rows of norms from 1e-40 to 1e30, drawn: what their length does not change, or multiplies."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from draws import CASES, unjudged
from fuzz_settings import draws_of, of_function
from wild_norms import JUDGED, NAMES, UNIT, judge, lengths


@pytest.mark.parametrize("name", NAMES)
def test_lengths(name: str) -> None:
    plain, some = name.removesuffix("_unit"), lengths(name)
    count = of_function(plain, 3)
    for draw in draws_of(name, count, lambda draw: not unjudged(CASES[plain], draw)):
        length = random.Random(draw.seed).choice(some)
        if draw.dtype == torch.float16:
            draw = replace(draw, dtype=torch.float32)
        for call, errors, bounds in judge(JUDGED[name], draw, length):
            within = all(e <= b for e, b in zip(errors, bounds, strict=True))
            assert within, (draw, length, call, errors, bounds)


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

"""Second derivatives on hard data, drawn, for every function."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from draws import CASES, Draw
from fuzz_settings import draws_of, of_function
from second_draws import NONE, judge, judged

FOUND = {
    # the square of a root had no curve where a row is a mean
    "a row at its mean": (
        "gaussian_cross_entropy_variance",
        Draw((5, 16, 1), "unit clusters", "one class", torch.float32, 1930598824),
    ),
    # s (1 - s) again, over pairs
    "a share of one, of pairs": (
        "sigmoid_contrastive",
        Draw((2, 2, 8), "integers", "as they are", torch.float64, 1519274733),
    ),
    # the bias met the other classes by a sum of their shares that stood still
    "a bias": (
        "class_loss_SphereFace2",
        Draw((15, 29, 65), "plain", "one class", torch.float32, 1255470979),
    ),
    # s (1 - s) with 1 - s of s rounded to 1
    "a share of one": (
        "class_loss_SphereFace2",
        Draw((2, 16, 17), "unit clusters", "skewed", torch.float32, 1119953454),
    ),
    # a logsumexp over nothing under logsigmoid
    "a class alone": (
        "class_loss_Softmax",
        Draw((29, 1, 2), "unit clusters", "as they are", torch.float32, 937374666),
    ),
    "a class alone, and its scale": (
        "adaptive_margin_softmax",
        Draw((1, 1, 1), "aligned", "all distinct", torch.float32, 0),
    ),
    # the bound's: rows that are nearly equal are rounded alike
    "rounded alike": (
        "proxy_nca",
        Draw((7, 33, 17), "clusters", "one class", torch.float32, 3415429),
    ),
    # a column that is constant has no slope, and a curve
    "a constant feature": (
        "cka_paired",
        Draw((3, 15, 31), "integers", "one class", torch.float32, 619310762),
    ),
    # the formula's: of one positive a sum, too, whose weight is rounded as those of several are
    "a positive alone": (
        "proxy_nca",
        Draw((32, 29, 31), "clusters", "as they are", torch.float32, 953706945),
    ),
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in NONE])
def test_second_derivatives(name: str) -> None:
    for draw in draws_of(name, of_function(name, 3), lambda draw: judged(name, draw)):
        held(name, replace(draw, dtype=torch.float32) if draw.dtype.itemsize == 2 else draw)


@pytest.mark.parametrize("find", list(FOUND))
def test_found(find: str) -> None:
    held(*FOUND[find])


def held(name: str, draw: Draw) -> None:
    for verdict in judge(CASES[name], draw):
        assert verdict.share <= 1, (draw, verdict)


@pytest.mark.parametrize("name", sorted(NONE))
def test_where_there_is_none(name: str) -> None:
    draw = Draw((5, 7, 4), "plain", "as they are", torch.float32, 1)
    with pytest.raises(AssertionError, match="second derivative.*not supported"):
        list(judge(CASES[name], draw))

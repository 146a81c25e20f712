"""Each margin on its own: value and slope against closed forms, both ends of [-1, 1], the laws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from cosine_margins import COSINES, value_and_slope

from fused_losses import margins
from fused_losses.functions.margin_calls import apply_margin
from fused_losses.margins import (
    ArcFace,
    CombinedMargin,
    CosFace,
    ElasticArcFace,
    ElasticCosFace,
    MagFace,
    SphereFace,
)

FORMULAS = {
    "cosface": (CosFace(0.35), oracles.cosface(0.35)),
    "sphereface-4": (SphereFace(4.0), oracles.sphereface4()),
    "combined": (CombinedMargin(1.0, 0.3, 0.2), oracles.combined(1.0, 0.3, 0.2)),
    "combined-stretched": (CombinedMargin(1.7, 0.3, 0.2), oracles.combined(1.7, 0.3, 0.2)),
    "combined-none": (
        CombinedMargin(1.7, 0.3, 0.2, "none"),
        oracles.combined(1.7, 0.3, 0.2, "none"),
    ),
    "combined-clamp": (
        CombinedMargin(1.7, 0.3, 0.2, "clamp"),
        oracles.combined(1.7, 0.3, 0.2, "clamp"),
    ),
    "sphereface-1.7-clamp": (
        SphereFace(1.7, "clamp"),
        oracles.combined(1.7, 0.0, 0.0, "clamp"),
    ),
    "sphereface-1.7-easy": (SphereFace(1.7, "easy"), oracles.combined(1.7, 0.0, 0.0, "easy")),
    **{
        f"arcface-{how}": (ArcFace(0.5, how), oracles.arcface(0.5, how))
        for how in margins.BEYOND_PI
    },
    "arcface-clip-wide": (ArcFace(0.5, "clip", 0.1), oracles.arcface(0.5, "clip", 0.1)),
    "arcface-large": (ArcFace(1.5, "monotone"), oracles.arcface(1.5, "monotone")),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_slope_are_the_closed_form(name: str) -> None:
    margin, formula = FORMULAS[name]
    value, slope = value_and_slope(margin, COSINES)
    wanted, wanted_slope, _ = formula(COSINES, np.ones_like(COSINES))
    np.testing.assert_allclose(value, wanted, rtol=1e-11, atol=1e-11)
    # over sin(theta) = 0.014 at the ends
    np.testing.assert_allclose(slope, wanted_slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_both_ends_are_finite(name: str, dtype: torch.dtype) -> None:
    # rounding makes cosines of 1 + 1e-7, and in bfloat16 of 1.004: acos has neither value nor slope
    margin, formula = FORMULAS[name]
    ends = [-1.004, -1.0, 1.0, 1.004]
    t = torch.tensor(ends, dtype=dtype, requires_grad=True)
    value = margin(t)
    (slope,) = torch.autograd.grad(value.sum(), t)
    assert value.dtype == dtype
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()
    at_ends = formula(np.array([-1.0, 1.0]), np.ones(2))[0]
    rounding = {torch.float64: 1e-7, torch.float32: 2e-3, torch.bfloat16: 0.1}[dtype]
    np.testing.assert_allclose(value[1:3].detach().double(), at_ends, atol=rounding)


@pytest.mark.parametrize("how", ["linear", "none", "clamp", "monotone"])
def test_slope_is_zero_where_the_angle_cannot_move(how: str) -> None:
    # at |t| = 1 the true slope is infinite and d t / d x zero; their product is 0
    t = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ArcFace(0.5, how)(t).sum(), t)
    assert slope.item() == 0


def test_cosface_keeps_its_slope_at_the_ends() -> None:
    for margin in (CosFace(0.35), CombinedMargin(1.0, 0.0, 0.35), ElasticCosFace(0.35, 0.0)):
        value, slope = value_and_slope(margin, [-1.0, 1.0])
        assert slope.tolist() == [1, 1]
        np.testing.assert_allclose(value, [-1.35, 0.65], rtol=1e-15)


def jump(margin: Callable, at: float) -> float:
    value, _ = value_and_slope(margin, [at - 1e-9, at + 1e-9])
    return abs(value[1] - value[0]).item()


def test_linear_jumps_where_the_angle_passes_pi_and_rises_on_both_sides() -> None:
    # its known scar: -1 on one side, cos(pi - m) - m sin m = -1.117 on the other
    bound = math.cos(math.pi - 0.5)
    assert jump(ArcFace(0.5), bound) == pytest.approx(-1 - (bound - 0.5 * math.sin(0.5)), abs=1e-6)
    value, _ = value_and_slope(ArcFace(0.5), np.linspace(-1, 1, 2001))
    assert (value.diff() > 0).all()


def test_monotone_is_continuous_and_rises_everywhere() -> None:
    for margin, m1, m2 in (
        (ArcFace(0.5, "monotone"), 1.0, 0.5),
        (SphereFace(4.0), 4.0, 0.0),
        (CombinedMargin(1.7, 0.4, 0.0), 1.7, 0.4),
    ):
        value, _ = value_and_slope(margin, np.linspace(-1, 1, 20001))
        assert (value.diff() > 0).all()
        bounds = [(k * math.pi - m2) / m1 for k in range(1, 5)]
        for angle in (b for b in bounds if 0 < b < math.pi):
            assert jump(margin, math.cos(angle)) < 1e-6


def test_none_falls_past_pi() -> None:
    # what the other conventions are for: the worst rows are rewarded for getting worse
    _, slope = value_and_slope(ArcFace(0.5, "none"), [-0.95, -0.8])
    assert slope[0] < 0 < slope[1]


def test_clamp_and_clip_are_flat_past_pi() -> None:
    for how in ("clamp", "clip"):
        value, slope = value_and_slope(ArcFace(0.5, how), [-0.99, -0.95])
        assert slope.tolist() == [0, 0]
        assert value[0] == value[1]
        assert value[0] == pytest.approx(-1, abs=1e-5)


def test_easy_leaves_the_far_half_alone() -> None:
    t = np.array([-1.0, -0.5, 0.0, 1e-6, 0.5])
    value, slope = value_and_slope(ArcFace(0.5, "easy"), t)
    assert value[:3].tolist() == t[:3].tolist() and slope[:3].tolist() == [1, 1, 1]
    assert value[3].item() == pytest.approx(math.cos(math.pi / 2 + 0.5), abs=1e-5)


def test_unknown_conventions_are_refused() -> None:
    for make in (ArcFace, SphereFace, ElasticArcFace, MagFace, CombinedMargin):
        with pytest.raises(ValueError, match="beyond_pi: expected one of .* got 'later'"):
            make(beyond_pi="later")
    for make in (lambda: CombinedMargin(2.0, beyond_pi="linear"), lambda: SphereFace(4, "linear")):
        with pytest.raises(ValueError, match="'linear' is defined for m1=1"):
            make()


@pytest.mark.parametrize("how", ["monotone", "clip", "none"])
def test_an_m1_of_each_row(how: str) -> None:
    """1 among them, of a number the case without an angle, has a gradient, too."""
    cosine = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)
    m1 = torch.tensor([1, 1, 1.5, 2, 1, 3.2, 1], dtype=torch.float64)
    for make in (lambda m: SphereFace(m, how), lambda m: CombinedMargin(m, 0.2, 0.1, how)):
        found = make(m1)(cosine)
        for i, m in enumerate(m1.tolist()):
            torch.testing.assert_close(found[i], make(m)(cosine[i]), rtol=1e-12, atol=1e-12)
    for each in (m1, torch.ones((), dtype=torch.float64)):
        learned = each.clone().requires_grad_()
        made = SphereFace(learned, how)
        (slope,) = torch.autograd.grad(made(cosine).sum(), learned)
        by_hand = -cosine.acos() * torch.sin(each * cosine.acos())
        sign = torch.where((each * cosine.acos() / math.pi).floor() % 2 == 0, 1, -1)
        by_hand = by_hand * (sign if how == "monotone" else 1)
        by_hand = (
            torch.where(each * cosine.acos() > math.pi, 0, by_hand) if how == "clip" else by_hand
        )
        torch.testing.assert_close(slope, by_hand if each.dim() else by_hand.sum())


def test_straight_through_takes_the_slope_for_one() -> None:
    t = torch.tensor(COSINES, requires_grad=True)
    value = apply_margin(ArcFace(0.5), t, None, "straight_through", torch.ones_like(t).bool())
    (slope,) = torch.autograd.grad(value.sum(), t)
    assert (slope == 1).all()
    torch.testing.assert_close(value, ArcFace(0.5)(t))


def test_values_are_frozen_and_compare() -> None:
    assert ArcFace(0.5) == ArcFace(0.5) != ArcFace(0.4)
    with pytest.raises(AttributeError):
        ArcFace(0.5).margin = 0.4

"""Each margin on its own: value and slope against closed forms, both ends of [-1, 1], the laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from fused_losses import margin_softmax, margins, unpg_margin_softmax
from fused_losses.losses.margin_calls import apply_margin
from fused_losses.margins import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticArcFace,
    ElasticCosFace,
    InterclassFilter,
    MagFace,
    SphereFace,
)

COSINES = np.concatenate([np.linspace(-0.9999, 0.9999, 401), [0.0, 1e-9, -1e-9, math.cos(2.5)]])
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


def value_and_slope(margin: Callable, cosine: np.ndarray | list) -> tuple[Tensor, Tensor]:
    t = torch.tensor(cosine, dtype=torch.float64, requires_grad=True)
    value = margin(t)
    return value.detach(), torch.autograd.grad(value.sum(), t)[0]


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


# --- past pi -------------------------------------------------------------------------------------


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


# --- elastic -------------------------------------------------------------------------------------


def drawn(margin: ElasticCosFace | ElasticArcFace, t: Tensor) -> Tensor:
    return margin.margins(t)


def test_elastic_draws_follow_their_law() -> None:
    t = torch.rand(20000, dtype=torch.float64) * 2 - 1
    margin = ElasticCosFace(0.35, 0.05, generator=torch.Generator().manual_seed(1))
    m = t - margin(t)
    # five standard errors of a sample of 20000
    assert m.mean().item() == pytest.approx(0.35, abs=5 * 0.05 / math.sqrt(20000))
    assert m.std().item() == pytest.approx(0.05, abs=5 * 0.05 / math.sqrt(40000))
    assert abs(torch.corrcoef(torch.stack([t, m]))[0, 1].item()) < 5 / math.sqrt(20000)
    third = ((m - m.mean()) / m.std()).abs().lt(1).double().mean().item()
    assert third == pytest.approx(0.6827, abs=0.02)  # normal, not uniform


def test_elastic_is_reproduced_by_its_generator_and_redrawn_each_call() -> None:
    t = torch.rand(50, dtype=torch.float64)

    def twice(seed: int) -> tuple[Tensor, Tensor]:
        margin = ElasticArcFace(0.5, 0.1, generator=torch.Generator().manual_seed(seed))
        return margin(t), margin(t)

    first, second = twice(3)
    assert not torch.equal(first, second)
    again, after = twice(3)
    assert torch.equal(first, again) and torch.equal(second, after)
    assert not torch.equal(first, twice(4)[0])
    state = torch.get_rng_state()
    twice(3)
    assert torch.equal(state, torch.get_rng_state())  # the global generator was left alone


def test_elastic_without_spread_is_its_base() -> None:
    t = torch.linspace(-0.99, 0.99, 31, dtype=torch.float64)
    torch.testing.assert_close(ElasticArcFace(0.5, 0.0)(t), ArcFace(0.5, "none")(t))
    torch.testing.assert_close(ElasticCosFace(0.35, 0.0)(t), CosFace(0.35)(t))


@pytest.mark.parametrize("kind", [ElasticArcFace, ElasticCosFace])
def test_elastic_plus(kind: type) -> None:
    t = torch.rand(4000, dtype=torch.float64) * 2 - 1

    def correlation(plus: str | None) -> float:
        margin = kind(0.5, 0.1, plus, torch.Generator().manual_seed(5))
        return torch.corrcoef(torch.stack([t, drawn(margin, t)]))[0, 1].item()

    plain = kind(0.5, 0.1, None, torch.Generator().manual_seed(5))
    ranked = kind(0.5, 0.1, "rank", torch.Generator().manual_seed(5))
    # the same draws, dealt out otherwise
    assert torch.equal(drawn(plain, t).sort().values, drawn(ranked, t).sort().values)
    # a uniform t against normal draws in reverse order: -0.977, the most that two such laws allow
    assert correlation("rank") < -0.95
    assert abs(correlation("reference")) < 0.1  # the authors' code deals at random
    assert abs(correlation(None)) < 0.1


def test_elastic_rank_gives_the_closest_row_the_smallest_margin() -> None:
    t = torch.tensor([0.1, 0.9, -0.5, 0.4], dtype=torch.float64)
    m = margins.assign_margins(torch.tensor([3.0, 1.0, 4.0, 2.0]), t, "rank")
    assert m.tolist() == [3, 1, 4, 2]
    m = margins.assign_margins(torch.tensor([1.0, 2.0, 3.0, 4.0]), t, "rank")
    assert m.tolist() == [3, 1, 4, 2]


def test_elastic_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="plus: expected None, 'rank' or 'reference', got 'yes'"):
        ElasticCosFace(plus="yes")
    with pytest.raises(ValueError, match="std: expected a finite value >= 0, got -0.1"):
        ElasticArcFace(std=-0.1)


# --- AdaFace -------------------------------------------------------------------------------------


@pytest.mark.parametrize("h, m, low, high", [(0.333, 0.4, 1, 60), (5.0, 0.4, 1, 60)])
def test_adaface_is_the_closed_form(h: float, m: float, low: float, high: float) -> None:
    norm = np.linspace(low, high, len(COSINES))
    margin = AdaFace(m, h).double().eval()
    margin.mean.fill_(25.0)
    margin.std.fill_(8.0)
    value, slope = value_and_slope(lambda t: margin(t, torch.from_numpy(norm)), COSINES)
    wanted, wanted_slope, _ = oracles.adaface(25.0, 8.0, m, h)(COSINES, norm)
    np.testing.assert_allclose(value, wanted, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(slope, wanted_slope, rtol=1e-9, atol=1e-9)


def test_adaface_learns_its_state_in_training_only() -> None:
    margin = AdaFace(momentum=0.2).double()
    t, norm = torch.rand(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64) * 150
    mean, std = oracles.adaface_state(norm.numpy(), 20.0, 100.0, 0.2)
    margin(t, norm)
    assert margin.mean.item() == pytest.approx(mean, rel=1e-13)
    assert margin.std.item() == pytest.approx(std, rel=1e-13)
    margin.eval()
    margin(t, norm * 3)
    assert margin.mean.item() == pytest.approx(mean, rel=1e-13)
    assert margin.std.item() == pytest.approx(std, rel=1e-13)


def test_adaface_of_a_single_row_keeps_its_std() -> None:
    # the std of one value is NaN, which would stay in the state for good
    margin = AdaFace(momentum=0.5)
    value = margin(torch.tensor([0.3]), torch.tensor([10.0]))
    assert torch.isfinite(value).all()
    assert margin.mean.item() == 15.0
    assert margin.std.item() == 100.0


def test_adaface_of_no_rows_keeps_its_state() -> None:
    margin = AdaFace()
    assert margin(torch.zeros(0), torch.zeros(0)).shape == (0,)
    assert margin.mean.item() == 20 and margin.std.item() == 100


def test_adaface_averages_rows_that_are_there_and_no_nan() -> None:
    norm = torch.tensor([7.0, math.nan, 31.0, 0.0, math.inf, 18.0], dtype=torch.float64)
    present = torch.tensor([True, True, True, False, True, True])
    margin = AdaFace(momentum=0.2).double()
    margin(torch.full((6,), 0.3, dtype=torch.float64), norm, present)
    mean, std = oracles.adaface_state(np.array([7.0, 31.0, 100.0, 18.0]), 20.0, 100.0, 0.2)
    assert margin.mean.item() == pytest.approx(mean, rel=1e-13)
    assert margin.std.item() == pytest.approx(std, rel=1e-13)
    for nothing in (present & False, norm.isnan()):
        rows = torch.full((6,), 0.3, dtype=torch.float64)
        margin(rows, torch.where(present, math.nan, norm), nothing)
    assert margin.mean.item() == pytest.approx(mean, rel=1e-13)
    assert margin.std.item() == pytest.approx(std, rel=1e-13)


WAYS = {
    "reference": dict(backend="reference"),
    "bounded": dict(backend="bounded"),
    "sub-centres": dict(backend="bounded"),
    "unpg": dict(backend="bounded"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kept", [AdaFace, CurricularFace])
def test_averages_are_those_of_the_rows_with_a_label(kept: type, way: str) -> None:
    x, w = torch.randn(6, 4, dtype=torch.float64) * 9, torch.randn(10, 4, dtype=torch.float64)
    x[1], labels = math.nan, torch.tensor([3, 4, -100, 7, -100, 9])
    with_rows, alone = ([kept(momentum=0.5).double() for _ in range(2)] for _ in range(2))

    def run(margin: Any, rows: Any) -> None:
        function: Any = unpg_margin_softmax if way == "unpg" else margin_softmax
        weight = w.view(-1, 1, 4) if way == "sub-centres" else w
        function(x[rows], weight, labels[rows], margin=margin, scale=8.0, **WAYS[way])

    # a filter around the margin passes on what it is given
    filtered = with_rows[1] if kept is CurricularFace else InterclassFilter(with_rows[1])
    for margin, few in zip((with_rows[0], filtered), alone, strict=True):
        run(margin, slice(None))
        run(few, [0, 3, 5])
    for a, b in zip(with_rows, alone, strict=True):
        for name, average in a.state_dict().items():
            assert average.isfinite() and average not in (0, 20, 100)
            torch.testing.assert_close(average, b.state_dict()[name])


def test_adaface_state_is_saved_and_loaded() -> None:
    margin, other = AdaFace(), AdaFace()
    margin(torch.rand(8), torch.rand(8) * 40)
    assert set(margin.state_dict()) == {"mean", "std"}
    other.load_state_dict(margin.state_dict())
    assert other.mean == margin.mean != 20 and other.std == margin.std != 100
    t, norm = torch.rand(5), torch.rand(5) * 40
    assert torch.equal(other.eval()(t, norm), margin.eval()(t, norm))


def test_adaface_sends_no_gradient_to_the_norm() -> None:
    norm = torch.full((3,), 12.0, requires_grad=True)
    t = torch.rand(3, requires_grad=True)
    AdaFace()(t, norm).sum().backward()
    assert norm.grad is None and t.grad is not None


# --- MagFace -------------------------------------------------------------------------------------

# below, at, inside, at and above the clamp [10, 110]
NORMS = np.array([0.5, 9.99, 10.01, 35.0, 60.0, 109.99, 110.01, 300.0])


@pytest.mark.parametrize("cosine", [-0.7, 0.1, 0.6, 0.95])
def test_magface_sends_its_gradient_to_the_norm(cosine: float) -> None:
    t = torch.full((8,), cosine, dtype=torch.float64, requires_grad=True)
    norm = torch.tensor(NORMS, requires_grad=True)
    value = MagFace()(t, norm)
    slope, norm_slope = torch.autograd.grad(value.sum(), (t, norm))
    wanted = oracles.magface()(np.full(8, cosine), NORMS)
    for got, exact in zip((value.detach(), slope, norm_slope), wanted, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-10, atol=1e-12)
    assert (norm_slope[[0, 1, 6, 7]] == 0).all()
    assert (norm_slope[2:6] < 0).all() if cosine > 0 else (norm_slope == 0).all()


def test_magface_penalty() -> None:
    norm = torch.tensor(NORMS, requires_grad=True)
    penalty = MagFace().penalty(norm)
    (slope,) = torch.autograd.grad(penalty.sum(), norm)
    wanted, wanted_slope = oracles.magface_penalty(NORMS)
    np.testing.assert_allclose(penalty.detach(), wanted, rtol=1e-12)
    np.testing.assert_allclose(slope, wanted_slope, rtol=1e-12, atol=1e-15)
    assert (slope[2:6] < 0).all()  # longer embeddings pay less, up to u_a


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["reference", "bounded"])
def test_the_penalty_does_not_depend_on_the_scale_of_class_weights(
    backend: str, smoothing: float
) -> None:
    x, w = torch.randn(6, 4, dtype=torch.float64) * 5, torch.randn(10, 4, dtype=torch.float64)
    labels, weights = torch.tensor([3, 0, -100, 7, 3, 9]), torch.rand(10, dtype=torch.float64)

    def loss(margin: Any, factor: float) -> Any:
        return margin_softmax(
            x, w, labels, margin=margin, scale=8.0, class_weight=weights * factor,
            label_smoothing=smoothing, backend=backend,
        )  # fmt: skip

    margin, bare = MagFace(0.5, 9.0), MagFace(0.5, 9.0, penalty_weight=0.0)
    torch.testing.assert_close(loss(margin, 1.0), loss(margin, 1000.0), rtol=1e-12, atol=0)
    penalty = oracles.magface_penalty(x.norm(dim=1).numpy(), 0.5, 9.0)[0]
    v = weights[labels.clamp_min(0)] * (labels >= 0)
    want = (v * torch.as_tensor(penalty)).sum() / v.sum()
    torch.testing.assert_close(loss(margin, 1.0) - loss(bare, 1.0), want, rtol=1e-10, atol=0)


# --- together ------------------------------------------------------------------------------------


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

"""Margins that draw, keep averages or read norms: Elastic, AdaFace, MagFace."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from cosine_margins import COSINES, value_and_slope
from torch import Tensor

from fused_losses import margin_softmax, margins, unpg_margin_softmax
from fused_losses.margins import (
    AdaFace,
    ArcFace,
    CosFace,
    CurricularFace,
    ElasticArcFace,
    ElasticCosFace,
    InterclassFilter,
    MagFace,
)


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

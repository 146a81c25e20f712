"""Lengths far from 1, and numbers that a float's range or rounding would lose."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import metrics
from fused_losses.base.numerics import unit_rows
from fused_losses.base.unit_norm import unit
from fused_losses.metrics.verification import _allowed

SCALES = (1e-42, 1e-38, 1e-30, 1e-13, 1e18, 1e25, 1e37)


@pytest.mark.parametrize("normed", [unit, unit_rows])
@pytest.mark.parametrize("scale", SCALES)
def test_rows_of_any_length_have_a_direction(
    normed: Callable[[Tensor], Tensor], scale: float
) -> None:
    x = (torch.randn(6, 5) * scale).requires_grad_()
    weight = torch.randn(6, 5)
    wide = x.detach().double().requires_grad_()
    # a sum of five squares, a root and two divisions: ten roundings
    room = 10 * 2.0**-24
    wanted = wide / wide.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(normed(x).detach().double(), wanted.detach(), rtol=room, atol=room)
    slopes = [
        torch.autograd.grad((u * weight).sum(), t)[0].double()
        for u, t in ((normed(x), x), (wanted, wide))
    ]
    # what cancels across the direction is of the size of the weights over the length
    size = (weight.double().norm(dim=1) / wide.detach().norm(dim=1))[:, None]
    held = (slopes[1].abs() < 1e38) & (slopes[1].abs() > 1e-37)  # what float32 can say
    error = ((slopes[0] - slopes[1]).abs() / size)[held]
    assert (error <= 4 * room).all()


def test_a_power_of_two_changes_no_bit() -> None:
    x = torch.randn(40, 7)
    for power in (-100, -1, 1, 100):
        assert torch.equal(unit(x * 2.0**power), unit(x))
        assert torch.equal(unit_rows(x * 2.0**power), unit_rows(x))


def _directions(x: Tensor, metric: str) -> Tensor:
    x = x.double()
    x = x - x.mean(1, keepdim=True) if metric == "correlation" else x
    return x / x.square().sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("metric", ["cosine", "correlation", "angular"])
@pytest.mark.parametrize("scale", SCALES)
def test_cosines_of_rows_of_any_length(scale: float, metric: str, backend: str) -> None:
    x, y = torch.randn(6, 7) * scale, torch.randn(5, 7)
    cosine = _directions(x, metric) @ _directions(y, metric).T
    wanted = cosine.arccos() / math.pi if metric == "angular" else 1 - cosine
    got = fl.pairwise_distance(x, y, metric, backend=backend)
    # of denormals themselves 2^-149 / 1e-42 is left
    room = 1e-5 if scale > 1e-40 else 1e-2
    torch.testing.assert_close(got.double(), wanted, rtol=room, atol=room)
    if metric == "cosine":
        similar = fl.pairwise_similarity(x, y, "cosine", backend=backend)
        torch.testing.assert_close(similar.double(), cosine, rtol=room, atol=room)
    if metric == "correlation":
        found = fl.pairwise_topk(x, y, 5, metric, backend=backend)[0]
        torch.testing.assert_close(found.double(), wanted.sort(1).values, rtol=room, atol=room)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_row_has_no_correlation(dtype: torch.dtype) -> None:
    """Whatever rounding leaves of it is no direction, now that no length is too short."""
    x = torch.randn(3, 7, dtype=dtype)
    x[1] = 0.1
    d = fl.pairwise_distance(x, x[[0, 2]], "correlation")
    found = fl.pairwise_topk(x, x[[0, 2]], 2, "correlation")[0]
    for values in (d[1], found[1]):
        torch.testing.assert_close(values, torch.ones_like(values), rtol=4e-7, atol=0)


NORMALISED: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda x, labels, **o: fl.info_nce(x, x.roll(1, 0), **o),
    "multi_similarity": fl.multi_similarity,
    "contrastive": fl.contrastive,
    "all_triplets": fl.all_triplets,
    "fast_ap": fl.fast_ap,
    "supervised_contrastive": fl.supervised_contrastive,
    "uniformity": lambda x, labels, **o: fl.uniformity(x, **o),
    "centroid_triplet": fl.centroid_triplet,
}


@pytest.mark.parametrize("power", [-100, 100])
@pytest.mark.parametrize("name", NORMALISED)
def test_losses_of_normalised_rows_do_not_see_their_length(
    name: str, power: int, backend: str
) -> None:
    x, labels = torch.randn(12, 6), torch.arange(12) % 4
    call = NORMALISED[name]
    losses = [call(r, labels, normalize=True, backend=backend) for r in (x * 2.0**power, x)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("scale", [1e-40, 1e-38, 1e-30, 1e-19, 1.0, 1e19])
@pytest.mark.parametrize("p", [0.5, 1.5, 3.0, 4.0])
def test_minkowski_and_its_gradient_of_rows_of_any_length(
    p: float, scale: float, backend: str
) -> None:
    x, y = torch.randn(6, 7) * scale, torch.randn(5, 7) * scale
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    wanted = ((exact[:, None] - y.double()).abs() / scale).pow(p).sum(-1).pow(1 / p) * scale
    got = fl.pairwise_distance(x, y, "minkowski", p=p, backend=backend)
    # numbers below 1e-38 have a grain of 1.4e-45
    torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-44)
    grads = [torch.autograd.grad(v.sum(), leaf)[0] for v, leaf in ((got, x), (wanted, exact))]
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-42, 1e-40, 1e-38, 1e-30, 1.0, 1e37])
def test_canberra_of_rows_of_any_length(scale: float, backend: str) -> None:
    x, y = torch.randn(6, 7) * scale, torch.randn(5, 7) * scale
    x[0, 0] = y[0, 0] = 0
    a, b = x.double()[:, None], y.double()
    size = a.abs() + b.abs()
    wanted = torch.where(size > 0, (a - b).abs() / torch.where(size > 0, size, 1), 0).sum(-1)
    got = fl.pairwise_distance(x, y, "canberra", backend=backend)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    found = fl.pairwise_topk(x, y, 5, "canberra", backend=backend)
    torch.testing.assert_close(found[0].double(), wanted.sort(1).values, rtol=1e-5, atol=1e-6)


def test_canberra_with_a_row_of_nan_or_inf_keeps_the_others(backend: str) -> None:
    x, y = torch.randn(4, 3), torch.randn(5, 3)
    wanted = fl.pairwise_distance(x, y, "canberra", backend=backend)
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[1, 2] = value
        got = fl.pairwise_distance(bad, y, "canberra", backend=backend)
        assert got[1].isnan().all()
        rest = [0, 2, 3]
        torch.testing.assert_close(got[rest], wanted[rest], rtol=1e-6, atol=0)


def _of_roots(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    apart = x[:, None] - y
    square = apart.square().sum(-1)
    moved = [t - t.mean(-1, keepdim=True) for t in (x, y)]
    w = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    return {
        "euclidean": square.sqrt(),
        "weighted": (apart.square() * w).sum(-1).sqrt(),
        "mahalanobis": (apart.square() * w).sum(-1).sqrt(),
        "variance": (apart.square() / (1 + y.square() / y.square().max())).sum(-1).sqrt(),
        "cityblock": apart.abs().sum(-1),
        "chebyshev": apart.abs().amax(-1),
        "snr": (moved[0][:, None] - moved[1]).square().sum(-1)
        / moved[0].square().sum(-1, keepdim=True),
        "braycurtis": apart.abs().sum(-1) / (x[:, None] + y).abs().sum(-1),
        "hellinger": ((x.abs() / 2).sqrt()[:, None] - (y.abs() / 2).sqrt()).square().sum(-1).sqrt(),
        "jensenshannon": _shannon(x.abs(), y.abs()),
        "kl": (x.abs()[:, None] * (x.abs()[:, None] / y.abs()).log()).sum(-1),
    }


def _shannon(x: Tensor, y: Tensor) -> Tensor:
    a, b = (x / x.sum(-1, keepdim=True))[:, None], y / y.sum(-1, keepdim=True)
    mean = (a + b) / 2
    return ((a * (a / mean).log() + b * (b / mean).log()).sum(-1) / 2).sqrt()


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-20, 1e20, 1e35])
@pytest.mark.parametrize("metric", _of_roots(torch.ones(1, 7), torch.ones(1, 7)))
def test_distances_and_gradients_of_rows_of_any_length(
    metric: str, scale: float, backend: str
) -> None:
    x, y = torch.randn(6, 7) * scale, torch.randn(5, 7) * scale
    x.requires_grad_()
    w = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 1.0])
    wide = y.double()
    options: dict[str, dict[str, Tensor]] = {
        "weighted": dict(w=w),
        "mahalanobis": dict(VI=w.diag()),
        "variance": dict(variance=(1 + wide.square() / wide.square().max()).float()),
    }
    name = {"weighted": "euclidean", "variance": "mahalanobis"}.get(metric, metric)
    positive = metric in ("hellinger", "jensenshannon", "kl")
    rows = (x.abs(), y.abs()) if positive else (x, y)
    got = fl.pairwise_distance(*rows, name, **options.get(metric, {}), backend=backend)
    exact = x.detach().double().requires_grad_()
    wanted = _of_roots(exact, y.double())[metric]
    # a budget: distances of seven terms, whose logarithms cancel
    size = float(wanted.abs().max())
    torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-6 * size)
    grads = [
        torch.autograd.grad(v.sum(), leaf)[0].double() for v, leaf in ((got, x), (wanted, exact))
    ]
    size = float(grads[1].abs().max())
    if 1e-36 < size < 1e37:
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-13, 1e20, 1e37])
@pytest.mark.parametrize("metric", ["cosine", "angular", "euclidean"])
def test_neighbours_of_rows_of_any_length(metric: str, scale: float, backend: str) -> None:
    x, y = torch.randn(6, 7), torch.randn(50, 7)
    x[1] *= scale
    y[::2] *= scale
    if metric == "euclidean":
        x, y = torch.randn(6, 7) * scale, torch.randn(50, 7) * scale
    y[7] = 0
    a, b = x.double()[:, None], y.double()
    if metric == "euclidean":
        wanted = (a - b).square().sum(-1).sqrt()
    else:
        norms = a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt()
        cosine = torch.where(norms > 0, (a * b).sum(-1) / norms.clamp_min(1e-300), 0)
        wanted = 1 - cosine if metric == "cosine" else cosine.clamp(-1, 1).arccos() / math.pi
    values, index = fl.pairwise_topk(x, y, 9, metric, backend=backend)
    order = wanted.sort(dim=1, stable=True)
    assert torch.equal(index, order.indices[:, :9])
    torch.testing.assert_close(values.double(), order.values[:, :9], rtol=1e-5, atol=0)


@pytest.mark.parametrize("positive", ["hardest", "all"])
@pytest.mark.parametrize("power", [-100, 83])
def test_mining_at_any_length(power: int, positive: str, backend: str) -> None:
    x, labels = torch.randn(16, 5), torch.arange(16) % 4
    options: dict[str, Any] = dict(positive=positive, triplets="hard", backend=backend)
    plain = fl.mine_triplets(x, labels, **options)
    scaled = fl.mine_triplets(x * 2.0**power, labels, **options)
    for one, other in zip(plain, scaled, strict=True):
        # indices are equal, distances a power of two apart
        factor = 2.0**power if one.is_floating_point() else 1
        torch.testing.assert_close(other, one * factor, rtol=1e-6, atol=0)


# ---- metrics ------------------------------------------------------------------------------------


def test_knn_weights_do_not_underflow(backend: str) -> None:
    """e^(-d / temperature) of distances in the hundreds: the shares of the classes are not 0."""
    x = torch.tensor([[0.0], [1000.0]])
    ref = torch.tensor([[300.0], [310.0], [311.0], [1500.0]])
    labels = torch.tensor([2, 1, 1, 3])
    options = dict(k=4, metric="euclidean", temperature=0.1, num_classes=4, backend=backend)
    got = metrics.knn_classify(x, ref, labels, weights="exp", **options)
    wanted = metrics.knn_classify(x, ref, labels, weights="softmax", **options)
    assert got.labels.tolist() == wanted.labels.tolist() == [2, 3]
    near = metrics.knn_classify(x / 1000, ref / 1000, labels, weights="exp", **options)
    d = (x.double() - ref.double().T).abs() / 1000
    score = torch.zeros(2, 4, dtype=torch.float64).index_add(1, labels, (-d / 0.1).exp())
    torch.testing.assert_close(near.scores.double(), score, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(near.score, near.scores.amax(1))


@pytest.mark.parametrize("metric", ["cosine", "angular", "correlation"])
def test_a_row_without_direction_has_one_rank_however_many_are_asked(
    metric: str, backend: str
) -> None:
    """Beyond 2,048 neighbours, and over all of them, a zero row is as far as it is among few."""
    y = F.normalize(torch.randn(2_100, 4))
    y[:1_200] = y[:1_200].abs() * torch.tensor([1.0, 1.0, 1.0, -1.0])
    x = torch.tensor([[1.0, 2.0, 3.0, -4.0], [0.0, 0.0, 0.0, 0.0]])
    y[700] = 0
    labels, told = torch.tensor([5, 5]), torch.zeros(2_100).long()
    told[700] = 5
    options = dict(metric=metric, backend=backend)
    ranks = [
        metrics.mean_reciprocal_rank(x[:1], labels[:1], y, told, k=k, **options).value
        for k in (2_048, 2_100, None)
    ]
    assert ranks[0] == ranks[1] == ranks[2] > 0
    both = [
        metrics.mean_reciprocal_rank(x, labels, y, told, k=k, **options).value
        for k in (2_048, 2_100, None)
    ]
    assert both[0] == both[1] == both[2]


def test_as_many_impostors_pass_as_the_rate_says() -> None:
    """The rate is a share of whole impostors, at fifty million of them, too."""
    n = 50_000_000
    # 0.57 is below 57 / 100 as a float, and its multiple below the whole number
    for far in (0.29, 0.57, 0.58, 1e-6, 3e-7, 0.1, 0.07):
        wanted = round(far * n)
        assert _allowed(far, n) == wanted
    for count in range(0, 1_001):
        for total in (1_000, 1_001):
            share = min(count, total) / total
            assert _allowed(share, total) == min(count, total)
            assert _allowed(math.nextafter(share, -1), total) == max(min(count, total) - 1, 0)

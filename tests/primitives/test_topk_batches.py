"""`pairwise_topk` of batches of searches, and of more neighbours than a GPU's kernels hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses import pairwise_topk, quantize_rows
from fused_losses.primitives.topk.inputs import MOST


def told(b: int, n: int, m: int) -> dict[str, Any]:
    exclude = torch.randint(-1, m, (b, n, 2))
    labels = dict(x_labels=torch.randint(0, 3, (b, n)), y_labels=torch.randint(0, 3, (b, m)))
    ids = dict(x_ids=torch.randint(0, 9, (b, n)), y_ids=torch.randint(0, 9, (b, m)))
    return dict(**labels, **ids, exclude=exclude, match="different")


@pytest.mark.parametrize("metric", ["dot", "euclidean", "cosine", "cityblock"])
@pytest.mark.parametrize(("b", "n", "m", "d"), [(1, 1, 1, 1), (3, 5, 31, 4), (2, 7, 13, 1)])
def test_each_item_is_a_search(b, n, m, d, metric: str, backend: str) -> None:
    x, y = torch.randn(b, n, d), torch.randn(b, m, d)
    for bank, more in ((y, {}), (y, told(b, n, m)), (None, dict(skip_self=True))):
        values, index = pairwise_topk(x, bank, 4, metric, **more, backend=backend)
        assert values.shape == index.shape == (b, n, 4)
        for at in range(b):
            own = {k: v[at] if isinstance(v, Tensor) else v for k, v in more.items()}
            rows = None if bank is None else bank[at]
            want = pairwise_topk(x[at], rows, 4, metric, **own, backend=backend)
            assert torch.equal(values[at], want[0]) and torch.equal(index[at], want[1])


@pytest.mark.float64
def test_slopes_of_items_stay_in_theirs(backend: str) -> None:
    x = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 9, 3, dtype=torch.float64, requires_grad=True)

    def values(x: Tensor, y: Tensor) -> Tensor:
        return pairwise_topk(x, y, 3, "euclidean", backend=backend)[0]

    assert torch.autograd.gradcheck(values, (x, y))
    (dy,) = torch.autograd.grad(values(x, y)[1].sum(), y)
    assert (dy[[0, 2]] == 0).all() and (dy[1] != 0).any()


def test_no_items_and_empty_items() -> None:
    for shape in ((0, 5, 3), (2, 0, 3)):
        x = torch.randn(shape)
        values, index = pairwise_topk(x, torch.randn(shape[0], 4, 3), 2)
        assert values.shape == index.shape == (*shape[:2], 2)
    values, index = pairwise_topk(torch.randn(2, 3, 4), torch.randn(2, 0, 4), 2)
    assert (index == -1).all() and (values == torch.inf).all()


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(y=torch.randn(7, 3)), ValueError, "y: expected 2 items in 3 dimensions"),
        (dict(y=torch.randn(3, 7, 3)), ValueError, "y: expected 2 items"),
        (dict(y=quantize_rows(torch.randn(7, 3))), ValueError, r"y: expected \[B, M, D\]"),
        (dict(screen=quantize_rows(torch.randn(7, 3))), ValueError, "screen: expected no"),
        (dict(x_ids=torch.zeros(4)), ValueError, "x_ids: expected 2 items in 2 dimensions"),
        (dict(exclude=[1]), TypeError, "exclude: expected a tensor"),
        (dict(k=0), ValueError, "k: expected a value in"),
    ],
)
def test_bad_batches(given: dict, error: type, words: str) -> None:
    given = {"y": torch.randn(2, 7, 3), "k": 1, **given}
    with pytest.raises(error, match=words):
        pairwise_topk(torch.randn(2, 4, 3), **given)


@pytest.mark.parametrize("metric", ["euclidean", "dot", "cosine", "cityblock"])
def test_more_than_kernels_hold(metric: str, backend: str) -> None:
    if backend == "cuda":
        with pytest.raises(RuntimeError, match="its kernels hold k <= 2048, got k=2049"):
            pairwise_topk(torch.randn(2, 3), torch.randn(2_500, 3), 2_049, "dot", backend=backend)
        return
    # small integers: every score is exact, and many are equal
    x, y = torch.randint(-2, 3, (3, 4)).float(), torch.randint(-2, 3, (2_500, 4)).float()
    x[x.eq(0).all(1)], y[y.eq(0).all(1)] = 1, 1
    product = x.double() @ y.double().T
    scores = {
        "dot": -product,
        "cityblock": (x[:, None] - y).abs().sum(2).double(),
        "euclidean": (x[:, None] - y).double().square().sum(2).sqrt(),
        "cosine": 1 - product.sign() * product.square() / y.double().square().sum(1),
    }[metric]
    order = scores.sort(dim=1, stable=True).indices
    for k in (MOST + 1, 2_500):
        values, index = pairwise_topk(x, y, k, metric, backend=backend)
        if metric == "cosine":
            # one direction is one number; others may lie within a rounding of each other
            moved = scores.gather(1, index).diff(dim=1)
            assert (moved >= -1e-12).all() and (index.diff(dim=1)[moved == 0] > 0).all()
        else:
            assert torch.equal(index, order[:, :k])
            want = scores.gather(1, order)[:, :k] * (-1 if metric == "dot" else 1)
            torch.testing.assert_close(values.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.float64
def test_slopes_of_many(backend: str) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2_100, 3, dtype=torch.float64)
    for metric in ("euclidean", "cityblock"):
        values, index = pairwise_topk(x, y, 2_100, metric, backend=backend)
        (found,) = torch.autograd.grad(values.sum(), x)
        assert torch.equal(index.sort(dim=1).values, torch.arange(2_100).expand(2, -1))
        apart = x[:, None] - y
        whole = apart.square().sum(2).sqrt() if metric == "euclidean" else apart.abs().sum(2)
        torch.testing.assert_close(found, torch.autograd.grad(whole.sum(), x)[0])


def test_k_has_an_end() -> None:
    x = torch.randn(2, 3)
    assert pairwise_topk(x, torch.randn(9, 3), MOST)[1].shape == (2, MOST)
    with pytest.raises(ValueError, match=r"k: expected a value in \[1, 2048\], got 2049"):
        pairwise_topk(x, torch.randn(9, 3), MOST + 1)
    with pytest.raises(ValueError, match=r"k: expected a value in \[1, 3000\], got 3001"):
        pairwise_topk(x, torch.randn(3_000, 3), 3_001)
    plan = fused_losses.explain(pairwise_topk, torch.randn(64, 8), torch.randn(20_000, 8), 4_000)
    assert plan.backend == "cpu" and plan.peak_extra_bytes < 2**27

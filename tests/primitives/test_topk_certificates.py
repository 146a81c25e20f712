"""The top-k on hard data: what its certificates rule out may never be among the k best.

The oracle has no code in common with the package: rational numbers for small rows, long double
where only the size of a rounding is asked for.
"""

from __future__ import annotations

import pytest
import torch
from conftest import STREAMED, require
from topk_oracle import (
    DTYPES,
    HARD,
    PAIRS,
    check,
)
from torch import Tensor

from fused_losses import backends
from fused_losses.metrics.retrieval import recall_at_k
from fused_losses.pairwise.topk import pairwise_topk
from fused_losses.primitives.topk import bounded, certified
from fused_losses.primitives.topk.inputs import TOPK_KINDS, TopkInputs
from fused_losses.primitives.topk.op import quantize_rows, select


def screens(backend: str) -> list[str]:
    """Those that a backend can make its products in."""
    device = torch.device("cpu")
    if backends.reasons_against(backend, device, torch.float32, "bf16"):
        return ["fp32"]
    return ["fp32"] if backend in ("bounded", "reference") else ["fp32", "bf16"]


@pytest.mark.parametrize("kind", TOPK_KINDS)
@pytest.mark.parametrize("types", PAIRS, ids="-".join)
@pytest.mark.parametrize("data", HARD)
def test_the_k_best_of_hard_rows(data: str, types: tuple, kind: str) -> None:
    """Every screen of every backend, near and far, with and without the row itself."""
    names = [require(name) for name in STREAMED]
    n, m = 5, 90
    rows = HARD[data](n + m)
    # rows with inf: test_rows_with_infinities
    rows = rows.clamp(-6e4, 6e4) if "f16" in types else rows
    x, y = rows[:: m // n][:n].to(DTYPES[types[0]]), rows.to(DTYPES[types[1]])
    for k, largest in ((1, kind != "sqeuclidean"), (7, kind == "sqeuclidean"), (3, True)):
        for name, screen in ((each, screen) for each in names for screen in screens(each)):
            asked = dict(kind=kind, k=k, largest=largest, screen=screen)
            found = select(TopkInputs(x, y, **asked), name)[1]
            check(found, x, y, kind, k, largest, own=False, of=(name, screen))
    own = y[:40]
    given = dict(kind=kind, k=2, largest=False, skip_self=True, symmetric=True)
    for name in names:
        found = select(TopkInputs(own, own, **given), name)[1]
        check(found, own, own, kind, 2, False, own=True, of=(name, "own"))


@pytest.mark.parametrize("seed", range(8))
def test_copies_in_a_bank_of_fewer_digits_than_its_queries(seed: int) -> None:
    """A bank of float32 was moved about its centre in float32, and queries in float64."""
    torch.manual_seed(seed)
    rows = HARD["duplicates"](95)
    x, y = rows[::18][:5], rows.float()
    for name in map(require, STREAMED):
        for k, largest in ((1, False), (7, True), (3, True)):
            p = TopkInputs(x, y, kind="sqeuclidean", k=k, largest=largest, screen="fp32")
            check(select(p, name)[1], x, y, "sqeuclidean", k, largest, own=False, of=(name,))


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("kind", TOPK_KINDS)
@pytest.mark.parametrize("data", HARD)
def test_codes_of_hard_rows(data: str, kind: str, rotate: bool) -> None:
    """A screen of int8 codes, and a bank of them."""
    require("cpu")
    rows = HARD[data](70)
    for dtype in (torch.float64, torch.float32):
        x, y = rows[:4].to(dtype), rows.to(dtype)
        codes = quantize_rows(y, rotate=rotate)
        for largest in (False, True):
            p = TopkInputs(x, y, None, *codes, kind=kind, k=4, largest=largest)
            check(select(p, "cpu")[1], x, y, kind, 4, largest, own=False)
            bank = codes.codes.double() * codes.scale[:, None].double()
            if bool(bank.isfinite().all()):
                p = TopkInputs(x, codes.codes, codes.scale, kind=kind, k=4, largest=largest)
                for name in STREAMED:
                    found = select(p, name)[1]
                    check(found, x, bank, kind, 4, largest, own=False)


# ---- what was wrong -----------------------------------------------------------------------------


def nearest(x: Tensor, y: Tensor) -> Tensor:
    apart = (x.double()[:, None] - y.double()).square().sum(dim=-1)
    return apart.fill_diagonal_(torch.inf).argmin(dim=1)


def test_consecutive_seconds(backend: str) -> None:
    """Rounded to float32, 1.7e9 s are whole minutes: 142 of 300 neighbours were wrong."""
    rows = 1.7e9 + torch.arange(300).double()[:, None]
    want = (torch.arange(300) - 1).clamp_min(0)
    want[0] = 1
    for screen in screens(backend):
        given = dict(skip_self=True, backend=backend, screen=screen)
        assert torch.equal(pairwise_topk(rows, None, 1, **given)[1][:, 0], want)
        values, index = pairwise_topk(rows, rows, 1, **given)
        assert torch.equal(index[:, 0], want) and torch.equal(values, torch.ones(300, 1).double())


def test_map_coordinates(backend: str) -> None:
    """Metres from a meridian and from the equator: 76 of 400 neighbours were wrong."""
    rows = torch.tensor([5e5, 5.4e6, 200.0]) + 2 * torch.rand(400, 3).double()
    for screen in screens(backend):
        index = pairwise_topk(rows, None, 1, skip_self=True, backend=backend, screen=screen)[1]
        assert torch.equal(index[:, 0], nearest(rows, rows))


def test_float32_queries_of_a_float64_bank(backend: str) -> None:
    bank = torch.tensor([5e5, 5.4e6, 200.0]) + 2 * torch.rand(400, 3).double()
    for x, y in ((bank.float(), bank), (bank, bank.float())):
        index = pairwise_topk(x, y, 1, skip_self=True, backend=backend)[1]
        assert torch.equal(index[:, 0], nearest(x, y))


def test_near_constant_rows(streamed: str) -> None:
    """The unit roundoff of bfloat16 is 2^-8: 999 of 1,000 rows were wrong."""
    x = torch.full((1, 256), 1.00389)
    bank = torch.zeros(64, 256)
    bank[0], bank[40] = 1.003, 1.00389
    for screen in screens(streamed):
        given = dict(backend=streamed, screen=screen)
        assert pairwise_topk(x, bank, 1, "dot", **given)[1].item() == 40
        rows = 1.00389 + 2e-5 * torch.rand(300, 256) - 1e-5
        found = pairwise_topk(rows, rows, 10, "dot", **given)[1]
        assert torch.equal(found, pairwise_topk(rows, rows, 10, "dot", backend="reference")[1])


def test_what_stands_on_the_top_k() -> None:
    """Recall of seconds in labelled pairs: each one's neighbour is the other."""
    labels = torch.arange(150).repeat_interleave(2)
    rows = 1.7e9 + (3 * labels + torch.arange(300) % 2).double()
    assert recall_at_k(rows[:, None], labels, metric="euclidean").value == 1.0


def test_queries_far_from_the_bank(streamed: str) -> None:
    """|x|^2 of rounded rows is off by more than the scores of a bank far away differ."""
    bank = torch.randn(200, 4)
    x = torch.tensor([[1e6, 0, 0, 0], [-2e5, 1e5, 0, 0], [1e9, -1e9, 1, 1]])
    for dtype in (torch.float32, torch.float64):
        for k, largest in ((1, False), (6, True)):
            p = TopkInputs(x.to(dtype), bank, kind="sqeuclidean", k=k, largest=largest)
            check(select(p, streamed)[1], x, bank, "sqeuclidean", k, largest, own=False)


def test_sums_that_overflow_on_their_way(streamed: str) -> None:
    """-inf after two terms, 2e38 after four."""
    x = torch.tensor([[1e20, 1e20, 1e20, 1e20]])
    y = torch.cat([torch.randn(60, 4), torch.tensor([[-2e18, -2e18, 3e18, 3e18]])])
    for screen in screens(streamed):
        assert select(TopkInputs(x, y, screen=screen), streamed)[1].item() == 60


def test_squares_that_underflow(streamed: str) -> None:
    """Rows of 1e-20 against queries of 1e20: their lengths in float32 are 0, their products 1."""
    y = 1e-20 * (1 + 1e-6 * torch.randn(200, 8))
    x = 1e20 * (1 + torch.rand(3, 8))
    for screen in screens(streamed):
        check(
            select(TopkInputs(x, y, k=3, screen=screen), streamed)[1], x, y, "dot", 3, True, False
        )


def test_cosines_of_long_rows(streamed: str) -> None:
    """Squares beyond float32, whose rows the compiled screen took for zeros."""
    y = torch.randn(100, 6) * 1e25
    for x in (torch.randn(4, 6), torch.randn(4, 6) * 1e-10, torch.randn(4, 6) * 1e30):
        for screen in screens(streamed):
            found = select(TopkInputs(x, y, kind="cosine", k=3, screen=screen), streamed)[1]
            check(found, x, y, "cosine", 3, True, False)


def test_exact_ties_of_directions(backend: str) -> None:
    """Rows of integers in one direction have one cosine, whatever their lengths."""
    y = torch.tensor([[3.0, 6, 9], [1, 2, 3], [7, 14, 21], [2, 4, 6.5], [-5, -10, -15]])
    y = torch.cat([y, y, y])
    x = torch.tensor([[1.0, 2, 3], [2, 1, 5]])
    index = pairwise_topk(x, y, 9, "cosine", backend=backend)[1]
    assert torch.equal(index, torch.tensor([[0, 1, 2, 5, 6, 7, 10, 11, 12]] * 2)[:, :9]) or (
        index[1].tolist() == [3, 8, 13, 0, 1, 2, 5, 6, 7]
    )
    assert index[0].tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]


def test_equal_rows_have_distance_zero(backend: str) -> None:
    """As in the matrix: 1 minus a cosine of exactly 1."""
    for d in (1, 3, 17, 64, 130):
        x = torch.randn(30, d)
        for metric in ("cosine", "correlation", "angular") if d > 1 else ("cosine", "angular"):
            for scale in (1.0, 4.0, 0.5):
                values, index = pairwise_topk(x, scale * x, 1, metric, backend=backend)
                assert torch.equal(values, torch.zeros(30, 1)), metric
                if d > 1:
                    assert torch.equal(index[:, 0], torch.arange(30))


def test_cosines_of_infinities_are_no_candidates(backend: str) -> None:
    x, y = torch.randn(4, 5), torch.randn(30, 5)
    x[1, 2], y[7, 0], y[9] = torch.inf, -torch.inf, 0
    x[3] = 0
    for metric in ("cosine", "angular"):
        for largest in (False, True):
            values, index = pairwise_topk(x, y, 30, metric, largest=largest, backend=backend)
            assert bool((index[1] == -1).all())
            assert bool((values[1] == (-torch.inf if largest else torch.inf)).all())
            assert not bool((index == 7).any()) and bool((index[[0, 2, 3], :29] >= 0).all())
            assert not bool(values.isnan().any())


@pytest.mark.parametrize("kind", ["dot", "sqeuclidean"])
def test_rows_with_infinities(kind: str, backend: str) -> None:
    """Infinite scores come first or last, NaN nowhere, and the others are as without them."""
    x, y = torch.randn(6, 3), torch.randn(60, 3)
    y[4, 1], y[20], y[33, 0], y[34] = torch.inf, -torch.inf, torch.nan, 1e30
    x[2, 0], x[4, 1] = torch.inf, 0
    a, b = x.double(), y.double()
    for dtype in (torch.float32, torch.float64):
        for largest in (False, True):
            for k in (5, 60):
                p = TopkInputs(x.to(dtype), y, kind=kind, k=k, largest=largest)
                keys, index = select(p, backend)
                every = (a[:, None] * b).sum(-1)
                every = (a[:, None] - b).square().sum(-1) if kind == "sqeuclidean" else every
                for i, row in enumerate(every.tolist()):
                    order = [j for j in range(60) if row[j] == row[j]]
                    order.sort(key=lambda j: (-row[j] if largest else row[j], j))
                    want = (order + [-1] * 60)[:k]
                    assert index[i].tolist() == want
                    assert torch.equal(keys[i].isnan(), torch.tensor([j < 0 for j in want]))


@pytest.mark.parametrize("metric", ["hellinger", "correlation", "mahalanobis"])
def test_sixteen_bit_rows_are_transformed_in_float64(metric: str, backend: str) -> None:
    x, y = (torch.rand(n, 12).bfloat16() for n in (5, 200))
    given = {"covariance": torch.eye(12) + 0.2} if metric == "mahalanobis" else {}
    values, index = pairwise_topk(x, y, 6, metric, backend=backend, **given)
    a, b = x.double(), y.double()
    if metric == "hellinger":
        table = ((a.sqrt()[:, None] - b.sqrt()).square().sum(-1) / 2).sqrt()
    elif metric == "correlation":
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        table = 1 - (a @ b.T) / a.norm(dim=1)[:, None] / b.norm(dim=1)
    else:
        apart = a[:, None] - b
        inverse = given["covariance"].double().inverse()
        table = torch.einsum("nmd,de,nme->nm", apart, inverse, apart).sqrt()
    want = table.sort(dim=1)[0][:, :6]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(table.gather(1, index), want, rtol=1e-12, atol=1e-12)


def test_correlation_of_near_constant_rows(backend: str) -> None:
    """A mean in float32 is off by more than these rows vary."""
    y = 1e4 + torch.randn(150, 9).double()
    y32 = y.float()
    x = y32[:5].clone()
    b = y32.double() - y32.double().mean(1, keepdim=True)
    table = 1 - (b[:5] @ b.T) / b[:5].norm(dim=1)[:, None] / b.norm(dim=1)
    index = pairwise_topk(x, y32, 4, "correlation", backend=backend)[1]
    want = table.sort(dim=1)[0][:, :4]
    torch.testing.assert_close(table.gather(1, index), want, rtol=0, atol=1e-13)


def test_hellinger_has_a_gradient_at_zero(backend: str) -> None:
    """0, as in the matrix, where it was -inf."""
    x = torch.tensor([[0.0, 0.5, 0.5]], requires_grad=True)
    y = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.0, 0.4]], requires_grad=True)
    values, _ = pairwise_topk(x, y, 2, "hellinger", backend=backend)
    values.sum().backward()
    assert x.grad[0, 0] == 0 and y.grad[1, 1] == 0
    assert bool(x.grad.isfinite().all()) and bool(y.grad.isfinite().all())
    assert float(x.grad[0, 1]) != 0
    below = pairwise_topk(-y.detach(), y.detach(), 1, "hellinger", backend=backend)[1]
    assert below.tolist() == [[-1], [-1]]


def test_a_bank_with_nan_costs_no_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are no candidates do not send the others through float64."""
    unsure = []
    whole = certified.Judge(certified.IN_TORCH.listed, lambda p, u, *out: unsure.append(u))
    monkeypatch.setattr(certified, "IN_TORCH", whole)
    x, y = torch.randn(20, 8), torch.randn(300, 8)
    y[3, 2], y[8] = torch.nan, torch.inf
    for kind in TOPK_KINDS:
        bounded.select(TopkInputs(x, y, kind=kind, k=3, largest=kind != "sqeuclidean"))
        assert not bool(unsure.pop().any()), kind


def test_many_unsure_rows_at_once() -> None:
    """Rows without a certificate go through float64 in runs of several."""
    y = torch.randn(40, 6).repeat(30, 1)
    x = torch.randn(700, 6)
    labels = torch.arange(700) % 5, torch.arange(1200) % 5
    given = dict(x_labels=labels[0], y_labels=labels[1], match="different", exclude=None)
    exclude = torch.randint(0, 1200, (700, 2))
    for metric in ("dot", "euclidean"):
        given["exclude"] = exclude
        a, b = (
            pairwise_topk(x, y, 3, metric, backend=n, **given) for n in ("bounded", "reference")
        )
        assert torch.equal(a[1], b[1])

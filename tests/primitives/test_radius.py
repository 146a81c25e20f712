"""`radius_search`: exactly the pairs whose value in float64 is within, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses import pairwise_topk, quantize_rows, radius_search
from fused_losses.pairwise.distance import pairwise_distance
from fused_losses.primitives.topk import within
from fused_losses.primitives.topk.listed import scores_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EDGES = {
    "euclidean": 2.0,
    "sqeuclidean": 5.0,
    "cosine": 0.6,
    "angular": 0.4,
    "correlation": 0.7,
    "dot": 0.8,
    "cityblock": 4.0,
    "chebyshev": 1.5,
}


def table(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Every value in float64. [N, M]"""
    x, y = x.double(), y.double()
    if metric in ("correlation", "cityblock", "chebyshev"):
        return pairwise_distance(x, y, metric, backend="reference")
    kind = "sqeuclidean" if metric in ("euclidean", "sqeuclidean") else "cosine"
    keys = scores_of(x, y.expand(len(x), *y.shape), "dot" if metric == "dot" else kind)
    if metric == "euclidean":
        return keys.sqrt()
    if metric == "angular":
        return keys.arccos() / torch.pi
    return 1 - keys if metric == "cosine" else keys


def agree(found: fused_losses.functional.RadiusNeighbors, values: Tensor, kept: Tensor) -> None:
    rows, columns = kept.nonzero(as_tuple=True)
    assert torch.equal(found.rows(), rows) and torch.equal(found.indices, columns)
    assert torch.equal(found.offsets.diff(), kept.sum(dim=1))
    assert found.offsets[0] == 0 and found.offsets[-1] == len(columns)
    torch.testing.assert_close(found.values.double(), values[kept], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("metric", list(EDGES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 2), (13, 90, 5), (37, 41, 17)])
def test_against_every_value(n, m, d, dtype: torch.dtype, metric: str, backend: str) -> None:
    if backend == "cuda" and metric in ("cityblock", "chebyshev"):
        return  # float64 decides, which its kernels do not take
    x, y = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    values = table(x, y, metric)
    edge = EDGES[metric]
    for largest in (None, True, False):
        above = metric == "dot" if largest is None else largest
        found = radius_search(x, y, edge, metric, largest=largest, backend=backend)
        agree(found, values, values >= edge if above else values <= edge)
        assert found.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine", "dot"])
def test_pairs_that_lie_at_the_edge(metric: str, backend: str) -> None:
    """Edges that are values themselves, and their neighbours among the floats."""
    base = 100 + torch.randn(1, 12)
    x, y = base + 0.01 * torch.randn(5, 12), base + 0.01 * torch.randn(200, 12)
    y[20:40] = y[3]
    values = table(x, y, metric)
    for edge in (values[0, 3], values[4, 100], values.flatten().median()):
        for at in (edge, edge.nextafter(edge + 1), edge.nextafter(edge - 1)):
            kept = values >= at if metric == "dot" else values <= at
            agree(radius_search(x, y, float(at), metric, backend=backend), values, kept)


def test_seconds_are_told_apart_far_from_the_origin(backend: str) -> None:
    """1.7e9 in float64: float32 knows minutes alone."""
    times = 1.7e9 + torch.arange(100, dtype=torch.float64)[:, None]
    found = radius_search(times, None, 3.0, skip_self=True, backend=backend)
    apart = (times - times.T).abs()
    agree(found, apart, (apart <= 3) & ~torch.eye(100).bool())


def test_most_pairs_are_decided_by_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, scored = [], within._scored
    monkeypatch.setattr(
        within, "_scored", lambda p, e, i, j: seen.append(len(i)) or scored(p, e, i, j)
    )
    x = torch.randn(300, 32)
    found = radius_search(x, None, 7.0, backend="bounded")
    assert len(found.indices) > 10_000 and sum(seen) < 200


@pytest.mark.parametrize("metric", ["euclidean", "dot", "cosine", "cityblock"])
def test_who_may_meet(metric: str, streamed: str) -> None:
    if streamed == "cuda":
        return
    x, y = torch.randn(12, 4), torch.randn(30, 4)
    values, edge = table(x, y, metric), EDGES[metric]
    near = values >= edge if metric == "dot" else values <= edge
    labels = torch.arange(12) % 3, torch.arange(30) % 3
    ids = torch.arange(12), torch.arange(30) // 2
    exclude = torch.stack([torch.arange(12), torch.full((12,), -1)], 1)
    same = labels[0][:, None] == labels[1]
    apart = ids[0][:, None] != ids[1]
    left = exclude[:, :1] != torch.arange(30)
    both: dict[str, Any] = dict(x_labels=labels[0], y_labels=labels[1], backend=streamed)
    agree(radius_search(x, y, edge, metric, match="same", **both), values, near & same)
    more = dict(x_ids=ids[0], y_ids=ids[1], exclude=exclude)
    found = radius_search(x, y, edge, metric, match="different", **more, **both)
    agree(found, values, near & ~same & apart & left)


@pytest.mark.float64
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot", "cityblock"])
def test_slopes(metric: str, backend: str) -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)

    def values(x: Tensor, y: Tensor) -> Tensor:
        return radius_search(x, y, EDGES[metric], metric, backend=backend).values

    assert len(values(x, y)) > 10
    assert torch.autograd.gradcheck(values, (x, y))
    second = torch.autograd.grad(values(x, y).square().sum(), x, create_graph=True)[0]
    if metric != "cityblock":
        with pytest.raises(NotImplementedError):
            torch.autograd.grad(second.sum(), x)


def test_quantized_banks_and_all_within(backend: str) -> None:
    x, bank = torch.randn(5, 8), quantize_rows(torch.randn(60, 8))
    values = table(x, bank.dequantize(), "euclidean")
    rows = bank.codes.double() * bank.scale.double()[:, None]
    values = table(x, rows, "euclidean")
    agree(radius_search(x, bank, 4.0, backend=backend), values, values <= 4)
    everything = radius_search(x, bank, float("inf"), backend=backend)
    agree(everything, values, torch.ones(5, 60).bool())
    with pytest.raises(ValueError, match="y: expected float rows"):
        radius_search(x, bank, 4.0, "cityblock")


def test_bad_rows_and_long_ones(backend: str) -> None:
    x, y = torch.randn(6, 4), torch.randn(50, 4)
    x[2, 1], y[7, 0], y[9], y[11, 0] = torch.nan, torch.nan, y[9] * 1e30, torch.inf
    for metric in ("euclidean", "dot", "cosine"):
        values = table(x, y, metric)
        kept = values >= 0.8 if metric == "dot" else values <= EDGES[metric]
        found = radius_search(x, y, EDGES[metric], metric, backend=backend)
        rows, columns = kept.nonzero(as_tuple=True)
        assert torch.equal(found.rows(), rows) and torch.equal(found.indices, columns)
        assert not (rows == 2).any() and not (columns == 7).any()


@pytest.mark.parametrize(("n", "m"), [(0, 5), (4, 0), (0, 0)])
def test_empty(n: int, m: int, backend: str) -> None:
    x, y = torch.randn(n, 3, requires_grad=True), torch.randn(m, 3, requires_grad=True)
    for metric in ("dot", "euclidean", "cosine"):
        found = radius_search(x, y, 0.5, metric, backend=backend)
        assert torch.equal(found.offsets, torch.zeros(n + 1).long()) and found.values.shape == (0,)
        found.values.sum().backward()
        assert x.grad is not None and x.grad.shape == (n, 3)


def test_the_nearest_within_are_the_nearest() -> None:
    x, y = torch.randn(40, 6), torch.randn(500, 6)
    values, index = pairwise_topk(x, y, 8)
    edge = float(values[:, -1].double().max()) + 1e-3
    found = radius_search(x, y, edge)
    for i in range(40):
        mine = slice(int(found.offsets[i]), int(found.offsets[i + 1]))
        order = found.values[mine].argsort(stable=True)[:8]
        assert torch.equal(found.indices[mine][order], index[i])


def test_memory_of_a_few_blocks() -> None:
    """16,384^2 products of float32 are a GiB."""
    plan = fused_losses.explain(radius_search, torch.randn(16_384, 32), None, 0.1)
    assert plan.peak_extra_bytes < 2**27


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(radius=-0.1), ValueError, "radius: expected"),
        (dict(radius=float("nan")), ValueError, "radius: expected"),
        (dict(radius="wide"), TypeError, "radius: expected a number"),
        (dict(radius=torch.tensor(1.0, requires_grad=True)), TypeError, "radius: .*gradient"),
        (dict(metric="best"), ValueError, "metric: expected one of"),
        (dict(match="same"), ValueError, "x_labels: expected labels"),
        (dict(base=2.0), ValueError, "base: expected None"),
        (dict(y=torch.randn(5, 4)), ValueError, r"y: expected \[M, 3\]"),
    ],
)
def test_bad_arguments(given: dict, error: type, words: str) -> None:
    given = {"y": torch.randn(5, 3), "radius": 1.0, **given}
    with pytest.raises(error, match=words):
        radius_search(torch.randn(4, 3), **given)

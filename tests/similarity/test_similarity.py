"""Similarity, attention, kernel means and transport: each against its formula; what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import widest
from pair_cases import (
    BACKENDS,
    NEAR,
    error,
    require_pairs,
    small_blocks,
)
from torch import Tensor

from fused_losses import functional as fl
from fused_losses.similarity import trilinear


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return require_pairs(request.param)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_blocks(monkeypatch):
        yield


@pytest.mark.float64
def test_a_second_derivative_of_trilinear_attention_is_refused(backend: str) -> None:
    q, k, v = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = fl.trilinear_attention(q, k, k, v, v, backend=backend).sum()
    grad = torch.autograd.grad(out, q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative.*einsum"):
        grad.sum().backward()


# ---- what is special ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [100.0, 20.0])
def test_no_flush_at_scale_100(scale: float, backend: str) -> None:
    # a fixed maximum of `scale` would leave e^-200 of these rows, which float32 flushes to zero
    x = F.normalize(torch.randn(17, 24))
    rows = fl.logsumexp_similarity(x, -x, scale=scale, match="any", skip_self=False)
    far = fl.logsumexp_similarity(x, -x[:1].expand(17, -1), scale=scale, backend=backend)
    wanted = scale * -(x.double() @ x[0].double()) + math.log(17)
    torch.testing.assert_close(far.double(), wanted, rtol=1e-5, atol=1e-4)
    assert torch.isfinite(rows).all()


def test_all_masked_rows_are_minus_infinity_without_gradient(backend: str) -> None:
    x = torch.randn(4, 3, dtype=widest(backend), requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2])
    rows, columns = fl.logsumexp_similarity(
        x, x_labels=labels, match="same", skip_self=True, cols=True, backend=backend
    )
    assert rows.isinf().tolist() == columns.isinf().tolist() == [False, False, True, True]
    grad = torch.autograd.grad(rows[:2].sum() + torch.where(rows.isinf(), 0, rows).sum(), x)[0]
    assert torch.isfinite(grad).all() and (grad[2:] == 0).all()
    out, lse = fl.similarity_attention(
        x,
        x,
        x,
        query_labels=labels,
        key_labels=labels + 1,
        match="same",
        return_lse=True,
        backend=backend,
    )
    assert (out[3] != 0).any() == (lse[3] > -torch.inf)
    assert (out[2] != 0).any() and torch.isfinite(out).all()


@pytest.mark.parametrize("similarity", ["dot", "cosine", "rbf", "euclidean"])
def test_half_the_pairs_tell_as_much_as_all(similarity: str, backend: str) -> None:
    x = torch.randn(13, 4, dtype=widest(backend))
    x[5] = x[6]  # duplicates
    call = partial(
        fl.logsumexp_similarity, similarity=similarity, skip_self=True, cols=True, backend=backend
    )
    half, whole = call(x), call(x, x.clone())
    # the distance of two duplicates is the root of a rounding
    near = 1e-9 if x.dtype == torch.float64 else 2e-3
    torch.testing.assert_close(half[0], whole[0], rtol=near, atol=near)
    torch.testing.assert_close(half[0], half[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b, **o: fl.logsumexp_similarity(a, b, **o).sum(),
        lambda a, b, **o: fl.logsumexp_similarity(a, b, similarity="rbf", **o).sum(),
        lambda a, b, **o: fl.similarity_attention(a, b, a, **o).square().sum(),
        lambda a, b, **o: fl.kernel_mean(a, b, **o),
        lambda a, b, **o: fl.sinkhorn(a, b, iterations=5, **o).cost,
    ],
)
def test_one_tensor_twice_gets_both_gradients(call: Callable[..., Tensor], backend: str) -> None:
    x = torch.randn(11, 5, dtype=widest(backend), requires_grad=True)
    y = x.detach().clone().requires_grad_()
    once = torch.autograd.grad(call(x, x, backend=backend), x)[0]
    apart = torch.autograd.grad(call(x, y, backend=backend), (x, y))
    torch.testing.assert_close(once, sum(apart), **NEAR[x.dtype])


def test_far_from_the_origin_distances_keep_their_digits(backend: str) -> None:
    x, y = torch.randn(9, 6, dtype=torch.float64) + 1000, torch.randn(8, 6).double() + 1000
    wanted = (-torch.cdist(x.float().double(), y.float().double())).logsumexp(1)
    got = fl.logsumexp_similarity(x.float(), y.float(), similarity="euclidean", backend=backend)
    assert error(got.double(), wanted) <= 1e-5


@pytest.mark.parametrize("lead", [(2,), (2, 3), (0,)])
def test_leading_dimensions(lead: tuple[int, ...], backend: str) -> None:
    q, k, v = (torch.randn(*lead, n, d) for n, d in ((5, 4), (7, 4), (7, 3)))
    out, lse = fl.similarity_attention(q, k, v, return_lse=True, backend=backend)
    assert lse.shape == (*lead, 5)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
    third = fl.trilinear_attention(q, k, k, v, v, backend=backend)
    assert third.shape == (*lead, 5, 3)


def test_trilinear_blocks_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k1, k2 = (torch.randn(n, 4, dtype=torch.float64) for n in (5, 7, 6))
    v1, v2 = torch.randn(7, 3).double(), torch.randn(6, 3).double()
    tensors = [t.requires_grad_() for t in (q, k1, k2, v1, v2)]
    found = []
    for rows in (5, 12, 4096):
        monkeypatch.setattr(trilinear, "TRILINEAR_ROWS", rows)
        out = fl.trilinear_attention(*tensors, backend="bounded")
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.float64
def test_sinkhorn_meets_its_masses(backend: str) -> None:
    x, y = torch.randn(6, 3).double(), torch.randn(9, 3).double()
    a, b = torch.rand(6).double() + 0.1, torch.rand(9).double() + 0.1
    a, b = a / a.sum(), b / b.sum()
    found = fl.sinkhorn(
        x, y, eps=0.05, iterations=2000, tolerance=1e-8, x_weight=a, y_weight=b, backend=backend
    )
    cost = 1 - F.normalize(x) @ F.normalize(y).T
    plan = ((found.x_potential[:, None] + found.y_potential - cost) / 0.05).exp()
    torch.testing.assert_close(plan.sum(1), a, rtol=0, atol=1e-8)
    torch.testing.assert_close(plan.sum(0), b, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.cost, (plan * cost).sum())
    assert found.iterations < 2000
    sharp = fl.sinkhorn(x.float(), y.float(), eps=1e-3, iterations=20, backend=backend)
    assert torch.isfinite(sharp.cost)


def test_no_rows(backend: str) -> None:
    x, y = torch.zeros(0, 3), torch.randn(4, 3)
    rows, columns = fl.logsumexp_similarity(x, y, cols=True, backend=backend)
    assert rows.shape == (0,) and (columns == -torch.inf).all()
    assert (fl.logsumexp_similarity(y, x, backend=backend) == -torch.inf).all()
    assert fl.similarity_attention(x, y, y, backend=backend).shape == (0, 3)
    assert (fl.similarity_attention(y, x, x, backend=backend) == 0).all()
    assert fl.kernel_mean(x, y, backend=backend) == 0


@pytest.mark.slow
def test_compiles_whole() -> None:
    def call(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        options = {"similarity": "rbf", "backend": "bounded"}
        rows = fl.logsumexp_similarity(
            x, x_labels=labels, match="different", skip_self=True, **options
        )
        return rows.sum() + fl.similarity_attention(x, y, y, **options).sum()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 11):
        x, y = (torch.randn(n, 4, requires_grad=True) for _ in range(2))
        got, wanted = (f(x, y, torch.arange(n) % 3) for f in (compiled, call))
        torch.testing.assert_close(got, wanted)
        grads = [torch.autograd.grad(loss, x)[0] for loss in (got, wanted)]
        torch.testing.assert_close(*grads)
    torch._dynamo.reset()


# ---- what is refused ----------------------------------------------------------------------------

N, M, D = 6, 8, 5
X, Y, LABELS = torch.zeros(N, D), torch.zeros(M, D), torch.arange(N)
SHORT, REAL, BOOL = torch.arange(N - 1), torch.zeros(N), torch.zeros(N, dtype=torch.bool)

# name: (the call, the error, its words)
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "width": (
        lambda: fl.info_nce(X, torch.zeros(M, D + 1)),
        ValueError,
        "key: expected [M, 5] to match query [N, 5], got shape (8, 6), torch.float32, cpu",
    ),
    "dtype": (
        lambda: fl.info_nce(X, Y.half()),
        TypeError,
        "key: expected the dtype of query (torch.float32), got shape (8, 5), torch.float16",
    ),
    "device": (
        lambda: fl.info_nce(X, Y.to("meta")),
        ValueError,
        "key: expected the device of query (cpu), got",
    ),
    "integers": (
        lambda: fl.info_nce(X.long(), Y),
        TypeError,
        "query: expected a floating point tensor [N, D]",
    ),
    "a-list": (
        lambda: fl.supervised_contrastive([[1.0]], LABELS),
        TypeError,
        "embeddings: expected a tensor [N, D], got list",
    ),
    "one-dimension": (
        lambda: fl.circle(torch.zeros(N), LABELS),
        ValueError,
        "embeddings: expected two dimensions [N, D], got shape (6,)",
    ),
    "fewer-keys": (
        lambda: fl.info_nce(Y, X),
        ValueError,
        "key: expected at least offset + N = 8 rows with offset >= 0",
    ),
    "offset": (
        lambda: fl.info_nce(X, Y, offset=3),
        ValueError,
        "key: expected at least offset + N = 9 rows",
    ),
    "sigmoid-offset": (
        lambda: fl.sigmoid_contrastive(X, Y, offset=-1),
        ValueError,
        "y: expected at least offset + N = 5 rows with offset >= 0",
    ),
    "temperature-zero": (
        lambda: fl.info_nce(X, Y, temperature=0.0),
        ValueError,
        "temperature: expected a value > 0, got 0.0",
    ),
    "temperature-negative-tensor": (
        lambda: fl.supervised_contrastive(X, LABELS, temperature=torch.tensor(-0.5)),
        ValueError,
        "temperature: expected a value > 0, got -0.5",
    ),
    "temperature-a-vector": (
        lambda: fl.nt_xent(X, LABELS, temperature=torch.ones(N)),
        ValueError,
        "temperature: expected a number or a scalar tensor, got shape (6,)",
    ),
    "temperature-nan": (
        lambda: fl.info_nce(X, Y, temperature=float("nan")),
        ValueError,
        "temperature: expected a value > 0, got nan",
    ),
    "temperature-a-word": (
        lambda: fl.info_nce(X, Y, temperature="warm"),
        TypeError,
        "temperature: expected a number or a scalar tensor, got str",
    ),
    "labels-short": (
        lambda: fl.supervised_contrastive(X, SHORT),
        ValueError,
        "labels: expected shape (6,), got shape (5,), torch.int64, cpu",
    ),
    "labels-real": (
        lambda: fl.multi_similarity(X, REAL),
        TypeError,
        "labels: expected an integer tensor, got shape (6,), torch.float32, cpu",
    ),
    "labels-bool": (
        lambda: fl.lifted_structure(X, BOOL),
        TypeError,
        "labels: expected an integer tensor, got shape (6,), torch.bool, cpu",
    ),
    "labels-elsewhere": (
        lambda: fl.soft_nearest_neighbor(X, LABELS.to("meta")),
        ValueError,
        "labels: expected device cpu, got shape (6,), torch.int64, meta",
    ),
    "key-labels-missing": (
        lambda: fl.info_nce(X, Y, labels=LABELS),
        ValueError,
        "key_labels: expected shape (8,), got shape (6,)",
    ),
    "key-labels-alone": (
        lambda: fl.info_nce(X, Y, key_labels=torch.arange(M)),
        ValueError,
        "labels: expected a tensor beside key_labels, got None",
    ),
    "ids-short": (
        lambda: fl.info_nce(X, Y, ids=SHORT, key_ids=torch.arange(M)),
        ValueError,
        "ids: expected shape (6,), got shape (5,)",
    ),
    "exclude-flat": (
        lambda: fl.info_nce(X, Y, exclude=LABELS),
        ValueError,
        "exclude: expected shape (6, any), got shape (6,)",
    ),
    "negatives-flat": (
        lambda: fl.info_nce(X, Y, negatives=Y),
        ValueError,
        "negatives: expected shape (6, K, 5), got shape (8, 5)",
    ),
    "negatives-dtype": (
        lambda: fl.info_nce(X, Y, negatives=torch.zeros(N, 2, D).double()),
        TypeError,
        "negatives: expected the dtype of query (torch.float32)",
    ),
    "queue-width": (
        lambda: fl.info_nce(X, Y, queue=[Y, torch.zeros(4, D - 1)]),
        ValueError,
        "queue: expected [Q, 5] to match query [N, 5], got shape (4, 4)",
    ),
    "queue-labels-without-labels": (
        lambda: fl.info_nce(X, Y, queue=Y, queue_labels=torch.arange(M)),
        ValueError,
        "queue_labels: expected labels for the queries too",
    ),
    "queue-labels-without-queue": (
        lambda: fl.info_nce(X, X, labels=LABELS, queue_labels=LABELS),
        ValueError,
        "queue_labels: expected None without a queue",
    ),
    "queue-labels-too-few": (
        lambda: fl.info_nce(X, X, labels=LABELS, queue=[Y, Y], queue_labels=torch.arange(M)),
        ValueError,
        "queue_labels: expected one tensor a bank (2), got 1",
    ),
    "hardness": (
        lambda: fl.info_nce(X, Y, hardness=-1.0),
        ValueError,
        "hardness: expected a value >= 0, got -1",
    ),
    "reduction": (
        lambda: fl.info_nce(X, Y, reduction="max"),
        ValueError,
        "reduction: expected one of mean, sum, none, got 'max'",
    ),
    "reduction-none-of-unequal-sides": (
        lambda: fl.info_nce(
            X, Y, labels=LABELS, key_labels=torch.arange(M), symmetric=True, reduction="none"
        ),
        ValueError,
        "reduction: expected 'mean' or 'sum' for symmetric=True with labels and N=6 != M=8",
    ),
    "precision": (
        lambda: fl.supervised_contrastive(X, LABELS, precision="fp8"),
        ValueError,
        "precision: expected one of fp32, tf32, mixed, bf16, got 'fp8'",
    ),
    "form": (
        lambda: fl.supervised_contrastive(X, LABELS, form="middle"),
        ValueError,
        "form: expected one of out, in, got 'middle'",
    ),
    "anchors": (
        lambda: fl.supervised_contrastive(X, LABELS, anchor_count=7),
        ValueError,
        "anchor_count: expected a value in [0, 6] for embeddings of shape (6, 5)",
    ),
    "odd-views": (
        lambda: fl.nt_xent(X[:5]),
        ValueError,
        "embeddings: expected an even number of rows without labels",
    ),
    "beta": (
        lambda: fl.multi_similarity(X, LABELS, beta=0.0),
        ValueError,
        "beta: expected a value > 0, got 0.0",
    ),
    "n-pairs": (
        lambda: fl.n_pairs(X, Y),
        ValueError,
        "positives: expected shape (6, 5), got shape (8, 5)",
    ),
    "proxy-label-too-high": (
        lambda: fl.proxy_nca(X, Y, LABELS + 4),
        IndexError,
        "labels: expected class ids in [0, 8), got values from 8 to 9 in 2 of 6 rows",
    ),
    "proxy-label-minus-one": (
        lambda: fl.proxy_anchor(X, Y, LABELS - 1),
        IndexError,
        "labels: expected class ids in [0, 8), got values from -1 to -1 in 1 of 6 rows",
    ),
    "similarity": (
        lambda: fl.logsumexp_similarity(X, Y, similarity="l1"),
        ValueError,
        "similarity: expected one of dot, cosine, rbf, euclidean, got 'l1'",
    ),
    "match-without-labels": (
        lambda: fl.logsumexp_similarity(X, Y, match="same"),
        ValueError,
        "x_labels: expected labels for match='same'",
    ),
    "groups-one-sided": (
        lambda: fl.logsumexp_similarity(X, Y, x_groups=LABELS),
        ValueError,
        "y_groups: expected a tensor beside x_groups, got None",
    ),
    "neither-rows-nor-columns": (
        lambda: fl.logsumexp_similarity(X, Y, rows=False),
        ValueError,
        "rows, cols: expected at least one of them True",
    ),
    "values-short": (
        lambda: fl.similarity_attention(X, Y, X),
        ValueError,
        "value: expected 8 rows to match key, got shape (6, 5)",
    ),
    "leading-dimensions": (
        lambda: fl.similarity_attention(X[None], Y, Y),
        ValueError,
        "key: expected [..., rows, D] with the leading dimensions of query (1, 6, 5)",
    ),
    "attention-labels": (
        lambda: fl.similarity_attention(X, Y, Y, match="same"),
        ValueError,
        "query_labels: expected labels for match='same', got None",
    ),
    "trilinear-no-items": (
        lambda: fl.trilinear_attention(X[None][:0], Y[None][:0, :, :2], *[Y[None][:0]] * 3),
        ValueError,
        "k1: expected [J, 5] to match q [N, 5], got shape (8, 2)",
    ),
    "trilinear-values": (
        lambda: fl.trilinear_attention(X, Y, Y, Y, torch.zeros(M, 2)),
        ValueError,
        "v2: expected [L, 5] to match v1, got shape (8, 2)",
    ),
    "kernel": (
        lambda: fl.kernel_mean(X, Y, "cubic"),
        ValueError,
        "kernel: expected one of gaussian, laplacian, got 'cubic'",
    ),
    "bandwidth": (
        lambda: fl.mmd(X, Y, bandwidth=-2.0),
        ValueError,
        "bandwidth: expected a value > 0, got -2.0",
    ),
    "unpaired": (
        lambda: fl.hsic(X, Y),
        ValueError,
        "y: expected 6 rows to match x, got shape (8, 5)",
    ),
    "masses": (
        lambda: fl.sinkhorn(X, Y, x_weight=torch.ones(M)),
        ValueError,
        "x_weight: expected shape (6,) one mass a row, got shape (8,)",
    ),
    "iterations": (
        lambda: fl.sinkhorn(X, Y, iterations=0),
        ValueError,
        "iterations: expected a value >= 1, got 0",
    ),
    "endless": (
        lambda: fl.sinkhorn(X, Y, iterations=float("inf")),
        TypeError,
        "iterations: expected an integer >= 1, got inf",
    ),
    "eps": (
        lambda: fl.sinkhorn(X, Y, eps=0.0),
        ValueError,
        "eps: expected a value > 0, got 0.0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    call, kind, words = REFUSED[name]
    with pytest.raises(kind, match=re.escape(words)):
        call()

"""Similarity, attention, kernel means and transport refuse what does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from fused_losses import functional as fl

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
        "reduction: expected 'mean' or 'sum' for symmetric=True with labels, positive_weight or "
        "targets and N=6 != M=8, got 'none'",
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
        "similarity: expected one of dot, cosine, rbf, euclidean, power, got 'l1'",
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
    "stop": (
        lambda: fl.sinkhorn(X, Y, stop="never"),
        ValueError,
        "stop: expected one of masses, scalings, got 'never'",
    ),
    "unbalanced": (
        lambda: fl.sinkhorn(X, Y, unbalanced=(1.0, -1.0)),
        ValueError,
        "unbalanced: expected a value > 0, got -1.0",
    ),
    "unbalanced-sides": (
        lambda: fl.sinkhorn(X, Y, unbalanced=(1.0, 1.0, 1.0)),
        ValueError,
        "unbalanced: expected a number or (of x, of y), got (1.0, 1.0, 1.0)",
    ),
    "carried": (
        lambda: fl.sinkhorn(X, Y, iterations=1).apply(X),
        ValueError,
        "values: expected 8 rows, one for each of y, got shape (6, 5)",
    ),
    "carried-back": (
        lambda: fl.sinkhorn(X, Y, iterations=1).apply(X.double(), transpose=True),
        TypeError,
        "values: expected the dtype of x (torch.float32), got shape (6, 5), torch.float64",
    ),
    "no rows to match": (
        lambda: fl.sinkhorn_divergence(X, Y[:0]),
        ValueError,
        "x, y: expected at least one row each, got N=6, M=0",
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

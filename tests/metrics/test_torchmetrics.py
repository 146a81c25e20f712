"""Retrieval, verification and kNN as torchmetrics has them: an oracle that nobody here wrote.

Scores are products of normal draws, so that none tie, where orders differ by convention; theirs
counts no row whose score is not above 0, and is given exponentials.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_losses import metrics

classification = pytest.importorskip("torchmetrics.functional.classification")
theirs = pytest.importorskip("torchmetrics.functional.retrieval")


def batch(n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = torch.randn(n, 6, dtype=torch.float64), torch.randn(m, 6, dtype=torch.float64)
    labels, ref_labels = torch.randint(0, 5, (n,)), torch.randint(0, 4, (m,))
    labels[0] = 4  # of no row of the gallery
    return x, labels, y, ref_labels


def each_query(function, scores: Tensor, hits: Tensor, **options) -> list[float]:
    """Of the queries that have a relevant row; theirs is 0 of any other."""
    pairs = zip(scores, hits, strict=True)
    return [float(function(row, hit, **options)) for row, hit in pairs if bool(hit.any())]


# ours, theirs; k None: the whole gallery, where theirs divides by what the ranking found
SAME = [
    *(("recall_at_k", theirs.retrieval_hit_rate, k) for k in (1, 4, 30)),
    *(("precision_at_k", theirs.retrieval_precision, k) for k in (1, 4, 30)),
    *(("ndcg", theirs.retrieval_normalized_dcg, k) for k in (1, 4, None)),
    ("map_at_k", theirs.retrieval_average_precision, 30),
    ("r_precision", theirs.retrieval_r_precision, None),
    *(("mean_reciprocal_rank", theirs.retrieval_reciprocal_rank, k) for k in (2, None)),
]


@pytest.mark.parametrize(("name", "function", "k"), SAME)
def test_retrieval(name: str, function, k: int | None, backend: str) -> None:
    x, labels, y, ref_labels = batch(12, 30)
    if backend == "cuda":
        x, y = x.float(), y.float()
    hits = labels[:, None] == ref_labels
    want = each_query(function, (x @ y.T).exp(), hits, **({} if k is None else {"top_k": k}))
    given = dict(metric="dot", per_query=True, backend=backend)
    given |= {"k": k} if k is not None or name == "ndcg" else {}
    found = getattr(metrics, name)(x, labels, y, ref_labels, **given)
    assert 0 < found.left_out and found.queries == len(want)
    own = found.per_query[~found.per_query.isnan()]
    # theirs are in float32
    assert own.tolist() == pytest.approx(want, rel=1e-5)
    assert found.value == pytest.approx(sum(want) / len(want), rel=1e-5)


@pytest.mark.parametrize("k", [1, 6, None])
@pytest.mark.parametrize("gain", ["linear", "exponential"])
def test_graded(gain: str, k: int | None, backend: str) -> None:
    x, _, y, _ = batch(9, 20)
    grades = torch.randint(0, 4, (9, 20))
    grades[3] = 0
    judged = torch.arange(20).expand(9, 20)
    # theirs is linear: the exponential form is that of other grades
    given = grades if gain == "linear" else 2**grades - 1
    want = [
        float(theirs.retrieval_normalized_dcg(row, grade, top_k=k))
        for row, grade in zip((x @ y.T).exp(), given, strict=True)
        if bool(grade.any())
    ]
    options = dict(judged=judged, grades=grades, gain=gain, k=k, metric="dot", backend=backend)
    found = metrics.ndcg(x, None, y, per_query=True, **options)
    own = found.per_query[~found.per_query.isnan()]
    assert own.tolist() == pytest.approx(want, rel=1e-5) and found.queries == 8


def test_average_precision_of_cut_rankings(backend: str) -> None:
    """Theirs divides by the relevant rows found, ours by those that k rows can hold."""
    x, labels, y, ref_labels = batch(10, 30)
    scores, hits = (x @ y.T).exp(), labels[:, None] == ref_labels
    want = []
    for row, hit in zip(scores, hits, strict=True):
        if bool(hit.any()):
            found = int(hit[row.topk(5).indices].sum())
            cut = float(theirs.retrieval_average_precision(row, hit, top_k=5))
            want.append(cut * found / min(int(hit.sum()), 5))
    given = dict(k=5, metric="dot", backend=backend)
    value = metrics.map_at_k(x, labels, y, ref_labels, **given).value
    assert value == pytest.approx(sum(want) / len(want), rel=1e-5)


@pytest.mark.parametrize("ties", [False, True])
def test_curves(ties: bool) -> None:
    same = torch.rand(300) < 0.4
    scores = torch.randn(300, dtype=torch.float64) + same
    scores = scores.round(decimals=1) if ties else scores
    # their ranks, in (0, 1): theirs makes sigmoids of other numbers, which differ for some ties
    ranks = scores.unique(return_inverse=True)[1]
    squeezed = (ranks + 1) / (ranks.max() + 2).double()
    far, tar, _ = classification.binary_roc(squeezed, same.int())
    curve = metrics.roc(scores, same)
    torch.testing.assert_close(curve.far, far.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(curve.tar, tar.double(), rtol=1e-6, atol=1e-6)
    area = float(classification.binary_auroc(squeezed, same.int()))
    assert metrics.auc(scores, same) == pytest.approx(area, rel=1e-6)
    # theirs is the nearest point of the curve, ours lies on the line between two
    rate = float(classification.binary_eer(squeezed, same.int()))
    apart = (curve.far - (1 - curve.tar)).abs().min()
    assert metrics.eer(scores, same).rate == pytest.approx(rate, abs=float(apart) + 1e-6)
    for share in (0.0, 0.05, 0.3):
        at = classification.binary_sensitivity_at_specificity(
            squeezed, same.int(), min_specificity=1 - share
        )
        assert metrics.tar_at_far(scores, same, share) == pytest.approx(float(at[0]), abs=1e-6)


def test_all_pairs(backend: str) -> None:
    x, labels = torch.randn(40, 4), torch.randint(0, 6, (40,))
    first, second = torch.triu_indices(40, 40, 1)
    scores = torch.cosine_similarity(x[first].double(), x[second].double())
    same = labels[first] == labels[second]
    shares = [0.0, 0.1, 0.5]
    found = metrics.all_pairs_tar_at_far(x, labels, shares, backend=backend)
    for share in shares:
        at = classification.binary_sensitivity_at_specificity(
            (scores + 1) / 2, same.int(), min_specificity=1 - share
        )
        assert found[share].tar == pytest.approx(float(at[0]), abs=1e-6)


def test_closed_set_accuracy(backend: str) -> None:
    """The nearest row's label, as a classifier: recall, cmc and kNN say the same."""
    x, labels, y, ref_labels = batch(25, 30)
    labels = labels.clamp_max(3)
    told = ref_labels[(x @ y.T).argmax(dim=1)]
    want = float(classification.multiclass_accuracy(told, labels, 4, average="micro"))
    given = dict(metric="dot", backend=backend)
    assert metrics.recall_at_k(x, labels, y, ref_labels, **given).value == pytest.approx(want)
    curve = metrics.cmc(x, labels, y, ref_labels, k=3, **given)
    assert float(curve.value[0]) == pytest.approx(want)
    voted = metrics.knn_classify(x, y, ref_labels, k=1, **given).labels
    assert torch.equal(voted, told)

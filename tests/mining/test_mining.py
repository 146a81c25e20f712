"""Mining against explicit loops: every choice of either side, ranges, ties, memories, NaN."""

from __future__ import annotations

import itertools
import math

import mining_checks
import pytest
import torch
from conftest import widest
from mining_checks import LABELS, X, grid
from mining_formulas import (
    allowed,
    batch,
    lines,
    matrix,
    triplets_by_loops,
)
from torch import Tensor

from fused_losses.mining import batch as mining_batch
from fused_losses.mining import triplets as mining
from fused_losses.mining.lists import Triplets
from fused_losses.mining.pairs import mine_pairs
from fused_losses.mining.triplets import mine_triplets

block = mining_checks.block  # a fixture of these tests

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
CHOICES = [c for c in itertools.product(mining.CHOICES, repeat=2) if c != ("semihard", "semihard")]


def check(found: Triplets, want: list, d: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """The same triplets in the same order, their distances, and who was left out."""
    assert lines(found) == want
    assert found.left_out == len(d) - len({i for i, _, _ in want})
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for index, value in ((1, found.positive_distance), (2, found.negative_distance)):
        assert value.dtype == wide and not value.requires_grad
        expected = [float(d[line[0], line[index]]) for line in want]
        torch.testing.assert_close(
            value.double(),
            torch.tensor(expected, dtype=torch.float64),
            atol=BOUNDS[dtype] * 10,
            rtol=BOUNDS[dtype],
        )


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine", "dot", "cityblock"])
@pytest.mark.parametrize(("positive", "negative"), CHOICES)
def test_every_choice(positive: str, negative: str, metric: str, backend: str) -> None:
    dtype = widest(backend)
    x, labels = batch(23, 5, 5, dtype)
    d = matrix(x, x, metric)
    same, different = allowed(labels, labels, True)
    sign = -1 if metric in mining_batch.LARGEST_IS_NEAREST else 1
    want = triplets_by_loops(d, sign, same, different, positive, negative)
    given = dict(positive=positive, negative=negative, metric=metric, backend=backend)
    check(mine_triplets(x, labels, **given), want, d, dtype)
    # the same tensor is the batch itself
    check(mine_triplets(x, labels, x, labels, **given), want, d, dtype)


@pytest.mark.parametrize("metric", ["cityblock", "dot"])  # exact on small integers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("positive", "negative"), CHOICES)
def test_ties_go_to_the_lowest_index(
    positive, negative, dtype, metric, backend: str, block: int
) -> None:
    x, labels = grid(19, 3, 3, dtype)
    y, ref_labels = grid(27, 3, 3, dtype)
    d = matrix(x, y, metric)
    sign = -1 if metric == "dot" else 1
    want = triplets_by_loops(d, sign, *allowed(labels, ref_labels, False), positive, negative)
    given = dict(positive=positive, negative=negative, metric=metric, backend=backend)
    check(mine_triplets(x, labels, y, ref_labels, **given), want, d, dtype)


@pytest.mark.parametrize(
    ("positive", "negative"),
    [("all", "semihard"), ("semihard", "all"), ("hardest", "semihard"), ("hardest", "hardest")],
)
def test_equal_rows_tie_whatever_rounds(positive: str, negative: str, backend: str) -> None:
    """Columns far apart in a block whose rows are one row: no rounding of a product parts them."""
    kinds, which = 3 + torch.randn(12, 33), torch.randint(0, 12, (203,))
    given: dict = dict(positive=positive, negative=negative, backend=backend)
    found = mine_triplets(kinds[which], which % 3, **given)
    assert len(found.anchor)
    for side, chosen in ((positive, found.positive), (negative, found.negative)):
        if side != "all":
            equal = which[chosen][:, None] == which
            equal[torch.arange(len(chosen)), found.anchor] = False
            assert torch.equal(chosen, equal.int().argmax(1))


@pytest.mark.float64
@pytest.mark.parametrize("margin", [None, 0.3, -0.2])
@pytest.mark.parametrize("rule", mining.TRIPLETS)
@pytest.mark.parametrize(
    ("positive", "negative"),
    [("all", "all"), ("hardest", "hardest"), ("all", "semihard"), ("easiest", "all")],
)
def test_rules(positive, negative, rule, margin, backend: str) -> None:
    x, labels = batch(17, 4, 4)
    d = matrix(x, x, "euclidean")
    limit = math.inf if margin is None else margin
    keep = {
        "all": lambda g: g <= limit,
        "hard": lambda g: g <= 0 and g <= limit,
        "semihard": lambda g: 0 < g <= limit,
        "easy": lambda g: g > (0 if margin is None else margin),
    }[rule]
    want = triplets_by_loops(d, 1, *allowed(labels, labels, True), positive, negative, keep)
    given = dict(positive=positive, negative=negative, triplets=rule, margin=margin)
    check(mine_triplets(x, labels, **given, backend=backend), want, d)


@pytest.mark.float64
@pytest.mark.parametrize(("positive", "negative"), CHOICES)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_ranges(metric: str, positive: str, negative: str, backend: str) -> None:
    x, labels = batch(21, 4, 4)
    d = matrix(x, x, metric)
    ranges = ((0.5, 2.5), (1.0, 3.0)) if metric == "euclidean" else ((-0.9, 0.6), (-0.4, 0.5))
    sign = 1 if metric == "euclidean" else -1
    pairs = allowed(labels, labels, True)
    want = triplets_by_loops(d, sign, *pairs, positive, negative, ranges=ranges)
    given = dict(positive=positive, negative=negative, metric=metric, backend=backend)
    both = dict(positive_range=ranges[0], negative_range=ranges[1])
    check(mine_triplets(x, labels, **both, **given), want, d)
    want = triplets_by_loops(d, sign, *pairs, positive, negative, ranges=(None, ranges[1]))
    check(mine_triplets(x, labels, negative_range=ranges[1], **given), want, d)


@pytest.mark.parametrize("choice", [("hardest", "hardest"), ("all", "semihard")])
def test_ids_are_never_paired(choice: tuple[str, str], backend: str) -> None:
    dtype = widest(backend)
    x, labels = batch(12, 4, 3, dtype)
    y, ref_labels = batch(20, 4, 3, dtype)
    y[:6], ref_labels[:6] = x[3:9], labels[3:9]
    ids, ref_ids = torch.arange(12) + 100, torch.arange(20) + 103
    d = matrix(x, y, "euclidean")
    pairs = allowed(labels, ref_labels, False, ids, ref_ids)
    want = triplets_by_loops(d, 1, *pairs, *choice)
    given = dict(positive=choice[0], negative=choice[1], backend=backend)
    found = mine_triplets(x, labels, y, ref_labels, ids=ids, ref_ids=ref_ids, **given)
    check(found, want, d, dtype)
    assert bool((ids[found.anchor] != ref_ids[found.positive]).all())


@pytest.mark.float64
@pytest.mark.parametrize("choice", [("hardest", "hardest"), ("all", "hardest"), ("all", "all")])
def test_normalize_and_blocks(choice: tuple[str, str], backend: str, block: int) -> None:
    x, labels = batch(15, 4, 3)
    given = dict(positive=choice[0], negative=choice[1], backend=backend)
    unit = x / x.norm(dim=1, keepdim=True)
    assert lines(mine_triplets(x, labels, normalize=True, **given)) == lines(
        mine_triplets(unit, labels, **given)
    )


def test_blocks_of_a_real_size(backend: str) -> None:
    """More than one block at the size that is in use."""
    rows = 400 if backend == "cuda" else 1500  # one block: executed a thread at a time
    x, labels = grid(rows, 6, 40, torch.float32)
    d = matrix(x, x, "dot")
    others = torch.where(labels[:, None] == labels, d, torch.inf).fill_diagonal_(torch.inf)
    p, n = others.argmin(dim=1), torch.where(labels[:, None] != labels, d, -torch.inf).argmax(dim=1)
    given = dict(metric="dot", backend=backend)
    for found in (
        mine_triplets(x, labels, **given),
        mine_triplets(x, labels, **given, positive_range=(-1e9, 1e9)),
    ):
        assert torch.equal(found.anchor, torch.arange(rows))
        assert torch.equal(found.positive, p) and torch.equal(found.negative, n)


@pytest.mark.parametrize("choice", CHOICES)
def test_nothing_to_mine(choice: tuple[str, str], backend: str) -> None:
    given = dict(positive=choice[0], negative=choice[1], backend=backend)
    x = torch.randn(6, 3)
    for labels in (torch.zeros(6).long(), torch.arange(6)):
        found = mine_triplets(x, labels, **given)
        assert len(found.anchor) == 0 and found.left_out == 6
        assert found.negative_distance.dtype == torch.float32
    none = torch.zeros(0).long()
    found = mine_triplets(x[:0], none, **given)
    assert len(found.anchor) == 0 and found.left_out == 0
    found = mine_triplets(x, torch.arange(6), x[:0], none, **given)
    assert len(found.anchor) == 0 and found.left_out == 6
    found = mine_triplets(x[:1], none.new_zeros(1), **given)
    assert len(found.anchor) == 0 and found.left_out == 1


@pytest.mark.parametrize("choice", CHOICES)
def test_nan_and_inf_are_contained(choice: tuple[str, str], backend: str) -> None:
    dtype = widest(backend)
    x, labels = batch(14, 3, 2, dtype)
    x[4, 1] = math.nan
    d = matrix(x, x, "euclidean")
    same, different = allowed(labels, labels, True)
    same, different = (
        [[j for j in row if not math.isnan(d[i, j])] for i, row in enumerate(side)]
        for side in (same, different)
    )
    want = triplets_by_loops(d, 1, same, different, *choice)
    given = dict(positive=choice[0], negative=choice[1], backend=backend)
    check(mine_triplets(x, labels, **given), want, d, dtype)
    x[4, 1] = math.inf
    found = mine_triplets(x, labels, **given)
    assert int(found.negative.max()) < 14 and int(found.negative.min()) >= 0


def test_fields_and_gradients(backend: str) -> None:
    x, labels = batch(8, 3, 2, widest(backend))
    found = mine_triplets(x.requires_grad_(), labels, backend=backend)
    a, p, n, near, _ = found
    assert all(t.dtype == torch.int64 for t in (a, p, n)) and not near.requires_grad
    assert found._fields == (
        "anchor",
        "positive",
        "negative",
        "positive_distance",
        "negative_distance",
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = mine_triplets(x, labels, backend=backend)
    assert lines(again) == lines(found) and torch.equal(again.positive_distance, near)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(embeddings=[1.0]), TypeError, "embeddings: expected a tensor"),
        (dict(embeddings=X.long()), TypeError, "embeddings: expected a floating"),
        (dict(embeddings=X[0]), ValueError, "embeddings: expected two"),
        (dict(labels=LABELS.float()), TypeError, "labels: expected an integer"),
        (dict(labels=LABELS[:3]), ValueError, r"labels: expected shape \(4"),
        (dict(ref_labels=LABELS), ValueError, "ref_embeddings: expected a tensor"),
        (dict(ref_embeddings=X.clone()), ValueError, "ref_labels: expected a tensor"),
        (
            dict(ref_embeddings=torch.randn(4, 2), ref_labels=LABELS),
            ValueError,
            r"ref_embeddings: expected \[M, 3\]",
        ),
        (
            dict(ref_embeddings=X.double(), ref_labels=LABELS),
            TypeError,
            "ref_embeddings: expected the dtype",
        ),
        (dict(ref_embeddings=X.clone(), ref_labels=LABELS[:1]), ValueError, "ref_labels: expected"),
        (
            dict(ids=LABELS, ref_embeddings=X.clone(), ref_labels=LABELS),
            ValueError,
            "ref_ids: expected a tensor",
        ),
        (dict(ids=LABELS[:2]), ValueError, "ids: expected shape"),
        (dict(metric="manhattan"), ValueError, "metric: expected one of"),
        (dict(metric="euclidean", p=3.0), ValueError, "p: expected no value"),
        (dict(metric="minkowski", p=-1.0), ValueError, "p: expected a finite value > 0"),
        (dict(positive_range=3), TypeError, "positive_range: expected"),
        (dict(negative_range=(2, 1)), ValueError, "negative_range: expected low"),
        (dict(negative_range=(1, "a")), TypeError, "negative_range: expected a number"),
        (dict(precision="half"), ValueError, "precision: expected one of"),
    ],
)
@pytest.mark.parametrize("mine", [mine_triplets, mine_pairs])
def test_bad_input(mine, change: dict, error: type, words: str) -> None:
    given = dict(embeddings=X, labels=LABELS) | change
    with pytest.raises(error, match=words):
        mine(**given)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(positive="hard"), ValueError, "positive: expected one of"),
        (dict(negative="worst"), ValueError, "negative: expected one of"),
        (dict(triplets="both"), ValueError, "triplets: expected one of"),
        (dict(positive="semihard", negative="semihard"), ValueError, "negative: expected 'hard"),
        (dict(margin="0.2"), TypeError, "margin: expected a number"),
        (dict(margin=math.nan), ValueError, "margin: expected a number"),
    ],
)
def test_bad_choices_of_triplets(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        mine_triplets(X, LABELS, **change)

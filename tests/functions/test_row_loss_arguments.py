"""Losses over rows and their primitive refuse what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_losses.functions import centroids, margin_pairs, neighbours, variance
from fused_losses.functions import chosen_triplets as ct
from fused_losses.functions import ranking as rl
from fused_losses.functions import triplets as tl
from fused_losses.functions.angular import angular
from fused_losses.primitives.row_rules.inputs import RowInputs
from fused_losses.primitives.row_rules.op import row_losses

X, L = torch.randn(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: tl.all_triplets(X[0], L), ValueError, "embeddings: expected two dim"),
        (lambda: tl.all_triplets(X.long(), L), TypeError, "embeddings: expected a floating"),
        (lambda: tl.all_triplets(X, L[:3]), ValueError, "labels: expected shape"),
        (lambda: tl.all_triplets(X, L.float()), TypeError, "labels: expected an integer"),
        (lambda: tl.all_triplets(X, L, X), ValueError, "ref_labels: expected a tensor beside ref"),
        (lambda: tl.all_triplets(X, L, None, L), ValueError, "ref_embeddings: expected a tensor"),
        (lambda: tl.all_triplets(X, L, X[:, :2], L), ValueError, "ref_embeddings: expected .M, 3"),
        (lambda: tl.all_triplets(X, L, X.double(), L), TypeError, "ref_embeddings: expected the d"),
        (lambda: tl.all_triplets(X, L, X, L[:2]), ValueError, "ref_labels: expected shape"),
        (lambda: tl.all_triplets(X, L, margin=-1.0), ValueError, "margin: expected a value >= 0"),
        (lambda: tl.all_triplets(X, L, triplets="some"), ValueError, "triplets: expected one of"),
        (lambda: tl.all_triplets(X, L, triplets="easy"), ValueError, "triplets: expected smooth"),
        (lambda: tl.all_triplets(X, L, distance="l1"), ValueError, "distance: expected one of"),
        (lambda: tl.all_triplets(X, L, reduction="max"), ValueError, "reduction: expected one"),
        (lambda: tl.all_triplets(X, L, precision="int8"), ValueError, "precision: expected one"),
        (lambda: tl.harmonic_triplet(X, L, X[:2]), ValueError, "frozen_labels: expected shape"),
        (lambda: tl.harmonic_triplet(X, L, X, triplets="easy"), ValueError, "triplets: expected"),
        (lambda: tl.triplet_margin(X, X[:3], X), ValueError, "positive: expected shape"),
        (lambda: tl.triplet_margin(X, X, X[:, :2]), ValueError, "negative: expected .T, 3"),
        (lambda: tl.triplet_margin(X, X, X.double()), TypeError, "negative: expected the dtype"),
        (lambda: tl.triplet_margin(X, X, X, margin=0.0), ValueError, "margin: expected a value >"),
        (lambda: tl.triplet_margin(X, X, X, triplets=(L, L)), TypeError, "triplets: expected"),
        (lambda: tl.triplet_margin(X, X, X, triplets=(L, L, L + 1)), IndexError, "triplets, neg"),
        (lambda: tl.triplet_margin(X, X, X, triplets=(L, L[:2], L)), ValueError, "triplets, pos"),
        (lambda: ct.batch_hard_triplet(X, L, margin=-1), ValueError, "margin: expected a value"),
        (lambda: ct.batch_easy_hard_triplet(X, L, positive="all"), ValueError, "positive: expect"),
        (
            lambda: ct.batch_easy_hard_triplet(X, L, positive="semihard", negative="semihard"),
            ValueError,
            "negative: expected another",
        ),
        (lambda: centroids.centroid_triplet(X, L[:2]), ValueError, "labels: expected shape"),
        (
            lambda: centroids.prototype_triplet(X, X[:2], L),
            IndexError,
            "labels: expected class ids",
        ),
        (
            lambda: margin_pairs.margin_loss(X, L, beta=torch.ones(2)),
            IndexError,
            "labels: expected class",
        ),
        (lambda: margin_pairs.margin_loss(X, L, beta="1"), TypeError, "beta: expected a number"),
        (lambda: margin_pairs.margin_loss(X, L, per="row"), ValueError, "per: expected one of"),
        (
            lambda: margin_pairs.snr_contrastive(X, L, zero_mean_weight=-1),
            ValueError,
            "zero_mean_weight: e",
        ),
        (lambda: rl.tuplet_margin(X, L, scale=0.0), ValueError, "scale: expected a value > 0"),
        (lambda: angular(X, L, alpha=90.0), ValueError, "alpha: expected degrees"),
        (lambda: rl.ranked_list(X, L, imbalance=2.0), ValueError, "imbalance: expected a value in"),
        (lambda: rl.fast_ap(X, L, bins=0), ValueError, "bins: expected a value >= 1"),
        (lambda: rl.fast_ap(X, L, bins=2.5), TypeError, "bins: expected an integer"),
        (lambda: rl.histogram(X, L, bins=True), TypeError, "bins: expected an integer"),
        (
            lambda: variance.intra_pair_variance(X, L, positive_eps=-1),
            ValueError,
            "positive_eps: expe",
        ),
        (lambda: neighbours.icnn(X, L, neighbors=7), ValueError, "window: expected a value >= 7"),
        (lambda: neighbours.icnn(X, L, window=2.0), TypeError, "window: expected an integer"),
    ],
)
def test_bad_input(call: Callable[[], Tensor], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        call()


I = L.int()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(y=X[:, :2]), ValueError, r"y: expected \[M, 3\]"),
        (dict(y=X.double()), TypeError, "y: expected the dtype"),
        (dict(x_labels=L), TypeError, "x_labels: expected an int32"),
        (dict(y_labels=None), TypeError, "y_labels: expected an int32"),
        (dict(y_labels=I[:2]), ValueError, "y_labels: expected shape"),
        (dict(x_groups=I), ValueError, "x_groups, y_groups: expected both"),
        (dict(values=X[:2]), ValueError, r"values: expected \[4, K\]"),
        (dict(rule="median"), ValueError, "rule: expected one of"),
        (dict(score="cosine"), ValueError, "score: expected one of"),
        (dict(precision="int8"), ValueError, "precision: expected one of"),
    ],
)
def test_bad_input_of_the_primitive(change: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        row_losses(RowInputs(X, X, I, I, params=(0.1, 0, 0))._replace(**change))

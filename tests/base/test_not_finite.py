"""Rows with NaN or inf: what they make NaN, the same on every backend (docs/pairs.md)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_losses.functional as fl
from fused_losses.base.examples import TABLE, ExampleInputs

NO_ROWS = ("info_nce, labels, symmetric",)  # of more columns than rows: no loss of a row
REFUSED = ("pairwise_distance, mahalanobis",)  # a covariance of NaN
LOSSES = [
    (name, side)
    for name, example in TABLE.items()
    for side in ("x", "y", "w")
    if side in example.leaves and example.takes("backend") and name not in REFUSED
]
# what gives a number a pair keeps an infinite one; products over classes of any length, too
PAIRED = (
    *("distances", "pairwise", "topk", "mine", "linear_cross_entropy", "distillation"),
    "softmax_outputs",
)


def which(name: str, side: str, value: float, backend: str) -> list[Any]:
    """Of every result, which of its rows have a NaN."""
    example = TABLE[name]
    inputs = ExampleInputs(12, 20, 8)
    rows = getattr(inputs, side)
    rows.data[3, 2] = value
    options: dict[str, Any] = {"backend": backend}
    if example.takes("reduction") and name not in NO_ROWS:
        options["reduction"] = "none"
    out = example(inputs, **options)
    out = out if isinstance(out, tuple) else (out,)
    return [
        t.detach().isnan().reshape(t.shape[:1].numel(), -1).any(dim=1).tolist()
        for t in out
        if isinstance(t, Tensor) and t.is_floating_point()
    ]


@pytest.mark.parametrize("name, side", LOSSES)
def test_a_row_with_nan_makes_the_same_nan_on_every_backend(
    name: str, side: str, streamed: str
) -> None:
    assert which(name, side, math.nan, streamed) == which(name, side, math.nan, "reference")


@pytest.mark.parametrize("name, side", [at for at in LOSSES if not at[0].startswith(PAIRED)])
def test_a_row_with_inf_is_one_with_nan(name: str, side: str, backend: str) -> None:
    found = [which(name, side, value, backend) for value in (math.nan, math.inf, -math.inf)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("triplets", ["all", "hard", "semihard"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_triplets_of_a_bad_row(value: float, triplets: str, smooth: bool, backend: str) -> None:
    """NaN is what has a triplet with the row; an anchor without any keeps 0, its gradient, too."""
    x = torch.randn(9, 4)
    x[2, 1] = value
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
    x.requires_grad_()
    options: dict[str, Any] = dict(triplets=triplets, smooth=smooth, backend=backend)
    rows = fl.all_triplets(x, labels, reduction="none", **options)
    assert rows.isnan().tolist() == [True] * 8 + [False] and rows[8] == 0
    assert fl.all_triplets(x, labels, **options).isnan()
    # many positives are counted by sorting
    many = torch.randn(90, 4)
    many[2, 1] = value
    rows = fl.all_triplets(many, torch.arange(90) % 2, reduction="none", **options)
    assert rows.isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("smooth", [False, True])
def test_triplets_of_one_class_are_none(smooth: bool, value: float, backend: str) -> None:
    x = torch.randn(6, 4)
    x[2, 1] = value
    labels = torch.zeros(6, dtype=torch.int64)
    rows = fl.all_triplets(x, labels, smooth=smooth, reduction="none", backend=backend)
    assert torch.equal(rows, torch.zeros(6))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_pairs_attends_to_no_bad_value(value: float, backend: str) -> None:
    query, key, values = (torch.randn(n, 4) for n in (3, 5, 5))
    values[2, 1] = value
    out = fl.similarity_attention(
        query,
        key,
        values,
        match="same",
        query_labels=torch.tensor([0, 7, 1]),
        key_labels=torch.tensor([0, 1, 0, 0, 1]),
        backend=backend,
    )
    assert torch.equal(out[1], torch.zeros(4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_positive_without_a_negative(value: float, backend: str) -> None:
    """Their loss would be 0 of any finite rows."""
    x, y, labels = torch.randn(1, 4), torch.randn(1, 4), torch.zeros(2, dtype=torch.int64)
    y[0, 2] = value
    both = torch.cat([x, y])
    options: dict[str, Any] = dict(reduction="none", backend=backend)
    for loss in (
        fl.info_nce(x, y, **options),
        fl.n_pairs(x, y, **options),
        fl.supervised_contrastive(both, labels, **options),
        fl.soft_nearest_neighbor(both, labels, **options),
        fl.snr_contrastive(y, labels[:1], zero_mean_weight=0.3, **options),
    ):
        assert loss.isnan().all()

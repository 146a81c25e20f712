"""Rows with NaN or inf: what they make NaN, the same on every backend (docs/pairs.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import BACKENDS, require
from example_values import on_backend
from torch import Tensor

import fused_losses.functional as fl
from fused_losses.base.examples import TABLE, ExampleInputs
from fused_losses.class_losses import NCE, Focal
from fused_losses.margins import ArcFace, CosFace, Margin

# of more columns than rows: no loss of a row
NO_ROWS = (
    *("info_nce, labels, symmetric", "nested_info_nce, labels, symmetric"),
    *("info_nce, weights", "info_nce, targets"),
)
# a covariance of NaN or inf: of the rows, or of the classes' own matrices, which are no rows
REFUSED = [
    *(("pairwise_distance, mahalanobis", side) for side in ("x", "y")),
    *((name, "w") for name in ("gaussian_scores", "gaussian_cross_entropy")),
    ("class_aware_alignment", "w"),
]
LOSSES = [
    (name, side)
    for name, example in TABLE.items()
    for side in ("x", "y", "w")
    if side in example.leaves and example.takes("backend") and (name, side) not in REFUSED
]
# what gives a number a pair keeps an infinite one; products over classes of any length, too
PAIRED = (
    *("distances", "pairwise", "topk", "radius", "mine", "linear_cross_entropy", "distillation"),
    "softmax_outputs",
)


def which(name: str, side: str, value: float, backend: str) -> list[Any]:
    """Of every result, which of its rows have a NaN."""
    example = TABLE[name]
    inputs = ExampleInputs(12, 20, 8)
    rows = getattr(inputs, side)
    rows.data[3, 2] = value
    given = on_backend(example, backend)
    if example.takes("reduction") and name not in NO_ROWS:
        given["reduction"] = "none"
    out = example(inputs, **given)
    out = out if isinstance(out, tuple) else (out,)
    return [
        t.detach().isnan().reshape(t.shape[:1].numel(), -1).any(dim=1).tolist()
        for t in out
        if isinstance(t, Tensor) and t.is_floating_point()
    ]


@pytest.mark.parametrize("name, side", LOSSES)
def test_a_row_with_nan_makes_the_same_nan_on_every_backend(name: str, side: str) -> None:
    wanted = which(name, side, math.nan, "reference")
    for backend in BACKENDS:
        if backend in TABLE[name].not_on:
            continue
        assert which(name, side, math.nan, require(backend)) == wanted, backend
        # and one with inf
        for value in () if name.startswith(PAIRED) else (math.inf, -math.inf):
            assert which(name, side, value, backend) == wanted, (backend, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name, side", REFUSED)
def test_a_covariance_that_is_not_finite_is_refused(
    name: str, side: str, value: float, backend: str
) -> None:
    with pytest.raises(ValueError, match="covariance: expected"):
        which(name, side, value, backend)


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


@pytest.mark.parametrize("margin", [ArcFace(0.3), ArcFace(0.3, "easy"), CosFace(0.3)])
@pytest.mark.parametrize("classes", [1, 3])
def test_an_infinite_target_is_a_fault_under_a_margin(
    margin: Margin, classes: int, backend: str
) -> None:
    """A clamp of the cosine made a finite score of it, and a lone class a loss of 0."""
    x, weight = torch.ones(2, 4), torch.ones(classes, 4)
    weight[0, 1] = math.inf
    labels = torch.zeros(2, dtype=torch.int64)
    options: dict[str, Any] = dict(margin=margin, scale=2.0, reduction="none", backend=backend)
    for loss in (fl.margin_softmax, fl.unpg_margin_softmax):
        each = loss(x, weight, labels, normalize=False, **options)
        assert isinstance(each, Tensor) and each.isnan().all()


OVER_CLASSES: dict[str, Callable[..., Any]] = {
    "margin_softmax": fl.margin_softmax,
    "margin_softmax, smoothed": partial(fl.margin_softmax, label_smoothing=0.1),
    "margin_softmax, products": partial(fl.margin_softmax, normalize=False, scale=1.0),
    "unpg_margin_softmax": fl.unpg_margin_softmax,
    "adaptive_margin_softmax": fl.adaptive_margin_softmax,
    "class_loss, NCE": partial(fl.class_loss, loss=NCE()),
    "class_loss, Focal": partial(fl.class_loss, loss=Focal(2.0)),
    "softmax_outputs": lambda *rows, **options: fl.softmax_outputs(*rows, **options).logsumexp,
}


@pytest.mark.parametrize("left_out", ["row", "class"])
@pytest.mark.parametrize("name", list(OVER_CLASSES))
def test_what_takes_no_part_reaches_no_gradient(name: str, left_out: str, backend: str) -> None:
    """Neither an ignored row nor a class that is not in `classes`; zero is their own."""
    x, weight, labels = torch.randn(6, 5), torch.randn(8, 5), torch.arange(6)
    options: dict[str, Any] = dict(classes=torch.arange(7)) if left_out == "class" else {}
    if left_out == "row":
        labels[3], x[3, 1] = -100, math.nan
    else:
        weight[7, 2] = math.nan
    x.requires_grad_()
    weight.requires_grad_()
    value = OVER_CLASSES[name](x, weight, labels, backend=backend, **options)
    grads = torch.autograd.grad(value.sum(), (x, weight))
    assert value.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert not (grads[0][3] if left_out == "row" else grads[1][7]).any()

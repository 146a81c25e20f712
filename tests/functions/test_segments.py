"""Sums and means of segments: their exact counts, empty segments, order and errors."""

from __future__ import annotations

import pytest
import torch

import fused_losses
from fused_losses import losses, segment_mean, segment_sum


def test_a_mean_of_many_rows_of_a_narrow_type_is_rounded_once() -> None:
    x = torch.full((40_000, 2), 0.1).bfloat16()
    labels = torch.zeros(40_000, dtype=torch.int64)
    assert torch.equal(segment_mean(x, labels, 1), x[:1])
    want = (40_000 * x[:1].double()).bfloat16()
    assert torch.equal(segment_sum(x, labels, 1), want)


def test_segments_without_a_row_are_zero_and_bad_rows_stay_in_theirs() -> None:
    x = torch.randn(6, 3)
    x[1], x[2, 0] = torch.nan, torch.inf
    labels = torch.tensor([3, 1, 1, 3, 0, 0], dtype=torch.int32)
    for function in (segment_sum, segment_mean):
        found = function(x, labels, 6)
        assert torch.equal(found[[2, 4, 5]], torch.zeros(3, 3))
        assert found[1].isnan().all() and found[[0, 3]].isfinite().all()
    assert segment_mean(x[:0], labels[:0], 4).shape == (4, 3)
    assert segment_mean(x[:, :0], labels, 4).shape == (4, 0)


@pytest.mark.parametrize("function", [segment_sum, segment_mean])
def test_derivatives_of_every_kind(function) -> None:
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 3, 3, 3, 1])

    def call(x: torch.Tensor) -> torch.Tensor:
        return function(x, labels, 5) ** 2

    assert torch.autograd.gradcheck(call, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, x)


def test_compiled_and_under_autocast() -> None:
    x, labels = torch.randn(9, 4), torch.arange(9) % 4
    want = segment_mean(x, labels, 5)
    compiled = torch.compile(
        lambda x, labels: segment_mean(x, labels, 5), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x, labels), want)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(segment_mean(x, labels, 5), want)


@pytest.mark.parametrize(
    ("labels", "count", "error", "words"),
    [
        (torch.tensor([0, 1, 5]), 5, IndexError, r"labels: expected class ids in \[0, 5\)"),
        (torch.tensor([0, -1, 2]), 5, IndexError, "labels: expected class ids"),
        (torch.tensor([0.0, 1, 2]), 5, TypeError, "labels: expected an integer tensor"),
        (torch.tensor([0, 1]), 5, ValueError, "labels: expected shape"),
        (torch.tensor([0, 1, 2]), 0, ValueError, "num_segments: expected a value >= 1"),
        (torch.tensor([0, 1, 2]), 2.5, TypeError, "num_segments: expected an integer"),
    ],
)
def test_bad_arguments(labels, count, error, words) -> None:
    for function in (segment_sum, segment_mean):
        with pytest.raises(error, match=words):
            function(torch.randn(3, 2), labels, count)
    with pytest.raises(TypeError, match="x: expected a floating point tensor"):
        segment_sum(torch.zeros(3, 2).long(), torch.tensor([0, 1, 1]), 2)


def test_its_memory_goes_with_the_rows() -> None:
    x, labels = torch.randn(4096, 64, requires_grad=True), torch.arange(4096) % 1000
    plan = fused_losses.explain(segment_mean, x, labels, 1000)
    # rows in float64, their slopes, and the segments
    assert plan.peak_extra_bytes < 3 * 8 * (4096 + 2 * 1000) * 64 + 2**20


def test_prototypes_of_classes_that_have_none_are_refused() -> None:
    loss, x = losses.PrototypicalLoss(3), torch.randn(4, 2)
    with pytest.raises(ValueError, match="ref_labels: expected a row of each of 3 classes, got no"):
        loss(x, torch.tensor([0, 1, 0, 1]), x, torch.tensor([0, 2, 0, 2]))
    with pytest.raises(IndexError, match="labels: expected class ids"):
        loss(x, torch.tensor([0, 1, 0, 3]), x, torch.tensor([0, 1, 2, 2]))

"""Outputs of a softmax over classes that carry gradients; the draws hold them to formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_goldens import exactness
from torch import Tensor

from fused_losses.functional import SoftmaxOutputs, linear_cross_entropy, softmax_outputs


def numbers(found: SoftmaxOutputs) -> list[Tensor]:
    return [each for each in found if each is not None]


def literal(x: Tensor, w: Tensor, y: Tensor, ids: Tensor, cap: float | None) -> list[Tensor]:
    z = x @ w.T
    z = z if cap is None else cap * torch.tanh(z / cap)
    log_p = z.log_softmax(1)
    own, kept = y.clamp_min(0)[:, None], y >= 0
    chosen = torch.where(ids < 0, 0, log_p.gather(1, ids.clamp_min(0)))
    columns = (z.logsumexp(1), log_p.gather(1, own)[:, 0], -(log_p.exp() * log_p).sum(1))
    return [*(torch.where(kept, c, 0) for c in columns), torch.where(kept[:, None], chosen, 0)]


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_formulas(cap: float | None, backend: str) -> None:
    dtype, within = exactness(backend)
    x = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    w = torch.randn(9, 5, dtype=dtype, requires_grad=True)
    y = torch.tensor([0, 8, 3, -100, 3, 1])
    ids = torch.tensor([[0, 4], [1, 1], [8, -100], [2, 3], [3, 0], [7, 1]])
    options: dict[str, Any] = dict(softcap=cap, backend=backend)
    found = softmax_outputs(x, w, y, selected=ids, entropy=True, **options)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, w)]
    want = literal(*wide, y, ids, cap)
    for got, right in zip(numbers(found), want, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=5 * within, atol=5 * within)
    # every output at once, each with a slope of its own
    weights = [torch.rand_like(each) for each in want]
    value = sum((a.double() * b).sum() for a, b in zip(numbers(found), weights, strict=True))
    truth = sum((a * b).sum() for a, b in zip(want, weights, strict=True))
    for got, right in zip(
        torch.autograd.grad(value, (x, w)), torch.autograd.grad(truth, wide), strict=True
    ):
        torch.testing.assert_close(got.double(), right, rtol=50 * within, atol=50 * within)
    ids = torch.arange(9)[torch.tensor([0, 1, 3, 4, 8])]
    part = softmax_outputs(x, w, y, classes=ids, entropy=True, **options)
    place = torch.searchsorted(ids, y.clamp_min(0))
    smaller = literal(wide[0], wide[1][ids], torch.where(y < 0, y, place), place[:, None], cap)
    kept = y >= 0
    for got, right in zip(numbers(part), smaller[:3], strict=True):
        right = torch.where(kept, right, 0)
        torch.testing.assert_close(got.double(), right, rtol=5 * within, atol=5 * within)


def test_second_derivatives_on_the_reference() -> None:
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, 2])

    def call(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        ids = torch.stack([y, 0 * y], 1)
        return tuple(
            numbers(softmax_outputs(x, w, y, selected=ids, entropy=True, backend="reference"))
        )

    assert torch.autograd.gradcheck(call, (x, w))
    assert torch.autograd.gradgradcheck(call, (x, w))


@pytest.mark.float64
def test_hard_scores(backend: str) -> None:
    """+-1e4, all equal, one class: an entropy that is 0 or log C to its last digits."""
    x = torch.tensor([[1e4, -1e4, 0], [7, 7, 7], [1e4, 1e4, -1e4]], dtype=torch.float64)
    y, eye = torch.tensor([0, 1, 2]), torch.eye(3, dtype=torch.float64)
    x.requires_grad_()
    found = softmax_outputs(x, eye, y, entropy=True, backend=backend)
    assert found.entropy is not None
    want = torch.tensor([0, 3, 2], dtype=torch.float64).clamp_min(1).log()
    torch.testing.assert_close(found.entropy, want, rtol=1e-12, atol=1e-12)
    assert found.log_prob.tolist()[0] == 0
    (slope,) = torch.autograd.grad(found.entropy.sum(), x)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)
    alone = softmax_outputs(x, eye[:1], 0 * y, entropy=True, backend=backend)
    assert alone.entropy is not None
    assert (alone.entropy == 0).all() and (alone.log_prob == 0).all()


def test_losses_of_ones_own() -> None:
    """Cross entropy with a Z-loss, from the outputs; rows of sequences."""
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    w, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 7, (2, 3))
    found = softmax_outputs(x, w, y, selected=torch.stack([y, y], 2))
    assert found.selected is not None and found.selected.shape == (2, 3, 2)
    torch.testing.assert_close(found.selected[..., 1], found.log_prob)
    ours = (0.1 * found.logsumexp**2 - found.log_prob).mean()
    torch.testing.assert_close(ours, linear_cross_entropy(x, w, y, z_loss=0.1))


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (dict(selected=torch.zeros(2, dtype=torch.int64)), ValueError, r"ids \[2, S\]"),
        (dict(selected=torch.zeros(2, 1)), TypeError, "selected: expected int64"),
        (dict(selected=torch.full((2, 1), 5)), IndexError, r"selected: .*\[0, 5\)"),
        (dict(selected=torch.full((2, 1), -1)), IndexError, r"selected: .*\[0, 5\)"),
        (
            dict(selected=torch.full((2, 1), 3), classes=torch.tensor([0, 1])),
            ValueError,
            "selected: expected ids among `classes`, got 3",
        ),
        (dict(scale=0.0), ValueError, "scale: expected"),
        (dict(softcap=-1.0), ValueError, "softcap: expected"),
        (dict(scale=torch.ones(2, requires_grad=True)), TypeError, "scale: expected a float"),
    ],
)
def test_bad_arguments(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        softmax_outputs(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 1]), **options)

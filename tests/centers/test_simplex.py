"""DSimplexHead: loss and gradients of the explicit matrix of directions, which it never makes."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from counted import COUNTER, told_by_child
from places import GOLDEN
from torch import Tensor

from fused_losses import DSimplexHead, margins

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def directions(dim: int) -> Tensor:
    """As the authors make them: the unit vectors and one more point, centred and normalised."""
    last = torch.full((1, dim), (1 - math.sqrt(1 + dim)) / dim, dtype=torch.float64)
    points = torch.cat([torch.eye(dim, dtype=torch.float64), last])
    return F.normalize(points - points.mean(dim=0))


def test_the_authors_directions() -> None:
    with np.load(GOLDEN / "heads" / "dsimplex_5.npz") as stored:
        data = {key: torch.from_numpy(stored[key]) for key in stored.files}
    rows = DSimplexHead(5).rows(torch.arange(5), torch.float64)
    # they add 1e-8 to the norms
    torch.testing.assert_close(rows, data["weights"], rtol=0, atol=2e-8)
    torch.testing.assert_close(rows @ rows.T, data["gram"], rtol=0, atol=4e-8)


@pytest.mark.parametrize("dim", [1, 2, 7, 100])
def test_directions_are_a_simplex(dim: int) -> None:
    rows = DSimplexHead(dim + 1).rows(torch.arange(dim + 1), torch.float64)
    want = torch.full((dim + 1, dim + 1), -1 / dim, dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(rows @ rows.T, want, rtol=0, atol=1e-14)
    torch.testing.assert_close(rows, directions(dim), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preallocated", [True, False])
@pytest.mark.parametrize(
    ("classes", "dim", "n"), [(2, 1, 3), (3, 2, 1), (8, 7, 9), (9, 17, 20), (50, 49, 700)]
)
@pytest.mark.parametrize("kind", ["plain", "margin"])
def test_loss_and_gradient(
    classes: int, dim: int, n: int, preallocated: bool, dtype: torch.dtype, kind: str
) -> None:
    options: dict[str, Any] = dict(margin=margins.CosFace(0.2), scale=16.0, normalize=True)
    head = DSimplexHead(
        classes, dim, preallocated=preallocated, **(options if kind != "plain" else {})
    )
    x = (4 * torch.randn(n, dim)).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (n,))
    labels[:: max(5, n // 3)] = -100
    labels[n // 2] = classes - 1  # the last vertex where there are as many
    loss = head(x, labels)
    (grad,) = torch.autograd.grad(loss, x)

    wide = x.detach().double().requires_grad_()
    table = directions(dim) if preallocated else directions(dim)[:classes]
    z = (F.normalize(wide) if kind != "plain" else wide) @ table.T
    if kind != "plain":
        z = 16 * (z - 0.2 * F.one_hot(labels.clamp_min(0), len(table)).double())
    want = F.cross_entropy(z, labels)
    (want_grad,) = torch.autograd.grad(want, wide)

    # a product: dim + 3 roundings of terms of at most |x|_1 / r + m |x|_1; then the softmax's own
    u = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    size = float(x.detach().double().abs().sum(dim=1).max()) if kind == "plain" else 16.0
    bound = 4 * u * (4 * size + 16 + float(want.detach()))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(float(loss.detach()) - float(want.detach())) <= bound
    stored = torch.finfo(dtype).eps / 2
    off = (grad.double() - want_grad).norm()
    assert off <= (4 * bound + 2 * stored) * max(float(want_grad.norm()), 1 / n)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_reductions_and_gradcheck(reduction: str) -> None:
    head = DSimplexHead(
        6, 8, margin=margins.ArcFace(0.3), scale=4.0, normalize=True, reduction=reduction
    )
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([5, 0, -100, 3, 1])
    assert torch.autograd.gradcheck(lambda x: head(x, labels), x)
    found = head(x, labels)
    assert found.shape == ((5,) if reduction == "none" else ())
    if reduction == "none":
        assert found[2] == 0
    twice = torch.autograd.grad(head(x, labels).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        twice.sum().backward()


def test_logits_and_predictions() -> None:
    for classes, dim, preallocated in ((9, 8, True), (9, 8, False), (5, 8, True), (5, 8, False)):
        head = DSimplexHead(classes, dim, scale=3.0, preallocated=preallocated)
        x = torch.randn(300, dim, dtype=torch.float64, requires_grad=True)
        table = directions(dim) if preallocated else directions(dim)[:classes]
        logits = head.logits(x)
        torch.testing.assert_close(logits, 3 * x @ table.T)
        (grad,) = torch.autograd.grad(logits.square().sum(), x)
        torch.testing.assert_close(grad, 18 * x @ table.T @ table)
        assert torch.equal(head.predict(x), logits[:, :classes].argmax(dim=1))
    assert (head.predict(torch.zeros(2, 8)) == 0).all()


def test_growing_keeps_directions() -> None:
    head = DSimplexHead(3, 8)
    before = head.rows(torch.arange(3))
    x = torch.randn(4, 8)
    with pytest.raises(IndexError, match="labels: expected"):
        head(x, torch.tensor([0, 1, 2, 3]))
    head.grow(9)
    assert torch.equal(head.rows(torch.arange(3)), before)
    head(x, torch.tensor([0, 1, 2, 8]))
    with pytest.raises(ValueError, match=r"num_classes: expected 9 to 9 in 8 .*other directions"):
        head.grow(10)
    with pytest.raises(ValueError, match="num_classes: expected 9 to 9"):
        head.grow(4)
    other = DSimplexHead(2, 8)
    other.load_state_dict(head.state_dict())
    assert other.num_classes == copy.deepcopy(head).num_classes == 9
    with pytest.raises(ValueError, match="num_classes"):
        DSimplexHead(2, 4).load_state_dict(head.state_dict())


def test_rows_that_are_nan_and_rows_that_are_ignored() -> None:
    head = DSimplexHead(6, reduction="none")
    x = torch.randn(3, 5)
    x[1] = torch.nan
    found = head(x, torch.tensor([0, 1, 2]))
    assert found.isnan().tolist() == [False, True, False]
    x.requires_grad_()
    loss = DSimplexHead(6)(x, torch.tensor([0, -100, 2]))
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert (grad[1] == 0).all()
    assert DSimplexHead(6)(x[:0], torch.tensor([], dtype=torch.int64)) == 0


def test_compiles_whole_and_under_autocast() -> None:
    head = DSimplexHead(6, normalize=True, scale=8.0)
    x, labels = torch.randn(7, 5, requires_grad=True), torch.arange(7) % 6
    want = head(x, labels)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    got = compiled(x, labels)
    torch.testing.assert_close(got, want)
    for found, right in zip(torch.autograd.grad(got, x), torch.autograd.grad(want, x), strict=True):
        torch.testing.assert_close(found, right)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(x, labels), want)


CHILD = (
    COUNTER
    + """
found = {}
for n, classes in ((64, 20_001), (256, 20_001)):
    head = fused_losses.DSimplexHead(classes)
    x = torch.randn(n, classes - 1, requires_grad=True)
    labels = torch.randint(0, classes, (n,))
    def step():
        torch.autograd.grad(head(x, labels), x)
    step()
    found[n] = extra(step), x.numel() * 4
print(json.dumps(found))
"""
)


@pytest.mark.processes
def test_nothing_but_a_copy_of_the_rows_is_allocated() -> None:
    for peak, rows in told_by_child(CHILD, None).values():
        # the rows without those that are ignored, scaled; the gradient and what autograd makes of
        # it; blocks. The matrix of directions would be 1.6 GB.
        assert peak < 4.5 * rows + (24 << 20)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((1,), {}, "num_classes: expected 2"),
        ((10, 8), {}, "num_classes: expected 2 to 9 in 8 dimensions"),
        ((5,), {"scale": 0}, "scale: expected"),
        ((5,), {"reduction": "max"}, "reduction: expected"),
        ((5,), {"margin": margins.CurricularFace()}, "margin: expected one without bends"),
    ],
)
def test_bad_constructions(arguments: tuple, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DSimplexHead(*arguments, **options)


def test_bad_calls() -> None:
    head = DSimplexHead(6)
    for x, labels, error, words in (
        (torch.randn(3, 6), torch.arange(3), ValueError, r"embeddings: expected \[n, 5\]"),
        (torch.randn(3, 5), torch.arange(4), ValueError, "labels: expected"),
        (torch.randn(3, 5), torch.arange(3) + 4, IndexError, "labels: expected"),
        (torch.randn(5), torch.arange(3), ValueError, "embeddings: expected"),
    ):
        with pytest.raises(error, match=words):
            head(x, labels)

"""The scores of listed pairs: accuracy, derivatives, and that they are an op as others are."""

from __future__ import annotations

import pytest
import torch
from conftest import require
from torch import Tensor

from fused_losses.base.indices import ListedPairs, PairList
from fused_losses.primitives.listed import bounded
from fused_losses.primitives.listed.inputs import ListedInputs
from fused_losses.primitives.listed.op import LISTED_SCORES, listed_row_losses, listed_scores
from fused_losses.primitives.row_rules.inputs import RowInputs

BACKENDS = ("reference", "bounded", "cpu")


def pairs(n: int, m: int, count: int) -> PairList:
    return PairList(torch.randint(n, (count,)), torch.randint(m, (count,)))


def truth(x: Tensor, y: Tensor, p: PairList, apart: bool) -> Tensor:
    x, y = x.double()[p.rows], y.double()[p.columns]
    return (x - y).square().sum(1) if apart else (x * y).sum(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", [(7, 5, 3, 0), (1, 1, 1, 2), (13, 11, 17, 97), (3, 2, 0, 5)])
def test_values_and_gradients(
    shape: tuple[int, int, int, int], apart: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "BLOCK_BYTES", 700)
    n, m, d, count = shape
    p = pairs(n, m, count)
    x, y = torch.randn(n, d, requires_grad=True), torch.randn(m, d, requires_grad=True)
    got = listed_scores(x, y, p, apart=apart, backend=require(backend))
    want = truth(x, y, p, apart)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    grad = torch.randn(count)
    found = torch.autograd.grad(got, (x, y), grad)
    for g, w in zip(found, torch.autograd.grad(want, (x, y), grad.double()), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_near_pairs_far_from_0_keep_their_digits(backend: str) -> None:
    """Rows that differ in their last bits: a difference has no rounding, a product no digit."""
    x = 1e4 + torch.randn(9, 6)
    y = x + torch.randint(-3, 4, x.shape) * 2.0**-9
    p = PairList(torch.arange(9), torch.arange(9))
    got, want = listed_scores(x, y, p, apart=True, backend=require(backend)), truth(x, y, p, True)
    assert (want > 0).all()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("apart", [False, True])
def test_derivatives(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "BLOCK_BYTES", 100)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    p = pairs(5, 4, 11)
    f = lambda x, y: listed_scores(x, y, p, apart=apart, backend="bounded")
    assert torch.autograd.gradcheck(f, (x, y), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, y))
    assert torch.autograd.gradgradcheck(lambda x: f(x, x[:4]), (x,))


@pytest.mark.parametrize("backend", ["bounded", "cpu"])
@pytest.mark.parametrize("own", [False, True])
def test_opcheck(own: bool, backend: str) -> None:
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    given = (x, None if own else y, *pairs(5, 4, 11)[:2], True)
    torch.library.opcheck(LISTED_SCORES.op(require(backend)), given)
    grad = torch.randn(11)
    rows = (x.detach(), None if own else y.detach(), *given[2:])
    needs = (True, not own)
    torch.library.opcheck(LISTED_SCORES.op(backend, "_backward"), (grad, *rows, *needs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apart", [False, True])
def test_own_rows_have_the_gradient_of_both_ends(apart: bool, backend: str) -> None:
    x, p = torch.randn(9, 17, requires_grad=True), pairs(9, 9, 60)
    got = listed_scores(x, x, p, apart=apart, backend=require(backend))
    want = truth(x, x, p, apart)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    grad = torch.randn(60)
    (found,) = torch.autograd.grad(got, x, grad)
    (exact,) = torch.autograd.grad(want, x, grad.double())
    torch.testing.assert_close(found, exact.to(found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_derivatives_of_the_node_in_c(apart: bool, own: bool) -> None:
    require("cpu")
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    p = pairs(5, 5, 11)
    f = lambda x, y: listed_scores(x, x if own else y, p, apart=apart, backend="cpu")
    given = (x,) if own else (x, y)
    run = (lambda x: f(x, x)) if own else f
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apart", [False, True])
def test_rows_that_are_not_finite_have_no_scores(apart: bool, backend: str) -> None:
    x, y = torch.randn(4, 9), torch.randn(3, 9)
    x[1, 8], x[2, 0], y[1, 3] = torch.inf, torch.nan, -torch.inf
    p = PairList(*torch.cartesian_prod(torch.arange(4), torch.arange(3)).unbind(1))
    got = listed_scores(x, y, p, apart=apart, backend=require(backend)).view(4, 3)
    dead = torch.zeros(4, 3, dtype=torch.bool)
    dead[1:3] = dead[:, 1] = True
    assert torch.equal(got.isnan(), dead) and not got.isinf().any()


def test_the_same_bits_on_any_number_of_threads() -> None:
    x, p = torch.randn(300, 65), pairs(300, 300, 2000)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            got = listed_scores(leaf, leaf, p, apart=True, backend=require("cpu"))
            answers.append((got, *torch.autograd.grad(got.square().sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


def test_indices_beyond_the_rows_are_refused() -> None:
    x, i = torch.randn(4, 3), torch.tensor([0, 4])
    for name, p in (("rows", PairList(i, i % 4)), ("columns", PairList(i % 4, i))):
        with pytest.raises(IndexError, match=rf"{name}: expected rows in \[0, 4\)"):
            listed_scores(x, x, p, backend=require("cpu"))


@pytest.mark.parametrize("of", ["x", "y"])
def test_a_gradient_that_nobody_asks_for_is_not_made(of: str) -> None:
    p = ListedInputs(torch.randn(5, 3), torch.randn(4, 3), *pairs(5, 4, 11)[:2], True)
    dx, dy = bounded.backward(torch.randn(11), p, of == "x", of == "y")
    assert (dx.numel(), dy.numel()) == ((15, 0) if of == "x" else (0, 12))


def test_half_rows_are_not_rounded_again() -> None:
    x, y, p = torch.randn(9, 33).bfloat16(), torch.randn(7, 33).bfloat16(), pairs(9, 7, 40)
    for apart in (False, True):
        got = listed_scores(x, y, p, apart=apart, backend="bounded")
        torch.testing.assert_close(got.double(), truth(x, y, p, apart), rtol=1e-5, atol=1e-5)


def test_a_rule_that_is_no_sum_over_pairs_is_refused() -> None:
    x, i = torch.randn(3, 2), torch.zeros(3, dtype=torch.int32)
    listed = ListedPairs(pairs(3, 3, 4), pairs(3, 3, 4), False)
    with pytest.raises(ValueError, match="rule: expected one of hinges, ranked_list"):
        listed_row_losses(RowInputs(x, x, i, i, rule="tuplet"), listed)


def test_a_pair_counts_once() -> None:
    rows, columns = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([1, 3, 1, 0, 3])
    listed = ListedPairs(PairList(rows, columns), PairList(rows[:0], rows[:0]), False).once(4)
    assert listed.positive.kept is not None and listed.negative.kept is not None
    assert listed.positive.kept.tolist() == [True, True, False, True, False]
    assert listed.negative.kept.tolist() == []

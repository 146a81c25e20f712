"""Losses over triplets and rankings where a miner says which pairs, held to literal formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from listed_formulas import mined
from pair_cases import Case
from ranked_draws import LISTED
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import losses
from fused_losses.functions.listed_triplets import drawn_triplets

BACKENDS = ("reference", "bounded", "cpu")
CASES = {case.name: case for case in LISTED}


def drawn(n: int = 11, m: int = 9, d: int = 5) -> Any:
    t = mined(n, m, d)
    t.x, t.y = t.x.double().requires_grad_(), t.y.double().requires_grad_()
    return t


def same(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(v.sum(), leaves, allow_unused=True) for v in (got, want)]
    for one, other in zip(*slopes, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.float64
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_literal(name: str, backend: str) -> None:
    case: Case = CASES[name]
    t = drawn()
    same(case.call(t, backend=backend), case.formula(t), [t.x, t.y])


@pytest.mark.parametrize("name", CASES)
def test_empty_lists(name: str) -> None:
    t = drawn()
    t.a = t.p = t.b = t.q = t.a[:0]
    loss = CASES[name].call(t)
    if CASES[name].function is fl.fast_ap:
        want = CASES[name].formula(t)
        torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
        return
    assert loss == 0
    for grad in torch.autograd.grad(loss, [t.x, t.y], allow_unused=True):
        assert grad is None or not grad.any()


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("kind", ["all", "hard", "semihard"])
def test_all_pairs_are_no_list(kind: str, smooth: bool) -> None:
    x, labels = torch.randn(12, 4, dtype=torch.float64, requires_grad=True), torch.arange(12) % 4
    alike = labels[:, None] == labels
    own = torch.eye(12, dtype=torch.bool)
    lists = (*(alike & ~own).nonzero().unbind(1), *(~alike).nonzero().unbind(1))
    options = dict(margin=0.5, triplets=kind, smooth=smooth, reduction="none")
    want = fl.all_triplets(x, labels, **options)
    same(fl.all_triplets(x, None, indices=lists, **options), want, [x])


def test_a_list_over_both_models_is_all_triplets() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    frozen, labels = torch.randn(5, 4, dtype=torch.float64), torch.arange(6) % 2
    alike = labels[:, None] == torch.cat([labels, torch.arange(5) % 2])
    own = torch.eye(6, 11, dtype=torch.bool)
    lists = (*(alike & ~own).nonzero().unbind(1), *(~alike).nonzero().unbind(1))
    module = losses.HarmonicTripletLoss(0.5, triplets="all")
    # a list is taken as it is, whatever triplets are chosen without one
    for loss in (module, losses.HarmonicTripletLoss(0.5)):
        want = module(x, labels, frozen, torch.arange(5) % 2)
        same(loss(x, None, frozen, None, lists), want, [x])
    assert module(x, None, frozen, None, (lists[0][:0],) * 3) == 0
    with pytest.raises(IndexError, match=r"indices\[2\]: expected rows .* \[0, 11\)"):
        module(x, None, frozen, None, (lists[0], lists[1], lists[1] + 11))


def test_drawn_triplets_are_triplets() -> None:
    x, labels = torch.randn(40, 3, dtype=torch.float64), torch.randint(0, 9, (40,))
    for ref in (False, True):
        y = torch.randint(0, 11, (30,)) if ref else labels
        generator = torch.Generator().manual_seed(3)
        listed = drawn_triplets((labels.int(), y.int()), not ref, 50, generator)
        a, p, n = listed.positive.rows, listed.positive.columns, listed.negative.columns
        on = listed.positive.kept
        assert on is not None and on.any()
        assert (labels[a] == y[p])[on].all() and (labels[a] != y[n])[on].all()
        assert ref or (a != p)[on].all()
        # a row without a positive or a negative has none, and every other has all of its own
        count = (labels[:, None] == y).sum(1) - int(not ref)
        assert torch.equal(on.view(-1, 50).any(1), (count > 0) & (count < len(y) - int(not ref)))
        # each positive of a row comes
        for i in range(0, len(labels), 7):
            of = [j for j in range(len(y)) if y[j] == labels[i] and (ref or j != i)]
            assert set(p[(a == i) & on].tolist()) == set(of)
    assert fl.all_triplets(x, labels, per_anchor=2, generator=torch.Generator().manual_seed(0)) >= 0


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda x, y: fl.all_triplets(x, y, per_anchor=0), ValueError, "per_anchor"),
        (
            lambda x, y: fl.all_triplets(x, y, per_anchor=1, indices=(y, y, y)),
            ValueError,
            "per_anchor: expected None beside indices",
        ),
        (lambda x, y: fl.all_triplets(x, y, indices=(y, y, y + 9)), IndexError, r"indices\[2\]"),
        (lambda x, y: fl.semihard_triplet(x, y, fallback="nearest"), ValueError, "fallback"),
        (lambda x, y: fl.mine_triplets(x, y, fallback="farthest"), ValueError, "fallback"),
        (
            lambda x, y: fl.mine_triplets(x, y, positive="semihard", negative="random"),
            ValueError,
            "positive: expected another choice",
        ),
        (lambda x, y: fl.centroid_triplet(x, y, x + 1, y), ValueError, "centroid_anchors"),
        (lambda x, y: fl.smooth_ap(x, y, temperature=0.0), ValueError, "temperature"),
        (lambda x, y: fl.pnp(x, y, variant="Dx"), ValueError, "variant"),
        (lambda x, y: losses.PNPLoss()(x, y, (y, y, y)), ValueError, "indices: expected None"),
        (
            lambda x, y: losses.BatchSemiHardTripletLoss()(x, y, (y, y, y)),
            ValueError,
            "finds each pair's negative",
        ),
        (lambda x, y: losses.HistogramLoss(delta=0.3), ValueError, "delta"),
    ],
)
def test_refused(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))

"""Pairs that count for more or less: listed with weights, by factors of rows, as soft targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from conftest import require
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import losses

BACKENDS = ("reference", "bounded", "cpu")
DOUBLE = torch.float64

Leaves = tuple[Tensor, Tensor, Tensor, Tensor]  # x, y, weights of positives, of negatives


def listed(n: int = 7, m: int = 6, d: int = 4) -> tuple[tuple[Tensor, ...], Leaves]:
    """Pairs, each once, and leaves; one weight of either class is 0, of a row that has others."""
    every = torch.randperm(n * m)
    near_pairs, far_pairs = every[: n * m // 3].sort().values, every[n * m // 3 :].sort().values
    (a, p), (b, k) = ((t // m, t % m) for t in (near_pairs, far_pairs))
    near, far = (torch.rand(len(t), dtype=DOUBLE) for t in (a, b))
    for weight, rows in ((near, a), (far, b)):
        weight[(rows[1:] == rows[:-1]).nonzero()[:1]] = 0
    x, y = (torch.randn(count, d, dtype=DOUBLE) for count in (n, m))
    return (a, p, b, k), (x, y, near, far)


def terms(s: Tensor, weight: Tensor, rows: Tensor, n: int) -> Tensor:
    """The sum of w e^s of each row."""
    return torch.zeros(n, dtype=s.dtype).index_add(0, rows, weight * s.exp())


def logarithm(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, mass, 1).log()


def contrastive(pairs: tuple[Tensor, ...], leaves: Leaves) -> Tensor:
    (a, p, b, k), (x, y, near, far) = pairs, leaves
    attract = ((x[a] - y[p]).norm(dim=1) - 0.2).clamp_min(0)
    repel = (3.0 - (x[b] - y[k]).norm(dim=1)).clamp_min(0)
    counts = [((t > 0) & (w > 0)).sum() for t, w in ((attract, near), (repel, far))]
    return (near * attract).sum() / counts[0] + (far * repel).sum() / counts[1]


def multi_similarity(pairs: tuple[Tensor, ...], leaves: Leaves) -> Tensor:
    (a, p, b, k), (x, y, near, far) = pairs, leaves
    s, z = (x[a] * y[p]).sum(1), (x[b] * y[k]).sum(1)
    attract = terms(-2 * (s - 0.5), near, a, len(x)).log1p() / 2
    return (attract + terms(3 * (z - 0.5), far, b, len(x)).log1p() / 3).mean()


def circle(pairs: tuple[Tensor, ...], leaves: Leaves) -> Tensor:
    (a, p, b, k), (x, y, near, far) = pairs, leaves
    s, z = (x[a] * y[p]).sum(1), (x[b] * y[k]).sum(1)
    up, down = (1.4 - s.detach()).clamp_min(0), (z.detach() + 0.4).clamp_min(0)
    attract = terms(-2 * up * (s - 0.6), near, a, len(x))
    repel = terms(2 * down * (z - 0.4), far, b, len(x))
    some = (attract > 0) & (repel > 0)
    return torch.where(some, (attract * repel).log1p(), 0).sum() / some.sum()


def neighbours(pairs: tuple[Tensor, ...], leaves: Leaves) -> Tensor:
    (a, p, b, k), (x, y, near, far) = pairs, leaves
    attract = terms(-(x[a] - y[p]).square().sum(1), near, a, len(x))
    repel = terms(-(x[b] - y[k]).square().sum(1), far, b, len(x))
    some = attract > 0
    share = logarithm(attract + repel) - logarithm(attract)
    return torch.where(some, share, 0).sum() / some.sum()


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "contrastive": (fl.contrastive, contrastive, dict(positive_margin=0.2, negative_margin=3.0)),
    "multi_similarity": (fl.multi_similarity, multi_similarity, dict(beta=3.0)),
    "circle": (fl.circle, circle, dict(gamma=2.0)),
    "soft_nearest_neighbor": (fl.soft_nearest_neighbor, neighbours, {}),
}


def called(name: str, pairs: tuple[Tensor, ...], leaves: Leaves, backend: str) -> Tensor:
    function, _, options = CASES[name]
    given = fl.WeightedPairs(*pairs, *leaves[2:])
    return function(*leaves[:1], None, leaves[1], indices=given, backend=backend, **options)


@pytest.mark.float64
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_listed_weights_are_the_formula(name: str, backend: str) -> None:
    pairs, leaves = listed()
    leaves = tuple(t.requires_grad_() for t in leaves)
    want = CASES[name][1](pairs, leaves)
    got = called(name, pairs, leaves, require(backend))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    slopes = torch.autograd.grad(want, leaves)
    # of a weight of 0 contrastive's count of pairs would jump
    for at, (g, w) in enumerate(zip(torch.autograd.grad(got, leaves), slopes, strict=True)):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11, msg=f"leaf {at}")


@pytest.mark.float64
@pytest.mark.parametrize("name", ["contrastive", "multi_similarity", "soft_nearest_neighbor"])
def test_listed_weights_have_second_derivatives_and_tangents(name: str) -> None:
    pairs, leaves = listed(4, 3, 2)
    leaves = tuple(t.clamp_min(0.1).requires_grad_() if t.dim() == 1 else t for t in leaves)
    leaves = tuple(t.requires_grad_() for t in leaves)
    assert torch.autograd.gradgradcheck(lambda *t: called(name, pairs, t, "bounded"), leaves)
    along = [torch.randn_like(t) for t in leaves]
    with forward_ad.dual_level():
        duals = tuple(forward_ad.make_dual(t, a) for t, a in zip(leaves, along, strict=True))
        moved = forward_ad.unpack_dual(called(name, pairs, duals, "bounded")).tangent
    slopes = torch.autograd.grad(called(name, pairs, leaves, "bounded"), leaves)
    want = sum((g * a).sum() for g, a in zip(slopes, along, strict=True))
    torch.testing.assert_close(moved, want, rtol=1e-9, atol=1e-10)


@pytest.mark.float64
@pytest.mark.parametrize("name", CASES)
def test_weights_of_one_are_none_and_of_zero_no_pairs(name: str) -> None:
    pairs, (x, y, near, far) = listed()
    function, _, options = CASES[name]
    ones = x, y, torch.ones_like(near), torch.ones_like(far)
    want = function(x, None, y, indices=pairs, **options)
    torch.testing.assert_close(called(name, pairs, ones, "cpu"), want, rtol=1e-14, atol=0)
    few = tuple(t[near > 0] for t in pairs[:2]) + tuple(t[far > 0] for t in pairs[2:])
    got = called(name, pairs, (x, y, (near > 0).double(), (far > 0).double()), "cpu")
    torch.testing.assert_close(got, function(x, None, y, indices=few, **options))


def test_weights_are_refused_where_nothing_weighs() -> None:
    pairs, (x, y, near, far) = listed()
    given = fl.WeightedPairs(*pairs, near, far)
    for function in (fl.margin_loss, fl.supervised_contrastive, fl.nt_xent, fl.lifted_structure):
        with pytest.raises(TypeError, match="weighs no pair"):
            function(x, None, y, indices=given)
    with pytest.raises(ValueError, match=r"indices.negative_weight: expected shape \(28,\)"):
        fl.contrastive(x, None, y, indices=given._replace(negative_weight=near))
    with pytest.raises(TypeError, match="indices.positive_weight: expected a floating"):
        fl.contrastive(x, None, y, indices=given._replace(positive_weight=near.long()))


# ---- factors of rows, and soft targets, of info_nce ---------------------------------------------


def nce(x: Tensor, y: Tensor, w: Tensor, bank: Tensor) -> Tensor:
    z = torch.cat([x @ y.T, x @ bank.T], dim=1) / 0.3
    return (z.logsumexp(1) - (w * (x @ y.T / 0.3).exp()).sum(1).log()).mean()


@pytest.mark.float64
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_by_factors_have_gradients(backend: str) -> None:
    x, y, bank = (torch.randn(n, 3, dtype=DOUBLE).requires_grad_() for n in (5, 6, 4))
    u, v = (torch.rand(n, 2, dtype=DOUBLE).div(2).requires_grad_() for n in (5, 6))

    def run(x: Tensor, y: Tensor, u: Tensor, v: Tensor, bank: Tensor) -> Tensor:
        options: dict[str, Any] = dict(positive_weight=(u, v), queue=bank, temperature=0.3)
        return fl.info_nce(x, y, **options, backend=require(backend))

    leaves = (x, y, u, v, bank)
    torch.testing.assert_close(run(*leaves), nce(x, y, u @ v.T, bank))
    assert torch.autograd.gradcheck(run, leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, leaves)
        return
    slopes = torch.autograd.grad(run(*leaves), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(sum(s.sum() for s in slopes), leaves)


@pytest.mark.float64
def test_a_class_table_and_mixed_labels() -> None:
    """Weights of a pair that labels alone tell: those of a table, and of two sets of labels."""
    x, y = torch.randn(9, 3, dtype=DOUBLE), torch.randn(8, 3, dtype=DOUBLE)
    labels, other, of_keys = (torch.randint(3, (n,)) for n in (9, 9, 8))
    one_hot = torch.eye(3, dtype=DOUBLE)
    options: dict[str, Any] = dict(temperature=0.3, reduction="none")
    told = dict(labels=labels, key_labels=of_keys)
    want = fl.info_nce(x, y, **told, **options)
    got = fl.info_nce(x, y, positive_weight=(one_hot[labels], one_hot[of_keys]), **options)
    torch.testing.assert_close(got, want)
    w = 0.3 * (labels[:, None] == of_keys) + 0.7 * (other[:, None] == of_keys)
    u = 0.3 * one_hot[labels] + 0.7 * one_hot[other]
    z = x @ y.T / 0.3
    some = w.sum(1) > 0
    want = z.logsumexp(1) - (w * z.exp()).sum(1).log()
    got = fl.info_nce(x, y, positive_weight=(u, one_hot[of_keys]), **options)
    torch.testing.assert_close(got, torch.where(some, want, 0))


@pytest.mark.float64
@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_are_a_cross_entropy(backend: str) -> None:
    x, y = (torch.randn(5, 3, dtype=DOUBLE).requires_grad_() for _ in range(2))
    rows, columns = torch.tensor([0, 0, 1, 2, 2, 4]), torch.tensor([1, 3, 1, 0, 4, 4])
    weight = torch.rand(6, dtype=DOUBLE).requires_grad_()
    soft = torch.zeros(5, 5, dtype=DOUBLE).index_put((rows, columns), weight)

    def run(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        given = (rows, columns, weight)
        return fl.info_nce(x, y, targets=given, temperature=0.3, backend=require(backend))

    z = x @ y.T / 0.3
    want = torch.nn.functional.cross_entropy(z, soft, reduction="sum") / 4
    torch.testing.assert_close(run(x, y, weight), want)
    assert torch.autograd.gradcheck(run, (x, y, weight))
    assert torch.autograd.gradgradcheck(run, (x, y, weight))


def test_targets_of_nothing() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss = fl.info_nce(x, x, targets=(none, none, torch.zeros(0)))
    assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()


X, Y, G = torch.randn(4, 3), torch.randn(5, 3), torch.randn(4, 2)
W = (torch.rand(4, 2), torch.rand(5, 2))
T = (torch.arange(4), torch.arange(4), torch.ones(4))
KEYS = torch.randn(5, 2)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a guide of one side": (dict(guide=G), "key_guide: expected a tensor"),
    "no guide": (dict(guide_margin=0.1), "guide_margin: expected none without a guide"),
    "a bank without a guide": (dict(guide=G, key_guide=KEYS, queue=Y), "queue_guide: expected one"),
    "a narrow guide": (dict(guide=G, key_guide=Y), r"key_guide: expected shape \[5, 2\]"),
    "two choices": (dict(guide=G, key_guide=KEYS, share=0.5), "share: expected none beside guide"),
    "ids": (dict(share=0.5, ids=torch.arange(4), key_ids=torch.arange(5)), "ids: expected none"),
    "hardness": (dict(share=0.5, hardness=1.0), "hardness: expected none beside share"),
    "no share": (dict(share=0.0), r"share: expected a value in \(0, 1\]"),
    "labels": (
        dict(positive_weight=W, labels=torch.arange(4), key_labels=torch.arange(5)),
        "labels: expected none beside positive_weight",
    ),
    "one factor": (dict(positive_weight=W[0]), "positive_weight: expected two tensors"),
    "factors": (dict(positive_weight=W[::-1]), r"positive_weight\[0\]: expected shape \[4, E\]"),
    "decoupled": (dict(targets=T, decoupled=True), "decoupled: expected none beside targets"),
    "two lists": (dict(targets=T[:2]), r"targets: expected \(rows, columns, weight\)"),
    "a weight short": (dict(targets=(*T[:2], T[2][:3])), r"targets\[2\]: expected shape \(4,\)"),
    "a target beyond": (
        dict(targets=(T[0], T[1] + 2, T[2])),
        r"targets\[1\]: expected rows of",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_nothing_is_refused(name: str) -> None:
    options, told = REFUSED[name]
    with pytest.raises((TypeError, ValueError, IndexError), match=told):
        fl.info_nce(X, Y, **options)


@pytest.mark.float64
@pytest.mark.parametrize("choice", ["guide", "share"])
def test_moco_with_chosen_negatives(choice: str) -> None:
    x, y, bank = (torch.randn(n, 3, dtype=DOUBLE) for n in (5, 5, 9))
    g, k, q = (torch.randint(3, (n, 2)).double() for n in (5, 5, 9))
    z, own = x @ bank.T / 0.3, (x * y).sum(1) / 0.3
    if choice == "guide":
        options: dict[str, Any] = dict(guide=g, key_guide=k, queue_guide=q)
        kept = g @ q.T <= (g * k).sum(1)[:, None]
    else:
        options, kept = dict(share=0.4), z >= z.topk(4, dim=1).values[:, -1:]
    sums = torch.cat([own[:, None], z.masked_fill(~kept, -torch.inf)], dim=1)
    want = (sums.logsumexp(1) - own).mean()
    for backend in BACKENDS:
        got = fl.info_nce(
            x, y, own_key=True, queue=bank, temperature=0.3, backend=require(backend), **options
        )
        torch.testing.assert_close(got, want)


def test_the_modules_are_the_options() -> None:
    q, k = torch.randn(7, 4), torch.randn(7, 4)
    want = fl.info_nce(q, k, share=0.3, normalize=True)
    assert losses.HardContrastiveLoss(0.3)(q, k) == want
    g, h = torch.randn(7, 3), torch.randn(7, 3)
    gist = losses.GISTEmbedLoss(contrast_anchors=False, contrast_positives=False)
    want = fl.info_nce(q, k, guide=g, key_guide=h, temperature=0.01, normalize=True)
    torch.testing.assert_close(gist(q, k, g, h), want)


def test_metrix_draws_by_its_generator() -> None:
    x, labels = torch.randn(8, 4), torch.arange(8) // 2
    for drawn_for in ("batch", "pair"):
        module = losses.MetrixLoss(drawn_for=drawn_for)
        one, same, other = (
            module(x, labels, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert one == same != other
    with pytest.raises(TypeError, match="weighs no pair"):
        losses.MetrixLoss(losses.MarginLoss())(x, labels)

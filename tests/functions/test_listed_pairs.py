"""Losses over pairs where a miner says which: literal formulas, and what all lists share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import listed_formulas
import pytest
import torch
from conftest import require
from listed_draws import DRAWN
from listed_formulas import mined
from pair_cases import Case, in_dtype
from torch import Tensor

import fused_losses
import fused_losses.functional as fl
from fused_losses import losses
from fused_losses.miners import CrossBatchMemory, MultiSimilarityMiner
from fused_losses.mining import mine_pairs, mine_triplets

CASES = {case.name.removesuffix("_mined"): case for case in DRAWN}
BACKENDS = ("reference", "bounded", "cpu")


def drawn(n: int = 13, m: int = 9, d: int = 5, alone: bool = False) -> SimpleNamespace:
    """float64 inputs; alone: of one batch, no row of which is its own pair."""
    t = mined(n, n if alone else m, d)
    if alone:
        near, far = t.a != t.p, t.b != t.q
        t.a, t.p, t.b, t.q = t.a[near], t.p[near], t.b[far], t.q[far]
    t.x, t.y = t.x.double(), t.y.double()
    if alone:
        t.y, t.y_labels = t.x, t.labels
    return t


def called(case: Case, t: SimpleNamespace, **options: Any) -> Tensor:
    return case.call(t, **options)


def answers(f: Any, t: SimpleNamespace, alone: bool) -> list[Tensor]:
    """The value, and the gradient of the rows of both sides."""
    x = t.x.detach().clone().requires_grad_()
    y = x if alone else t.y.detach().clone().requires_grad_()
    loss = f(SimpleNamespace(**{**vars(t), "x": x, "y": y}))
    return [loss.detach(), *torch.autograd.grad(loss.sum(), [x] if alone else [x, y])]


@pytest.mark.float64
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_literal(name: str, alone: bool, backend: str) -> None:
    case, t = CASES[name], drawn(alone=alone)
    formula = case.formula
    if alone and name == "lifted_structure":
        formula = lambda t: listed_formulas.lifted(t, alone=True)
    if alone and name == "snr_contrastive":
        t.x = t.y = t.x + 0.1
    want = answers(formula, t, alone)
    got = answers(lambda t: called(case, t, backend=require(backend)), t, alone)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10)


def every(labels: Tensor, others: Tensor, alone: bool) -> tuple[Tensor, ...]:
    same = labels[:, None] == others
    apart = ~torch.eye(*same.shape, dtype=torch.bool) if alone else torch.ones_like(same)
    return (*(same & apart).nonzero().T, *(~same).nonzero().T)


@pytest.mark.float64
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_list_of_all_pairs_is_none(name: str, alone: bool, reduction: str) -> None:
    function, t = CASES[name].function, drawn(alone=alone)
    assert function is not None
    single = name in ("orthogonal_projection", "intra_pair_variance", "threshold_consistent_margin")
    options: dict[str, Any] = {} if single else dict(reduction=reduction)
    indices = every(t.labels, t.y_labels, alone)

    def run(t: SimpleNamespace, **more: Any) -> Tensor:
        return function(t.x, t.labels, t.y, t.y_labels, **options, **more)

    want, got = answers(run, t, alone), answers(lambda t: run(t, indices=indices), t, alone)
    if alone and name == "lifted_structure":
        # with its own rows as y it is no second batch either
        assert torch.equal(run(t), function(t.x, t.labels, **options))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10)


@pytest.mark.float64
@pytest.mark.parametrize("name", CASES)
def test_triplets_are_their_pairs(name: str) -> None:
    case, t = CASES[name], drawn(alone=True)
    function = case.function
    assert function is not None
    found = mine_triplets(t.x, t.labels, positive="all", negative="all", triplets="all", margin=9.0)
    a, p, n, *_ = found
    assert len(a) > 5
    more: dict[str, Any] = dict(per="pair") if name == "margin_loss" else {}
    want = function(t.x, t.labels, indices=(a, p, a.clone(), n), **more)
    assert torch.equal(function(t.x, None, indices=(a, p, n), **more), want)
    assert torch.equal(function(t.x, t.labels, indices=found, **more), want)
    pairs = mine_pairs(t.x, t.labels)
    got = function(t.x, t.labels, indices=pairs, **more)
    assert torch.equal(got, function(t.x, t.labels, indices=tuple(pairs[:4]), **more))


@pytest.mark.float64
def test_margin_counts_listed_triplets() -> None:
    """Each triplet's two hinges once, whatever else its anchor has."""
    t = drawn(alone=True)
    a, p, n = (torch.tensor(v) for v in ([0, 0, 1, 1], [1, 2, 0, 0], [3, 4, 5, 5]))
    d = (t.x[:, None] - t.x).square().sum(2).sqrt()
    attract, repel = (d[a, p] - 1.0).clamp_min(0), (1.4 - d[a, n]).clamp_min(0)
    want = (attract + repel).sum() / ((attract > 0).sum() + (repel > 0).sum())
    got = fl.margin_loss(t.x, t.labels, indices=(a, p, n), per="triplet")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_listed(name: str) -> None:
    case, t = CASES[name], drawn()
    nothing = torch.zeros(0, dtype=torch.int64)
    t.a = t.p = t.b = t.q = nothing
    loss, *gradients = answers(lambda t: called(case, t), t, False)
    want = 1.0 if name == "orthogonal_projection" else 0.0
    assert loss == want and all((g == 0).all() for g in gradients)


@pytest.mark.float64
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str) -> None:
    """Those of the blocks are those of what gathers every pair at once."""
    case, t = CASES[name], drawn(7, 6, 3)
    found = []
    for backend in ("reference", "bounded"):
        x, y = t.x.clone().requires_grad_(), t.y.clone().requires_grad_()
        loss = called(case, SimpleNamespace(**{**vars(t), "x": x, "y": y}), backend=backend)
        first = torch.autograd.grad(loss, (x, y), create_graph=True)
        moved = sum((g * (g + 1)).sum() for g in first)
        found.append(torch.autograd.grad(moved, (x, y), allow_unused=True, materialize_grads=True))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.float64
@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name: str) -> None:
    case, t = CASES[name], drawn(7, 6, 3)
    along = torch.randn_like(t.x)
    f = lambda x: called(case, SimpleNamespace(**{**vars(t), "x": x}), backend="bounded")
    x = t.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(x), x)
    _, moved = torch.func.jvp(f, (t.x,), (along,))
    torch.testing.assert_close(moved, (slope * along).sum(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(torch.func.grad(f)(t.x), slope)


class Traced(NamedTuple):
    """The inputs as a trace takes them."""

    x: Tensor
    y: Tensor
    labels: Tensor
    y_labels: Tensor
    a: Tensor
    p: Tensor
    b: Tensor
    q: Tensor


# Dynamo traces every loss over lists. AOTAutograd, slower, then traces one op: of a loss that is a
# function of each pair, and of one that folds the pairs of a row
WHOLE = ("contrastive", "multi_similarity")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str) -> None:
    case, t = CASES[name], in_dtype(CASES[name], drawn(), torch.float32)
    rest = [getattr(t, field) for field in Traced._fields[2:]]
    f = lambda x, y: case.call(Traced(x, y, *rest))
    torch._dynamo.reset()
    compiler = "aot_eager" if name in WHOLE else "eager"
    compiled = torch.compile(f, fullgraph=True, backend=compiler)
    want = answers(lambda t: f(t.x, t.y), t, False)
    got = answers(lambda t: compiled(t.x, t.y), t, False)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_memory_knows_no_rows_a_pair(name: str) -> None:
    function, n, d, pairs = CASES[name].function, 64, 2_048, 40_000
    assert function is not None
    x = torch.randn(n, d, requires_grad=True)
    labels = torch.arange(n) % 8
    indices = tuple(torch.randint(n, (pairs,)) for _ in range(4))
    plan = fused_losses.explain(function, x, labels, indices=indices)
    assert plan.peak_extra_bytes is not None
    # one copy of the listed rows would be P D numbers
    assert plan.peak_extra_bytes < pairs * d * 4 / 4


def test_memory_of_batches() -> None:
    """A miner's pairs against a memory, whose copies of the batch are no pairs."""
    memory = CrossBatchMemory(12, 5, dtype=torch.float64)
    t = drawn(8, 6, 5)
    memory.enqueue(t.y, t.y_labels)
    ids = memory.enqueue(t.x, t.labels)
    indices = memory.mine(MultiSimilarityMiner(epsilon=9.0), t.x, t.labels, ids)
    for case in CASES.values():
        function = case.function
        assert function is not None
        loss = function(t.x, t.labels, memory.embeddings, memory.labels, indices=indices)
        own = memory.ids[indices[1]] == ids[indices[0]]
        assert loss.isfinite() and not own.any()


@pytest.mark.float64
@pytest.mark.parametrize("mined", [False, True])
def test_memory_of_a_module(mined: bool) -> None:
    """Every pair but a row and its copy, or a miner's; and without ids all of them."""
    memory, module = CrossBatchMemory(12, 5, dtype=torch.float64), losses.SupConLoss()
    t = drawn(8, 6, 5)
    assert memory.loss(module, t.x, t.labels) == 0
    memory.enqueue(t.y, t.y_labels)
    miner = MultiSimilarityMiner(epsilon=0.2) if mined else None
    ids = memory.enqueue(t.x, t.labels)
    same = t.labels[:, None] == memory.labels
    other = ids[:, None] != memory.ids
    indices = (*(same & other).nonzero().T, *(~same).nonzero().T)
    if miner is not None:
        indices = miner(
            t.x, t.labels, memory.embeddings, memory.labels, ids=ids, ref_ids=memory.ids
        )
    want = module(t.x, t.labels, indices, memory.embeddings, memory.labels)
    torch.testing.assert_close(memory.loss(module, t.x, t.labels, ids, miner), want)
    every = module(t.x, t.labels, None, memory.embeddings, memory.labels)
    assert torch.equal(memory.loss(module, t.x, t.labels), every) and every != want


ONE = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (dict(indices=ONE), TypeError, "indices: expected .* int64 tensors, got Tensor"),
        (dict(indices=(ONE, ONE)), ValueError, "indices: expected .*, got 2 of them"),
        (dict(indices=(ONE, ONE, ONE.int())), TypeError, r"indices\[2\]: expected an int64"),
        (dict(indices=(ONE, [0, 1], ONE)), TypeError, r"indices\[1\]: .* got list"),
        (dict(indices=(ONE, ONE, ONE[None])), ValueError, r"indices\[2\]: expected one dimension"),
        (dict(indices=(ONE, ONE, ONE[:1])), ValueError, "expected lists of one length"),
        (dict(indices=(ONE, ONE[:1], ONE, ONE)), ValueError, "expected lists of one length"),
        (
            dict(indices=(ONE + 13, ONE, ONE)),
            IndexError,
            r"indices\[0\]: .*embeddings in \[0, 13\)",
        ),
        (dict(indices=(ONE, ONE - 1, ONE)), IndexError, r"indices\[1\]: .*got values from -1 to"),
        (dict(indices=(ONE, ONE + 9, ONE), ref=True), IndexError, r"\[1\]: .*in \[0, 9\)"),
        (dict(labels=torch.zeros(3).long()), ValueError, "labels: expected shape"),
        (dict(ref_labels=torch.zeros(13).long()), ValueError, "ref_embeddings: expected a tensor"),
    ],
)
def test_bad_lists(change: dict[str, Any], error: type[Exception], told: str) -> None:
    t, change = drawn(), dict(change)
    given = dict(labels=t.labels, indices=(ONE, ONE, ONE))
    if change.pop("ref", False):
        given["ref_embeddings"] = t.y
    with pytest.raises(error, match=told):
        fl.contrastive(t.x, **(given | change))


def test_what_else_is_refused() -> None:
    t = drawn()
    with pytest.raises(TypeError, match="labels: expected an integer tensor"):
        fl.contrastive(t.x, None)
    with pytest.raises(TypeError, match=r"labels: expected an integer tensor \[N\] beside beta"):
        fl.margin_loss(t.x, None, indices=(ONE, ONE, ONE), beta=torch.ones(3))
    with pytest.raises(ValueError, match="anchor_count: expected None beside"):
        fl.supervised_contrastive(t.x, t.labels, indices=(ONE, ONE, ONE), anchor_count=3)

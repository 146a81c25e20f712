"""The classes of pytorch-metric-learning on our ops: values and gradients are its own."""

from __future__ import annotations

import copy
import threading
from typing import Any

import metric_learning_calls as calls
import pytest
import torch
from metric_learning_calls import (
    CASES,
    Case,
    distances,
    given,
    losses,
    miners,
    outcome,
    reducers,
)
from peer_values import Largest, check_as_the_peer

from fused_losses import integrations

PEER = "pytorch_metric_learning"
# the peer's histogram has no place for a cosine that is rounded to more than 1; its tuplets' slope
# grows without end towards 1, and ours stops at 1e-6 from it (docs/integrations.md)
OUTSIDE = [("HistogramLoss", "near duplicates"), ("TupletMarginLoss", "near duplicates")]
ROWS = [
    (case, way, kind)
    for case in CASES
    for way in case.ways
    for kind in calls.KINDS
    if (case.name, kind) not in OUTSIDE
]
# rows that are large or lie far out strain the narrow dtype; a float64 call that is narrowed within
# is one of the other rows as well
TYPED = [
    (*row, dtype)
    for row in ROWS
    for dtype in (torch.float32, torch.float64)
    if dtype == torch.float32 or row[2] in ("plain", "near duplicates")
]

# of float32 whatever the rows are: a row's place in the histogram, the collected precisions
NARROW = ("HistogramLoss", "SmoothAPLoss")


@pytest.mark.parametrize(
    "case,way,kind,dtype",
    TYPED,
    ids=[f"{case}, {way}, {kind}, {str(dtype)[6:]}" for case, way, kind, dtype in TYPED],
)
def test_values_and_gradients_are_the_peers(
    case: Case, way: str, kind: str, dtype: torch.dtype
) -> None:
    t = given(kind)
    rounded = torch.float32 if case.name in NARROW else dtype
    each = lambda dtype: outcome(case, t, way, dtype)
    # a learned boundary's slope is a difference of shares of the triplets, each added over the rows
    left_out = calls.N * torch.finfo(dtype).eps if "beta" in case.note else 0.0
    check_as_the_peer(PEER, case.name, each, dtype, calls.D, rounded, left_out)


@pytest.mark.parametrize("name", sorted({case.name for case in CASES}))
def test_no_operation_returns_a_matrix_of_pairs(name: str) -> None:
    n, c = 1100, 275  # all scores of fewer are kept for the backward
    case = next(case for case in CASES if case.name == name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, calls.D, generator=generator).requires_grad_()
    labels = torch.arange(n) // 4
    loss = case.build()
    if hasattr(loss, "num_classes"):
        options = {"centers_per_class": 2} if name == "SoftTripleLoss" else {}
        loss = getattr(losses, name)(num_classes=c, embedding_size=calls.D, **options)
    with integrations.accelerate(PEER, strict=True), Largest() as largest:
        loss(x, labels).backward()
    assert x.numel() <= largest.most <= n * c // 2


def test_the_peers_matrix_is_seen() -> None:
    x = torch.randn(300, calls.D)
    with Largest() as largest:
        losses.MultiSimilarityLoss()(x, torch.arange(300) // 4)
    assert largest.most >= 300 * 300


def test_every_class_has_its_calls_or_its_sentence() -> None:
    table = integrations.table(PEER)
    rows = {row.name for row in table.rows}
    left = {name.rpartition(".")[2] for name in table.left}
    assert {case.name for case in CASES} == rows - {"CrossBatchMemory"}
    public = {name for name, value in vars(losses).items() if isinstance(value, type)}
    bases = {name for name in public if name.startswith(("Base", "Generic")) or "Mixin" in name}
    assert public - bases == rows | (left & public)
    assert not rows & left


def attributes() -> dict[Any, Any]:
    """Every class of the peer's losses with its own attributes."""
    return {c: dict(vars(c)) for c in vars(losses).values() if isinstance(c, type)}


def test_undo_restores_exactly_the_peers_attributes() -> None:
    before = attributes()
    first = integrations.accelerate(PEER)
    second = integrations.accelerate(PEER)
    assert attributes() != before
    first.undo()
    first.undo()
    assert second.active and not first.active
    assert vars(losses.CircleLoss) != before[losses.CircleLoss]
    second.undo()
    assert attributes() == before


def step(loss: Any, t: calls.Given) -> torch.Tensor:
    x = t.x.clone().requires_grad_()
    loss(x, t.labels).backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    "build,why",
    [
        (lambda: losses.ContrastiveLoss(reducer=reducers.PerAnchorReducer()), "PerAnchorReducer"),
        (lambda: losses.ContrastiveLoss(collect_stats=True), "collect_stats"),
        (lambda: losses.NTXentLoss(temperature=0.001), "share"),
        (lambda: losses.MultiSimilarityLoss(distance=distances.LpDistance(p=1)), "p=1"),
        (lambda: losses.SupConLoss(distance=distances.LpDistance(power=3)), "power=3"),
    ],
)
def test_what_is_not_covered_is_the_peers_own_and_told(build: Any, why: str) -> None:
    t = given("plain")
    want = step(build(), t)
    with integrations.accelerate(PEER) as acceleration:
        assert torch.equal(step(build(), t), want)
        (ran,) = acceleration.report()
    assert ran.accelerated == 0 and sum(ran.left.values()) == 1
    assert any(why in reason for reason in ran.left)
    with integrations.accelerate(PEER, strict=True), pytest.raises(RuntimeError, match=why):
        step(build(), t)


def test_a_subclass_goes_on_with_its_own() -> None:
    class Mine(losses.CircleLoss):
        def _compute_loss(self, mat: Any, *masks: Any) -> Any:
            return super()._compute_loss(mat * 0.5, *masks)

    t = given("plain")
    want = step(Mine(), t)
    with integrations.accelerate(PEER) as acceleration:
        assert torch.equal(step(Mine(), t), want)
        (ran,) = acceleration.report()
    assert ran.name == "Mine" and "a class of its own, from CircleLoss" in ran.left


MEMORIES = {
    "NTXentLoss": losses.NTXentLoss,
    "ContrastiveLoss": losses.ContrastiveLoss,
    "SupConLoss": losses.SupConLoss,
    "CircleLoss": losses.CircleLoss,
    "MultiSimilarityLoss": losses.MultiSimilarityLoss,
    "GeneralizedLiftedStructureLoss": losses.GeneralizedLiftedStructureLoss,
    "TripletMarginLoss": losses.TripletMarginLoss,
    "weighted": lambda: losses.ContrastiveLoss(
        reducer=reducers.ClassWeightedReducer(torch.linspace(0.5, 2, calls.C))
    ),
}


def trained(build: Any, mined: bool, steps: int = 5) -> tuple[list[torch.Tensor], Any]:
    """The losses and gradients of some steps on a memory that wraps around."""
    miner = miners.MultiSimilarityMiner() if mined else None
    memory = losses.CrossBatchMemory(build(), calls.D, memory_size=58, miner=miner)
    found = []
    for seed in range(steps):
        t = given("plain", seed)
        x = t.x.clone().requires_grad_()
        value = memory(x, t.labels)
        value.backward()
        assert x.grad is not None
        found += [value.detach(), x.grad]
    return found, memory


@pytest.mark.parametrize("mined", [False, True], ids=["all pairs", "mined"])
@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_moves_and_loses_as_the_peers(name: str, mined: bool) -> None:
    want, peers = trained(MEMORIES[name], mined)
    with integrations.accelerate(PEER) as acceleration:
        got, ours = trained(MEMORIES[name], mined)
        report = {ran.name: ran for ran in acceleration.report()}
    for a, b in zip(got, want, strict=True):
        # of some hundred terms of float64 each
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert torch.equal(ours.embedding_memory, peers.embedding_memory)
    assert torch.equal(ours.label_memory, peers.label_memory)
    assert (ours.queue_idx, ours.has_been_filled) == (peers.queue_idx, peers.has_been_filled)
    direct = not mined and name in list(MEMORIES)[:6]
    assert report["CrossBatchMemory"].accelerated == (5 if direct else 0)
    if not direct and name != "weighted":
        # the loss has the lists
        assert report[name].accelerated == 5


def test_threads_compute_what_one_does() -> None:
    t = given("plain")
    want = step(losses.MultiSimilarityLoss(), t)
    found: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(5):
            with integrations.accelerate(PEER, strict=True):
                found.append(step(losses.MultiSimilarityLoss(), t))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(torch.allclose(got, want, rtol=1e-12, atol=1e-15) for got in found)
    assert step(losses.MultiSimilarityLoss(), t).equal(want)


def test_instances_survive_what_instances_do() -> None:
    t = given("plain")
    loss = losses.ArcFaceLoss(calls.C, calls.D).double()
    want = step(loss, t)
    with integrations.accelerate(PEER, strict=True):
        made = losses.ArcFaceLoss(calls.C, calls.D).double()
        made.load_state_dict(loss.state_dict())
        for each in (loss, made, copy.deepcopy(made)):
            assert torch.allclose(step(each, t), want, rtol=1e-12)
    assert step(made, t).equal(want)

"""Miners as modules against explicit loops, and the memory that they mine against."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from conftest import widest
from mining_formulas import (
    allowed,
    batch,
    lines,
    matrix,
    multi_similarity,
    pairs_by_loops,
    triplets_by_loops,
)
from torch import Tensor

from fused_losses import miners
from fused_losses.miners import CrossBatchMemory
from fused_losses.mining.pairs import mine_pairs
from fused_losses.mining.triplets import mine_triplets

NAMES = {"hard": "hardest", "easy": "easiest", "semihard": "semihard", "all": "all"}


def problem(
    ref: bool, dtype: torch.dtype = torch.float64
) -> tuple[tuple[Tensor, ...], Tensor, tuple[list, list]]:
    """The miner's arguments, the normalised Euclidean distances, and who is whose candidate."""
    x, labels = batch(18, 4, 5, dtype)
    given = (x, labels, *batch(23, 4, 6, dtype)) if ref else (x, labels)
    y, ref_labels = given[2:] if ref else given
    unit = [t / t.norm(dim=1, keepdim=True) for t in (x.double(), y.double())]
    return given, matrix(*unit, "euclidean"), allowed(labels, ref_labels, not ref)


def both_lists(found: tuple[Tensor, ...]) -> tuple[list, list]:
    assert len(found) == 4 and all(t.dtype == torch.int64 for t in found)
    return lines(found[:2]), lines(found[2:])


@pytest.mark.parametrize("ref", [False, True])
def test_batch_hard(ref: bool, backend: str) -> None:
    given, d, pairs = problem(ref, widest(backend))
    miner = miners.BatchHardMiner(backend=backend)
    found = miner(*given)
    want = triplets_by_loops(d, 1, *pairs)
    assert isinstance(found, tuple) and len(found) == 3
    assert lines(found) == want and miner.left_out == 18 - len(want)


@pytest.mark.parametrize("ref", [False, True])
@pytest.mark.parametrize("ranges", [(None, None), ((0.3, 1.4), (0.2, 1.1))])
@pytest.mark.parametrize(("positive", "negative"), list(itertools.product(NAMES, repeat=2)))
def test_batch_easy_hard(positive, negative, ranges, ref, backend: str) -> None:
    given, d, (same, different) = problem(ref, widest(backend))
    build = lambda: miners.BatchEasyHardMiner(positive, negative, *ranges, backend=backend)
    if {positive, negative} in ({"semihard"}, {"semihard", "all"}):
        with pytest.raises(ValueError, match="neg_strategy: expected"):
            build()
        return
    found = both_lists(build()(*given))
    sides = (NAMES[positive], NAMES[negative])
    if "all" not in sides:
        want = triplets_by_loops(d, 1, same, different, *sides, ranges=ranges)
        assert found == ([(i, p) for i, p, _ in want], [(i, n) for i, _, n in want])
        return

    def one(which: str, columns: list[int], z: list[float], bounds, hardest: bool) -> list[int]:
        if which == "all":
            return columns
        inside = [j for j in columns if bounds is None or bounds[0] <= z[j] <= bounds[1]]
        pick = max if hardest == (which == "hard") else min
        return [pick(inside, key=lambda j: z[j])] if inside else []

    want = pairs_by_loops(
        *(d, 1, same, different),
        lambda z, ps, ns: (
            one(positive, ps, z, ranges[0], True),
            one(negative, ns, z, ranges[1], False),
        ),
    )
    assert found == want


@pytest.mark.float64
@pytest.mark.parametrize("ref", [False, True])
@pytest.mark.parametrize("kind", ["all", "hard", "semihard", "easy"])
def test_triplet_margin(kind: str, ref: bool, backend: str) -> None:
    given, d, pairs = problem(ref)
    keep = {
        "all": lambda g: g <= 0.15,
        "hard": lambda g: g <= 0,
        "semihard": lambda g: 0 < g <= 0.15,
        "easy": lambda g: g > 0.15,
    }[kind]
    want = triplets_by_loops(d, 1, *pairs, "all", "all", keep)
    found = miners.TripletMarginMiner(0.15, kind, backend=backend)(*given)
    assert lines(found) == want and len(want) > 0


@pytest.mark.float64
@pytest.mark.parametrize("ref", [False, True])
def test_multi_similarity(ref: bool, backend: str) -> None:
    given, d, pairs = problem(ref)
    similarity = 1 - d.square() / 2
    found = miners.MultiSimilarityMiner(backend=backend)(*given)
    assert both_lists(found) == pairs_by_loops(similarity, -1, *pairs, multi_similarity)


@pytest.mark.float64
@pytest.mark.parametrize("ref", [False, True])
def test_pair_margin_and_hard_negatives(ref: bool, backend: str) -> None:
    given, d, pairs = problem(ref)
    found = miners.PairMarginMiner(0.9, 1.1, backend=backend)(*given)
    choose = lambda z, ps, ns: ([p for p in ps if z[p] > 0.9], [n for n in ns if z[n] < 1.1])
    assert both_lists(found) == pairs_by_loops(d, 1, *pairs, choose)
    found = miners.HardNegativeMiner(3, backend=backend)(*given)
    choose = lambda z, ps, ns: (ps, sorted(ns, key=lambda n: z[n])[:3])
    assert both_lists(found) == pairs_by_loops(d, 1, *pairs, choose)


@pytest.mark.float64
def test_angular_takes_rows_as_they_come(backend: str) -> None:
    x, labels = batch(15, 3, 4)
    same, different = allowed(labels, labels, True)

    def wide(x: Tensor) -> list[tuple[int, int, int]]:
        return [
            (i, p, n)
            for i in range(15)
            for p, n in itertools.product(same[i], different[i])
            if float((x[i] - x[p]).norm())
            > 2 * math.tan(math.radians(35)) * float((x[n] - (x[i] + x[p]) / 2).norm())
        ]

    unit = x / x.norm(dim=1, keepdim=True)
    assert lines(miners.AngularMiner(35, backend=backend)(x, labels)) == wide(x) != wide(unit)
    given = dict(normalize=True, backend=backend)
    assert lines(miners.AngularMiner(35, **given)(x, labels)) == wide(unit)


@pytest.mark.float64
def test_distance_weighted_is_seeded(backend: str) -> None:
    x, labels = batch(40, 8, 5)
    generator = torch.Generator().manual_seed(1)
    miner = miners.DistanceWeightedMiner(generator=generator, backend=backend)
    first, second = miner(x, labels), miner(x, labels)
    assert len(first) == 3 and not torch.equal(first[2], second[2])
    generator.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(miner(x, labels), first, strict=True))
    assert bool((labels[first[0]] == labels[first[1]]).all())
    assert bool((labels[first[0]] != labels[first[2]]).all())
    d = unit_distances(x)
    assert float(d[first[0], first[2]].max()) < 1.4


def unit_distances(x: Tensor) -> Tensor:
    return matrix(*[x / x.norm(dim=1, keepdim=True)] * 2, "euclidean")


@pytest.mark.float64
def test_metric_and_normalize(backend: str) -> None:
    x, labels = batch(16, 4, 3)
    pairs = allowed(labels, labels, True)
    for metric, sign in (("dot", -1), ("cityblock", 1)):
        miner = miners.BatchHardMiner(metric=metric, normalize=False, backend=backend)
        assert lines(miner(x, labels)) == triplets_by_loops(matrix(x, x, metric), sign, *pairs)


def test_miners_are_modules() -> None:
    miner = miners.TripletMarginMiner(margin=0.3, type_of_triplets="semihard")
    assert "margin=0.3" in repr(miner) and "metric='euclidean'" in repr(miner)
    assert "cosine" in repr(miners.MultiSimilarityMiner())
    again = copy.deepcopy(miner)
    assert again.margin == 0.3 and not list(miner.parameters()) and not miner.state_dict()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: miners.TripletMarginMiner(type_of_triplets="hardest"), "type_of_triplets: "),
        (lambda: miners.BatchEasyHardMiner(pos_strategy="hardest"), "pos_strategy: expected"),
        (lambda: miners.BatchEasyHardMiner(neg_strategy="none"), "neg_strategy: expected"),
        (lambda: miners.BatchHardMiner(metric="l2")(*batch(4, 2, 2)), "metric: expected"),
        (lambda: CrossBatchMemory(0, 3), "size: expected"),
        (lambda: CrossBatchMemory(3, -1), "embedding_size: expected"),
    ],
)
def test_bad_values(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


# ---- the memory ---------------------------------------------------------------------------------


def test_memory_is_a_ring() -> None:
    """Against a list that keeps the last rows."""
    memory, kept, count = CrossBatchMemory(7, 3), [], 0
    for n in (3, 0, 2, 4, 1, 7, 9, 5):
        x, labels = torch.randn(n, 3), torch.randint(0, 4, (n,))
        ids = memory.enqueue(x.requires_grad_(), labels)
        assert ids.tolist() == list(range(count, count + n))
        kept += list(zip(ids.tolist(), labels.tolist(), x.tolist(), strict=True))
        kept, count = kept[-7:], count + n
        assert len(memory) == len(kept) == len(memory.ids)
        fields = (memory.ids, memory.labels, memory.embeddings)
        held = zip(*(t.tolist() for t in fields), strict=True)
        assert sorted(held) == kept
        assert not memory.embeddings.requires_grad
    memory.reset()
    assert len(memory) == 0 and memory.embeddings.shape == (0, 3)
    assert memory.enqueue(torch.randn(2, 3), torch.tensor([1, 2])).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_keeps_its_dtype(dtype: torch.dtype, backend: str) -> None:
    memory = CrossBatchMemory(8, 3, dtype=dtype)
    x, labels = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    ids = memory.enqueue(x, labels)
    assert memory.embeddings.dtype == dtype and torch.equal(memory.embeddings, x.to(dtype))
    found = memory.mine(miners.BatchHardMiner(backend=backend), x, labels, ids)
    assert len(found[0]) == 6


@pytest.mark.float64
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_own_copies_are_not_positives(rounds: int, backend: str) -> None:
    """Mining against the memory is mining against all rows ever seen, but a row and its copy."""
    memory, size = CrossBatchMemory(20, 4, dtype=torch.float64), 20
    seen_x, seen_labels = torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0).long()
    for _ in range(rounds):
        x, labels = batch(8, 4, 3)
        ids = memory.enqueue(x, labels)
        seen_x, seen_labels = torch.cat([seen_x, x]), torch.cat([seen_labels, labels])
    oldest = max(0, len(seen_x) - size)
    columns = torch.arange(oldest, len(seen_x))
    d = matrix(x, seen_x[columns], "euclidean")
    same, different = allowed(labels, seen_labels[columns], False, ids, columns)
    for positive, negative in (("hardest", "hardest"), ("all", "semihard")):
        want = triplets_by_loops(d, 1, same, different, positive, negative)
        want = sorted((i, int(columns[p]), int(columns[n])) for i, p, n in want)
        given = dict(positive=positive, negative=negative, backend=backend)
        found = memory.mine(mine_triplets, x, labels, ids, **given)
        named = (found.anchor, memory.ids[found.positive], memory.ids[found.negative])
        assert sorted(lines(named)) == want
        assert bool((named[1] != ids[found.anchor]).all())
    pairs = memory.mine(mine_pairs, x, labels, ids, strategy="all", backend=backend)
    assert len(pairs.anchor) == sum(map(len, same))
    # without ids the copies are positives like others
    pairs = memory.mine(mine_pairs, x, labels, strategy="all", backend=backend)
    assert len(pairs.anchor) == sum(map(len, same)) + 8


def test_memory_state() -> None:
    memory = CrossBatchMemory(5, 2)
    for n in (3, 4):
        memory.enqueue(torch.randn(n, 2), torch.arange(n))
    again = CrossBatchMemory(5, 2)
    again.load_state_dict(memory.state_dict())
    assert len(again) == 5 and torch.equal(again.embeddings, memory.embeddings)
    x, labels = torch.randn(2, 2), torch.tensor([8, 9])
    assert torch.equal(again.enqueue(x, labels), memory.enqueue(x, labels))
    assert torch.equal(again.ids, memory.ids) and torch.equal(again.labels, memory.labels)
    empty = CrossBatchMemory(5, 2)
    again.load_state_dict(empty.state_dict())
    assert len(again) == 0
    copied = copy.deepcopy(memory)
    assert len(copied) == 5 and torch.equal(copied.ids, memory.ids)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.enqueue([1.0], None), TypeError, "embeddings: expected a tensor"),
        (lambda m: m.enqueue(torch.randn(2, 4), torch.zeros(2).long()), ValueError, "embeddings"),
        (lambda m: m.enqueue(torch.randn(2, 3), torch.zeros(3).long()), ValueError, "labels"),
        (lambda m: m.enqueue(torch.randn(2, 3), torch.zeros(2)), TypeError, "labels"),
        (lambda m: m.mine(mine_pairs, torch.randn(3), torch.zeros(2)), ValueError, "embeddings"),
        (lambda m: CrossBatchMemory(2.0, 3), TypeError, "size: expected an integer"),
        (lambda m: CrossBatchMemory(2, 3, dtype=torch.int64), TypeError, "dtype: expected"),
    ],
)
def test_bad_memory(call, error: type, words: str) -> None:
    memory = CrossBatchMemory(4, 3)
    with pytest.raises(error, match=words):
        call(memory)
    assert len(memory) == 0

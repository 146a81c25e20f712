"""The order of pictures, and reading them ahead."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from fused_losses.datasets import EpochBatches, PrefetchReader
from fused_losses.datasets.sampler import shuffled


class Numbers:
    """A set whose picture i is filled with i; reading `broken` fails, `slow` takes longest."""

    def __init__(self, n: int, broken: int = -1) -> None:
        self.labels = torch.arange(n) % 7
        self.classes, self.names, self.broken = 7, None, broken
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor) -> Tensor:
        self.threads.add(threading.current_thread().name)
        if self.broken in indices.tolist():
            raise OSError(f"picture {self.broken} is broken")
        time.sleep(0.002 * (int(indices.sum()) % 3))
        return indices.to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 1025, 4099])
def test_an_epochs_order_is_a_permutation(n: int) -> None:
    places = torch.arange(n)
    orders = [shuffled(places, n, seed=3, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert order.sort().values.equal(places)
    if n >= 7:
        assert not orders[0].equal(orders[1]) and not orders[1].equal(orders[2])
        assert not shuffled(places, n, seed=4, epoch=0).equal(orders[0])


def test_every_order_of_four_comes_as_often() -> None:
    draws, counts = 2400, {}
    for epoch in range(draws):
        order = tuple(shuffled(torch.arange(4), 4, seed=0, epoch=epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    expected = draws / 24
    # chi-square with 23 degrees of freedom: beyond 50 once in 1000
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 50


def test_where_a_place_goes_is_uniform_and_neighbours_part() -> None:
    n, epochs = 5000, 200
    first = torch.stack(
        [shuffled(torch.arange(2), n, seed=1, epoch=epoch) for epoch in range(epochs)]
    )
    deciles = (first[:, 0] * 10 // n).bincount(minlength=10).double()
    assert float(((deciles - epochs / 10) ** 2 / (epochs / 10)).sum()) < 28
    # two independent places are n / 3 apart in the mean
    apart = (first[:, 0] - first[:, 1]).abs().double().mean() / n
    assert abs(float(apart) - 1 / 3) < 0.06
    order = shuffled(torch.arange(n), n, seed=1, epoch=0).double()
    pairs = torch.stack([order[:-1], order[1:]])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.05


def test_a_very_large_set_costs_only_its_batch() -> None:
    sampler = EpochBatches(1 << 40, 256, seed=0)
    batch = sampler.batch(123456789)
    assert len(batch) == 256 and len(batch.unique()) == 256
    assert int(batch.min()) >= 0 and int(batch.max()) < 1 << 40
    assert int(batch.max()) > 1 << 36


def test_the_order_stays_the_same_for_ever() -> None:
    # resumed runs and other machines rely on these numbers
    assert EpochBatches(10, 10, seed=0).batch(0).tolist() == [1, 9, 3, 0, 7, 2, 6, 8, 4, 5]
    assert EpochBatches(10**6, 4, seed=7).batch(300000).tolist() == [924735, 571494, 477266, 566177]


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_has_every_picture_once(drop_last: bool) -> None:
    sampler = EpochBatches(103, 10, seed=5, drop_last=drop_last)
    assert len(sampler) == (10 if drop_last else 11)
    for epoch in range(3):
        steps = range(epoch * len(sampler), (epoch + 1) * len(sampler))
        assert {sampler.epoch(step) for step in steps} == {epoch}
        batches = [sampler.batch(step) for step in steps]
        seen = torch.cat(batches)
        assert len(seen.unique()) == len(seen) == (100 if drop_last else 103)
        assert [len(b) for b in batches] == [10] * 10 + ([] if drop_last else [3])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 13])
def test_ranks_share_the_same_global_batch(world: int) -> None:
    whole = EpochBatches(45, 10, seed=2)
    for step in range(12):
        parts = [
            EpochBatches(45, 10, seed=2, world=world, rank=r).batch(step) for r in range(world)
        ]
        assert torch.cat(parts).equal(whole.batch(step))
        assert torch.cat(parts).equal(whole.global_batch(step))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4), {}, "n: expected 1 to"),
        ((9, 0), {}, "batch: expected at least 1, got 0"),
        ((9, 10), {"drop_last": True}, "batch: expected .* n = 9 with drop_last, got 10"),
        ((9, 4), {"world": 2, "rank": 2}, "rank: expected .* got 2 of 2"),
        ((9, 4), {"world": 0}, "rank: expected .* got 0 of 0"),
    ],
)
def test_numbers_that_make_no_batches(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochBatches(*arguments, seed=0, **options)


def test_a_step_is_an_integer_from_0() -> None:
    sampler = EpochBatches(9, 4, seed=0)
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        sampler.batch(-1)
    with pytest.raises(TypeError, match="step: expected an integer, got float"):
        sampler.batch(1.0)


# ---- reading ahead ------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_come_in_order_and_as_the_sampler_says(threads: int) -> None:
    numbers, sampler = Numbers(50), EpochBatches(50, 6, seed=1, world=2, rank=1)
    with PrefetchReader(numbers, sampler, depth=5, threads=threads, start=3, stop=21) as reader:
        batches = list(reader)
    assert [batch.step for batch in batches] == list(range(3, 21))
    for batch in batches:
        assert batch.indices.equal(sampler.batch(batch.step))
        assert batch.images[:, 0, 0, 0].equal(batch.indices.to(torch.uint8))
        assert batch.labels.equal(numbers.labels[batch.indices])
    assert 1 <= len(numbers.threads) <= threads
    assert threading.current_thread().name not in numbers.threads


def test_without_an_end_it_goes_on_and_closes_cleanly() -> None:
    before = threading.active_count()
    reader = PrefetchReader(Numbers(10), EpochBatches(10, 4, seed=0), threads=2)
    steps = [next(reader).step for _ in range(20)]
    assert steps == list(range(20))
    reader.close()
    reader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(reader)


def test_at_most_depth_batches_are_read_ahead() -> None:
    asked: list[int] = []

    class Counting(EpochBatches):
        def batch(self, step: int) -> Tensor:
            asked.append(step)
            return super().batch(step)

    with PrefetchReader(Numbers(40), Counting(40, 4, seed=0), depth=3, threads=2) as reader:
        next(reader)
        time.sleep(0.1)
        assert max(asked) <= 3


def test_an_error_comes_at_its_own_step() -> None:
    sampler = EpochBatches(40, 4, seed=0)
    broken = int(sampler.batch(5)[2])
    before = threading.active_count()
    reader = PrefetchReader(Numbers(40, broken), sampler, depth=4, threads=2)
    for step in range(5):
        assert next(reader).step == step
    with pytest.raises(OSError, match=f"picture {broken} is broken"):
        next(reader)
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(reader)


def test_a_reader_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="over 9 pictures, got n = 8"):
        PrefetchReader(Numbers(9), EpochBatches(8, 4, seed=0))
    with pytest.raises(ValueError, match="depth, threads: .* got 0, 2"):
        PrefetchReader(Numbers(9), EpochBatches(9, 4, seed=0), depth=0)

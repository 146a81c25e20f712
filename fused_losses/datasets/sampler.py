"""Which pictures a step sees, and reading them ahead of the trainer.

The pictures of a step are a function of (seed, step): a run that goes on with another number of
ranks sees the same batches. An epoch's order is a permutation computed at the places asked for
(a Feistel network with cycle walking), so nothing of a large set's size is stored or shuffled.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.datasets.base import ImageSet, read_labelled

ROUNDS = 8
SMALL = 1 << 10  # up to here halves of the bits mix too little: the numbers' hashes are sorted
MAX_PICTURES = 1 << 48


def check_ranks(rank: int, world: int) -> None:
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank: expected one in [0, world) of at least one, got {rank} of {world}")


# ---- an epoch's order ---------------------------------------------------------------------------


def _mix(x: Tensor, key: int) -> Tensor:
    """A hash of 32-bit numbers. [k] int64 in [0, 2^32)"""
    # multipliers below 2^31: no product leaves int64
    x = x ^ key
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x31848BAB & 0xFFFFFFFF
    return x ^ (x >> 16)


def shuffled(places: Tensor, n: int, *, seed: int, epoch: int) -> Tensor:
    """Where a pseudo-random permutation of [0, n) takes `places` [k] int64 in [0, n).

    Luby and Rackoff, 1988 (Feistel rounds); Black and Rogaway, 2002 (cycle walking: a result
    beyond n is permuted again). Time O(k) expected, memory O(k).
    """
    digest = hashlib.blake2b(
        repr((int(seed), int(epoch))).encode(), digest_size=4 * ROUNDS
    ).digest()
    keys = struct.unpack(f"<{ROUNDS}I", digest)
    if n <= SMALL:
        numbers = torch.arange(n)
        hashes = (_mix(numbers, keys[0]) << 30) ^ _mix(numbers, keys[1])
        return hashes.argsort(stable=True)[places]
    bits = (n - 1).bit_length()
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1

    def permute(x: Tensor) -> Tensor:
        low, high = x & low_mask, x >> low_bits
        for i in range(0, ROUNDS, 2):
            low = low ^ (_mix(high, keys[i]) & low_mask)
            high = high ^ (_mix(low, keys[i + 1]) & high_mask)
        return high << low_bits | low

    out = permute(places)
    beyond = (out >= n).nonzero().flatten()
    while len(beyond):
        out[beyond] = permute(out[beyond])
        beyond = beyond[out[beyond] >= n]
    return out


class EpochBatches:
    """Batches of indices in [0, n): every epoch all of them once, in an order of its own.

    batch: the pictures of a step over all ranks. An epoch has ceil(n / batch) steps, the last one
    shorter; with drop_last floor(n / batch), all full. Steps count on through the epochs. Ranks
    hold consecutive parts of the global batch, the first ones one longer where it does not
    divide (a part may be empty). Raises ValueError for numbers that make no batches.
    """

    def __init__(
        self,
        n: int,
        batch: int,
        *,
        seed: int,
        world: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ) -> None:
        if not 1 <= n <= MAX_PICTURES:
            raise ValueError(f"n: expected 1 to 2^48 pictures, got {n}")
        if batch < 1 or (drop_last and batch > n):
            most = f" and at most n = {n} with drop_last" if drop_last else ""
            raise ValueError(f"batch: expected at least 1{most}, got {batch}")
        check_ranks(rank, world)
        self.n, self.size, self.seed = n, batch, seed
        self.world, self.rank = world, rank
        self.steps_per_epoch = n // batch if drop_last else -(-n // batch)

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self.steps_per_epoch

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def _span(self, step: int) -> tuple[int, int]:
        """The places [first, stop) of a step in its epoch's order."""
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"step: expected an integer, got {type(step).__name__}")
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        first = step % self.steps_per_epoch * self.size
        return first, min(first + self.size, self.n)

    def global_batch(self, step: int) -> Tensor:
        """The pictures of a step, of all ranks. [batch or fewer] int64"""
        first, stop = self._span(step)
        places = torch.arange(first, stop)
        return shuffled(places, self.n, seed=self.seed, epoch=self.epoch(step))

    def batch(self, step: int) -> Tensor:
        """This rank's part of `global_batch(step)`. Time O(batch / world)."""
        first, stop = self._span(step)
        each, longer = divmod(stop - first, self.world)
        start = first + self.rank * each + min(self.rank, longer)
        places = torch.arange(start, start + each + (self.rank < longer))
        return shuffled(places, self.n, seed=self.seed, epoch=self.epoch(step))


# ---- reading ahead ------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The pictures of a step on this rank."""

    step: int
    indices: Tensor  # [b] int64
    images: Tensor  # [b, channels, height, width] uint8
    labels: Tensor  # [b] int64


class PrefetchReader:
    """Batches of the steps [start, stop), in order, read up to `depth` steps ahead by threads.

    Each thread reads one whole batch at a time (decoding lets go of the interpreter's lock). An
    error while reading a step is raised where that step would come out, and ends the reader.
    stop None: no end. Use it in a `with` statement, or call `close`: it waits for the batches
    being read and drops the others. Memory: depth batches.
    """

    def __init__(
        self,
        image_set: ImageSet,
        sampler: EpochBatches,
        *,
        depth: int = 4,
        threads: int = 2,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        if depth < 1 or threads < 1:
            raise ValueError(f"depth, threads: expected at least 1 each, got {depth}, {threads}")
        if sampler.n != len(image_set):
            raise ValueError(
                f"sampler: expected one over {len(image_set)} pictures, got n = {sampler.n}"
            )
        self._set, self._sampler = image_set, sampler
        self._next, self._stop = start, stop
        self._ahead: deque[Future[Batch]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
        self._closed = False
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        if self._stop is None or self._next < self._stop:
            self._ahead.append(self._pool.submit(self._read, self._next))
            self._next += 1

    def _read(self, step: int) -> Batch:
        indices = self._sampler.batch(step)
        return Batch(step, *read_labelled(self._set, indices))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed or not self._ahead:
            self.close()
            raise StopIteration
        try:
            batch = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self._submit()
        return batch

    def close(self) -> None:
        """Ends the threads; calling it again does nothing."""
        self._closed = True
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> PrefetchReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

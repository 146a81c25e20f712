"""Ranks meet in a store that a restarted launcher may have handed them with old contents.

torchrun (torch 2.13) keeps one TCPStore over its restarts. Process groups write their addresses
under the same keys each time, so a rank that is early can read where a dead one listened.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

POLL_SECONDS = 0.005


def fresh_store(
    store: Store, rank: int, world: int, timeout: timedelta = timedelta(minutes=30)
) -> Store:
    """The part of the store that only this attempt's ranks know; every rank must call it.

    Each rank shows rank 0 a number of its own and waits for the answer to that number: an answer
    to an earlier attempt, or one by a dead rank 0, is under another key.
    TimeoutError names the ranks that did not come. O(world) messages of rank 0 in all.
    """
    number = uuid.uuid4().hex
    if rank:
        store.set(f"join/{rank}", number)
        answer = f"join/{rank}/{number}"
        store.wait([answer], timeout)
        token = store.get(answer).decode()
        store.set(f"{token}/here/{rank}", "")
    else:
        token = number
        _answer_all(store, token, world, timeout)
    return PrefixStore(token, store)


def _answer_all(store: Store, token: str, world: int, timeout: timedelta) -> None:
    """Answer every number shown, old ones too, until all ranks say that they have the token."""
    deadline = time.monotonic() + timeout.total_seconds()
    missing, answered = set(range(1, world)), {}
    while missing:
        for rank in sorted(missing):
            key = f"join/{rank}"
            if store.check([key]) and (number := store.get(key).decode()) != answered.get(rank):
                store.set(f"{key}/{number}", token)
                answered[rank] = number
            if store.check([f"{token}/here/{rank}"]):
                missing.discard(rank)
        if time.monotonic() > deadline:
            told = ", ".join(map(str, sorted(missing)))
            raise TimeoutError(f"ranks {told} of {world} did not come within {timeout}")
        time.sleep(POLL_SECONDS)


__all__ = ["fresh_store"]

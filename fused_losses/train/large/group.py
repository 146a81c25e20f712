"""What all ranks of a large run do as one: meet, agree on refusals, and leave."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.rendezvous import rendezvous

from fused_losses.train.frame.options import OptionError
from fused_losses.train.frame.runs import Lock, RunError, locked
from fused_losses.train.large.config import LargeConfig
from fused_losses.train.large.join import fresh_store

LOCK_SECONDS = 30.0  # for the former process of this run to be gone after a restart


@contextlib.contextmanager
def process_group(config: LargeConfig) -> Iterator[torch.device]:
    """The group of torchrun's processes, of the caller, or of this process alone; its device."""
    device = torch.device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # cuBLAS is deterministic with a workspace of a fixed size alone
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if dist.is_initialized():
        yield device
        return
    # gloo beside NCCL: the checkpoints' threads talk on the host
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        store, rank, world = next(rendezvous("env://"))
        store = fresh_store(store, rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    yield device
    # A group's threads end with the last that holds it; one that outlives the interpreter may drop
    # a tensor of Python's there, which aborts. What holds groups in circles goes first.
    gc.collect()
    # not after an error: it waits for ranks that may be gone
    dist.destroy_process_group()
    gc.collect()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic operations where torch has them; a warning names those that are not."""
    # not use_deterministic_algorithms: it imports torch's compiler
    former = torch.get_deterministic_debug_mode()
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    # a pass over every new tensor, for programs that read what they have not written
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(former)
        deterministic.fill_uninitialized_memory = filled


def first_does(work: Callable[[], object]) -> None:
    """Rank 0 does it while the others wait; what it could not do is a `RunError` on every rank.

    An `OptionError` stays one.
    """
    box: list[tuple[str | None, str] | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except OptionError as error:
            box[0] = error.name, error.text
        except (ValueError, RuntimeError, OSError) as error:
            box[0] = None, str(error)
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        name, text = box[0]
        raise RunError(text) if name is None else OptionError(name, text)


class FirstLock:
    """Rank 0's hold of the run's folder."""

    def __init__(self) -> None:
        self.lock: Lock | None = None

    def check(self) -> None:
        """RunError on every rank where the folder was removed."""
        first_does(lambda: self.lock and self.lock.check())


@contextlib.contextmanager
def first_locked(folder: Path) -> Iterator[FirstLock]:
    """One run a folder: rank 0's lock; a restart waits until the former process is gone."""
    with contextlib.ExitStack() as held:
        mine = FirstLock()

        def take() -> None:
            mine.lock = held.enter_context(locked(folder, seconds=LOCK_SECONDS))

        first_does(take)
        yield mine


def highest(*values: int, device: torch.device) -> list[int]:
    """Each value's maximum over the ranks, by one small message."""
    told = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.tolist()

"""Several processes on one machine, for tests of what runs over `torch.distributed`."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

# imported once for all processes: what the trainer and DDP import takes seconds
PRELOAD = ["torch._dynamo", "fused_losses.train.large.loop", "pytest"]


def _rank(
    rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        found = {"value": function(rank, *arguments)}
    except BaseException:
        found = {"error": traceback.format_exc()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    if "error" not in found:
        dist.barrier()
    dist.destroy_process_group()


def run(world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list:
    """What function(rank, *arguments) gave on each rank of a gloo group of `world` processes.

    function: of a test module's top level. A failure raises with the traceback of its rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        # forks of one clean process that has the imports: a fresh interpreter takes seconds, and a
        # fork of this one would take its threads' locks along
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, function, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        found: list[Any] = [None] * world
        try:
            for rank, process in enumerate(processes):
                process.join(seconds)
                path = Path(folder) / f"{rank}.pt"
                found[rank] = torch.load(path, weights_only=False) if path.exists() else None
                if found[rank] is not None and "error" in found[rank]:
                    raise AssertionError(f"rank {rank} of {world}:\n{found[rank]['error']}")
                assert found[rank] is not None, f"rank {rank} of {world} ended without a result"
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [each["value"] for each in found]

"""The suite `busy`: ours and eager beside other processes that want the cores.

`fused-losses bench --suite busy` measures each loss alone, beside two processes that only compute,
and beside a `DataLoader` whose two workers decode pictures; in turn, several times over, for a
machine drifts. It ends in one table: how much slower than alone each is, in the median and in the
slowest twentieth of its steps.
"""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fused_losses.bench import measure
from fused_losses.bench.measure import Result
from fused_losses.bench.micro.cases import Case
from fused_losses.datasets.decoding import decode_picture

SHAPE = (1024, 128)
LOSSES = ("info_nce", "batch_hard_triplet")
RIVAL = "eager"
PASSES = 3  # of all loads in turn
SETTLES = 0.5  # seconds until a load has begun
WORKERS = 2
SIDE, TAKEN, BATCH = 256, 112, 32  # of the pictures, and of what is made of them
COMPUTES = "n = 0\nwhile True: n += 1"


class DecodedPictures(IterableDataset[Tensor]):
    """One picture without end, decoded again each time: [3, TAKEN, TAKEN] uint8."""

    def __init__(self) -> None:
        from PIL import Image

        noise = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8)
        file = io.BytesIO()
        Image.fromarray(noise.numpy()).save(file, "JPEG")
        self.encoded = file.getvalue()

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield decode_picture(self.encoded, (TAKEN, TAKEN), 3, "bench")


@contextmanager
def computing() -> Iterator[None]:
    """Two processes that keep a core each busy."""
    with ExitStack() as stack:
        for _ in range(WORKERS):
            process = subprocess.Popen([sys.executable, "-c", COMPUTES])
            stack.callback(process.wait)
            stack.callback(process.kill)
        time.sleep(SETTLES)
        yield


@contextmanager
def loading() -> Iterator[None]:
    """A loader's two workers, whose batches a thread takes as fast as they come."""
    loader = DataLoader(DecodedPictures(), batch_size=BATCH, num_workers=WORKERS)
    batches = iter(loader)
    next(batches)
    over = threading.Event()

    def take() -> None:
        while not over.is_set():
            next(batches)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


LOADS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "alone": nullcontext,
    "2 computing": computing,
    "2 decoding": loading,
}


def chosen(case: Case) -> Case:
    """The case with our float32 form and eager alone."""
    names = (*case.ours[:1], RIVAL)
    return replace(case, providers={n: case.providers[n] for n in names}, ours=case.ours[:1])


def measured(case: Case, rounds: int, say: Callable[[str], None]) -> dict[str, list[Result]]:
    """Of each load every provider's times, over all passes."""
    found: dict[str, list[Result]] = {}
    for turn in range(PASSES):
        for load, beside in LOADS.items():
            say(f"{load}, pass {turn + 1} of {PASSES}")
            with beside():
                now = measure.paired(case, rounds)
            before = found.setdefault(load, now)
            for kept, result in zip(before, now, strict=True):
                kept.error = kept.error or result.error
                if kept is not result:
                    kept.times_ms += result.times_ms
    return found


def late_ms(result: Result) -> float:
    """What nineteen of twenty steps stay below."""
    if not result.times_ms:
        return float("nan")
    times = torch.tensor(result.times_ms, dtype=torch.float64)
    return float(times.quantile(0.95))


def table(title: str, found: dict[str, list[Result]]) -> list[str]:
    """Markdown: a row a provider and load; the ratios are to the median of the same one alone."""
    lines = [
        f"## {title}",
        "",
        "| | beside | median ms | 95th percentile ms | median / alone | 95th / median alone |",
        "|---|---|---|---|---|---|",
    ]
    for load, results in found.items():
        for result, alone in zip(results, found["alone"], strict=True):
            if result.error:
                lines.append(f"| {result.name} | {load} | {result.error} | | | |")
                continue
            late = late_ms(result)
            lines.append(
                f"| {result.name} | {load} | {result.median_ms:.2f} | {late:.2f} |"
                f" {result.median_ms / alone.median_ms:.2f}x | {late / alone.median_ms:.2f}x |"
            )
    return [*lines, ""]

"""A peer's losses beside themselves accelerated: CPU time on one thread, in turn, and memory.

    python benchmarks/integrations.py [LOSS ...] [--peer NAME] [--sizes 64 256 4096] [--seconds 2]

A table a size: medians of a step forward and backward, the ratio's median over the pairs, and what
the process held at most beyond what it held before the step. A step that asks for more than 6 GiB
at once is told as such.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_losses import integrations

PEERS = ("pytorch_metric_learning", "sentence_transformers")
ROOM = 6 << 30
D, ALIKE = 128, 4  # columns, rows a class
OPTIONS = {"RankedListLoss": dict(margin=0.4, Tn=10)}


def status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def most_held(step: Callable[[], None]) -> int:
    """Bytes beyond those held before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step()
    return max(status("VmHWM") - before, 0)


def timed(step: Callable[[], None]) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin


def built(name: str, classes: int) -> Any:
    losses = importlib.import_module(f"{PEERS[0]}.losses")
    kind = getattr(losses, name)
    options = OPTIONS.get(name, {})
    try:
        return kind(**options)
    except (TypeError, KeyError):
        return kind(num_classes=classes, embedding_size=D, **options)


def of_labels(name: str, n: int) -> Callable[[], None]:
    """A step of a loss of pytorch-metric-learning."""
    x = torch.randn(n, D)
    labels = torch.arange(n) // ALIKE
    x = (x + 2 * torch.randn(n // ALIKE, D)[labels]).requires_grad_()
    loss = built(name, n // ALIKE)

    def step() -> None:
        x.grad = None
        loss(x, labels).backward()

    return step


class Model(nn.Module):
    """What a loss of sentence-transformers asks a model for; its rows are in the features."""

    max_seq_length = 8

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        tokenizers = importlib.import_module("tokenizers")
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        fast = importlib.import_module("transformers").PreTrainedTokenizerFast
        self.tokenizer = fast(tokenizer_object=words)

    def __getitem__(self, _: int) -> None:
        """A first module."""

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.name]}


def of_columns(name: str, n: int) -> Callable[[], None]:
    """A step of a loss of sentence-transformers on two columns, in its own mini-batches."""
    losses = importlib.import_module(f"{PEERS[1]}.sentence_transformer.losses")
    guide = dict(guide=Model("guide")) if "GIST" in name else {}
    loss = getattr(losses, name)(Model("rows"), **guide)
    x = torch.randn(n, D)
    columns = [(x + 0.7 * torch.randn(n, D)).requires_grad_() for _ in range(2)]
    guides = [x + 0.7 * torch.randn(n, D) for _ in range(2)]

    def step() -> None:
        for rows in columns:
            rows.grad = None
        if hasattr(loss, "calculate_loss"):
            size = loss.mini_batch_size
            parts = [[p.detach().requires_grad_() for p in rows.split(size)] for rows in columns]
            further = [[list(rows.split(size)) for rows in guides]] if guide else []
            loss.calculate_loss(parts, *further, with_backward=True)
        elif guide:
            told = zip(columns, guides, strict=True)
            loss([dict(rows=rows, guide=g) for rows, g in told], None).backward()
        else:
            loss.compute_loss_from_embeddings(columns, None).backward()

    return step


STEPS = dict(zip(PEERS, (of_labels, of_columns), strict=True))
COLUMNS = (
    "MultipleNegativesRankingLoss",
    "CachedMultipleNegativesRankingLoss",
    "MegaBatchMarginLoss",
    "GISTEmbedLoss",
    "CachedGISTEmbedLoss",
)


def measured(peer: str, name: str, n: int, seconds: float) -> str:
    step = STEPS[peer](name, n)
    with integrations.accelerate(peer, strict=True):
        step()
        ours_held = most_held(step)
    try:
        step()
        held = most_held(step)
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "alloc" not in str(error):
            raise
        with integrations.accelerate(peer):
            ours = statistics.median(timed(step) for _ in range(3))
        return f"| {name} | {n} | {1e3 * ours:.2f} | no room | | {ours_held / 2**20:.0f} | |"
    ours, theirs = [], []
    end = time.process_time() + seconds
    while not ours or time.process_time() < end:
        with integrations.accelerate(peer):
            ours.append(timed(step))
        theirs.append(timed(step))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    told = [1e3 * statistics.median(times) for times in (ours, theirs)]
    memory = [f"{at / 2**20:.0f}" for at in (ours_held, held)]
    return f"| {name} | {n} | {told[0]:.2f} | {told[1]:.2f} | {ratio:.1f} | {' | '.join(memory)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("losses", nargs="*")
    parser.add_argument("--peer", choices=PEERS, default=PEERS[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 4096])
    parser.add_argument("--seconds", type=float, default=2.0, help="of CPU a row, 2 by default")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| loss | N | ours, ms | peer, ms | times | ours, MiB | peer, MiB |")
    print("|---|---|---|---|---|---|---|")
    # a step that does not fit shall raise, and not be killed
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ROOM, hard))
    table = integrations.table(PEERS[0]).rows
    every = [row.name for row in table if row.method == "compute_loss"]
    for name in given.losses or (every if given.peer == PEERS[0] else COLUMNS):
        for n in given.sizes:
            print(measured(given.peer, name, n, given.seconds), flush=True)


if __name__ == "__main__":
    main()

"""One training: pictures, network and head, a checkpoint now and then, and what came of it."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fused_losses.datasets.glyphs import Split
from fused_losses.datasets.sampler import EpochBatches
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.seeds import seed_from
from fused_losses.train.frame.steps import Training, numbers
from fused_losses.train.glyphs.config import GlyphConfig
from fused_losses.train.glyphs.evaluation import embed, evaluate
from fused_losses.train.glyphs.heads import imprint, make_head
from fused_losses.train.glyphs.model import Changes, GlyphNet, change, normalize

WARM_UP_CLASSES = 64
MEASURED_BATCHES = 40


class GlyphTraining(Training[GlyphConfig]):
    """The training of one head on a split of the set."""

    def __init__(self, config: GlyphConfig, split: Split, *, name: str = "trained") -> None:
        super().__init__(config, name=name)
        self.split = split
        # equal for every head: they differ in what is compared alone
        torch.manual_seed(seed_from("weights", config.seed))
        self.net = GlyphNet(config.size, config.embedding).to(self.device)
        self.head = make_head(config, split.train.classes)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self._imprint()
        n = len(split.train)
        self.order = EpochBatches(
            n, min(config.batch_size, n), seed=seed_from("order", config.seed), drop_last=True
        )
        assert self.head.optimizer is not None
        self.head_optimizer = self.head.optimizer
        self.peaks = ((self.optimizer, config.lr), (self.head_optimizer, config.head_lr))
        self.head_ms: list[float] = []

    @torch.no_grad()
    def _imprint(self) -> None:
        """Each centre starts as the embedding of a drawing of its class (Qi et al., CVPR 2018).

        From random centres most of the steps go by until a class was seen often enough to count;
        rows of norm 1 besides: what a step turns a row by depends on its length.
        """
        train = self.split.train
        rows = train.one_a_class()
        generator = torch.Generator().manual_seed(seed_from("imprint", self.config.seed))
        some = rows[torch.randperm(len(rows), generator=generator)]
        # what BatchNorm divides by at evaluation is known from its first batches only
        for part in some.split(self.config.batch_size)[:MEASURED_BATCHES]:
            if len(part) == 1:
                continue  # has no variance
            self.net(normalize(train.read(part).to(self.device)))
        imprint(self.head, embed(self.net, train, rows))

    def update(self, step: int) -> float:
        rows = self.order.batch(step)
        generator = torch.Generator().manual_seed(seed_from("change", self.config.seed, step))
        pictures = change(self.split.train.read(rows).to(self.device), Changes(), generator)
        embeddings = self.net(pictures)
        gradient, value = self._head_step(embeddings, self.split.train.labels[rows])
        embeddings.backward(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def _head_step(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """(gradient of the embeddings, loss); apart from the network, so that it can be timed."""
        rows = embeddings.detach().requires_grad_()
        start = time.perf_counter()
        loss = self.head(rows, labels.to(self.device))
        loss.backward()
        self.head_optimizer.step()
        value = loss.item()
        self.head_ms.append(1e3 * (time.perf_counter() - start))
        assert rows.grad is not None
        return rows.grad, value

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "config": asdict(self.config),
            "net": self.net.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "head_ms": torch.tensor(self.head_ms, dtype=torch.float64),
        }

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.net.load_state_dict(state["net"])
        self.head.load_state_dict(state["head"])
        checkpoint.load_optimizer(self.optimizer, state["optimizer"])
        self.head_ms = numbers(state, "head_ms")

    def state_bytes(self) -> int:
        # a state of millions of numbers a step would be most of the work: by the clock
        return checkpoint.SMALL_STATE + 1

    def result(self) -> dict[str, Any]:
        """The figures of a finished training, and its curve."""
        self.head.settle()
        return {
            **self.recall(),
            "step_ms": round(statistics.median(self.step_ms), 3),
            "head_ms": round(statistics.median(self.head_ms), 3),
            "peak_memory_mib": round(self.peak_mib, 1),
            "classes": self.split.train.classes,
            "losses": [round(loss, 6) for loss in self.losses],
        }

    def recall(self) -> dict[str, float]:
        """The network and the table as they are now, judged by the held-out fonts."""
        config, centres = self.config, self.head.weight.detach()
        found = evaluate(self.net, self.split, centres, queries=config.queries, seed=config.seed)
        return found.figures()


def some_classes(split: Split, classes: int, seed: int) -> Split:
    """The split with this many classes, drawn at random; 0: all."""
    have = split.train.classes
    if classes > have:
        raise ValueError(f"classes: expected at most {have}, got {classes}")
    if classes in (0, have):
        return split
    generator = torch.Generator().manual_seed(seed_from("classes", seed))
    # those with a query first: without one a class is never judged
    judged = torch.zeros(have, dtype=torch.bool)
    judged[split.held_out.labels] = True
    order = torch.randperm(have, generator=generator)
    order = torch.cat([order[judged[order]], order[~judged[order]]])
    chosen = order[:classes].sort().values
    return split._replace(
        train=split.train.of_classes(chosen), held_out=split.held_out.of_classes(chosen)
    )


def warm_up(config: GlyphConfig, split: Split) -> None:
    """One thrown-away step: what libraries allocate once must not count for whoever is first."""
    few = some_classes(split, min(WARM_UP_CLASSES, split.train.classes), config.seed)
    GlyphTraining(config, few).step()

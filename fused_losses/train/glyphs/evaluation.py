"""Recall of held-out fonts: is the nearest drawing by a training font the same character?"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_losses import metrics
from fused_losses.datasets.glyphs import Glyphs, Split
from fused_losses.train.frame.seeds import seed_from
from fused_losses.train.glyphs.model import normalize


class Recall(NamedTuple):
    """Shares of the queries, one a class that the held-out fonts draw."""

    recall_at_1: float
    recall_at_5: float
    recall_at_1_of_centres: float  # the gallery is the head's table
    queries: int
    gallery: int

    def figures(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in self._asdict().items()}


@torch.no_grad()
def embed(net: nn.Module, glyphs: Glyphs, rows: Tensor, *, batch: int = 1024) -> Tensor:
    """Unit embeddings of the drawings `rows` [n]. [n, D] float32, on the network's device"""
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    parts = [
        F.normalize(net(normalize(glyphs.read(some).to(device))).float())
        for some in rows.split(batch)
    ]
    net.train(was_training)
    return torch.cat(parts)


@torch.no_grad()
def evaluate(net: nn.Module, split: Split, centres: Tensor, *, queries: int, seed: int) -> Recall:
    """Queries: one drawing a class by a held-out font. Gallery: one a class by a training font.

    centres: [C, D] the head's table, the gallery of `recall_at_1_of_centres`. queries: classes
    that are asked for, drawn by the seed; 0: all. Time O(queries C D).
    """
    asked, shown = split.held_out.one_a_class(), split.train.one_a_class()
    generator = torch.Generator().manual_seed(seed_from("queries", seed))
    asked = asked[torch.randperm(len(asked), generator=generator)[: queries or len(asked)]]
    x, gallery = embed(net, split.held_out, asked), embed(net, split.train, shown)
    labels = split.held_out.labels[asked].to(x.device)
    found = metrics.recall_at_k(
        x,
        labels,
        gallery,
        split.train.labels[shown].to(x.device),
        k=[1, 5],
        metric="dot",
    )
    own = metrics.recall_at_k(
        x,
        labels,
        F.normalize(centres.float()),
        torch.arange(len(centres), device=x.device),
        metric="dot",
    )
    assert isinstance(found.value, dict) and isinstance(own.value, float)
    return Recall(found.value[1], found.value[5], own.value, len(asked), len(shown))

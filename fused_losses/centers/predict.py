"""What a head knows of a batch beside its loss: the best classes, and the scores of chosen ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype, no_autocast, unit_rows
from fused_losses.base.validation import check_class_ids, check_index_vector
from fused_losses.centers.batch import GlobalBatch, device_of, gather_batch
from fused_losses.centers.shard import Shard
from fused_losses.functions.class_values import ClassLoss
from fused_losses.primitives.class_rules.rules import pool

if TYPE_CHECKING:
    from fused_losses.centers.head import ClassCenters

BLOCK_BYTES = 32 << 20  # of scores that are alive at once


class TopClasses(NamedTuple):
    """Of each row the best classes, best first."""

    scores: Tensor  # [n, k]
    classes: Tensor  # [n, k] int64


class Questions(NamedTuple):
    """All ranks' rows as the shards multiply them, and what belongs to whom."""

    batch: GlobalBatch
    x: Tensor  # [B, D]
    shard: Shard
    count: int  # rows of this rank

    @property
    def own(self) -> slice:
        """This rank's rows."""
        return slice(self.batch.first, self.batch.first + self.count)


@torch.no_grad()
def top_classes(head: ClassCenters, embeddings: Tensor, k: int = 1) -> TopClasses:
    """The k classes of the highest scores for each of this rank's rows, over all shards.

        score of class j: cosine of x and w_j, the best (or the pooled) one of its centres

    without margin and scale; with a bias <x, w_j> + b_j / scale. embeddings [n, D]; 1 <= k <= C.
    Scores are in the table's accumulation dtype, detached. Among equal scores any may come first.
    Rows that are behind catch up; nothing else of the head changes.
    Every rank must call it, with one k; batches may differ in size and be empty. ValueError,
    TypeError: bad arguments. Time O(B C D / W) a rank; memory O(B (D + k W)) and a block of scores.
    """
    if not 1 <= k <= head.num_classes:
        raise ValueError(f"k: expected a count in [1, {head.num_classes}], got {k}")
    with no_autocast(device_of(embeddings, head._table)):
        asked = questions(head, embeddings)
        scores, classes = _best_here(head, asked, k)
        ranks = head.ranks
        # [W, B, k] -> [B, W k]
        scores, classes = (
            ranks.all_gather(t).transpose(0, 1).flatten(1) for t in (scores, classes)
        )
        best, at = scores[asked.own].topk(k, dim=1)
        return TopClasses(best, classes[asked.own].gather(1, at))


@torch.no_grad()
def class_scores(head: ClassCenters, embeddings: Tensor, classes: Tensor) -> Tensor:
    """Scores of this rank's rows with some classes, as in `top_classes`. [n, K]

    Logits are these times the scale. embeddings [n, D]; classes [K] int64 ids in [0, C), alike on
    every rank. Raises as `top_classes`, IndexError for ids out of range. Communication O(B K).
    """
    check_index_vector("classes", classes, None, embeddings)
    check_class_ids("classes", classes, head.num_classes)
    with no_autocast(device_of(embeddings, head._table)):
        asked = questions(head, embeddings)
        found = asked.x.new_zeros(len(asked.x), len(classes))
        local = classes.long() - head.class_start
        mine = ((local >= 0) & (local < head.num_local)).nonzero()[:, 0]
        height = asked.shard.height
        for at in mine.split(height):
            found[:, at] = scores_of(head, asked.x, asked.shard.taken(local[at]))
        head.ranks.sum_(found)
        return found[asked.own]


def questions(head: ClassCenters, embeddings: Tensor, labels: Tensor | None = None) -> Questions:
    """The ranks meet; every row has caught up. labels [n] or [n, L]; None: there are none."""
    if labels is None and isinstance(embeddings, Tensor):
        labels = embeddings.new_full(embeddings.shape[:1], head.ignore_index, dtype=torch.int64)
    batch, arriving = gather_batch(
        head.ranks,
        embeddings,
        labels,  # pyright: ignore[reportArgumentType] it says itself what is wrong with None
        head.weight,
        class_start=head.class_start,
        num_classes=head.num_classes,
        embedding_dim=head.embedding_dim,
        ignore_index=head.ignore_index,
    )
    head.settle()
    x = arriving.wait().to(accumulate_dtype(head.weight.dtype))
    x = head.multiplied(x)
    shard = Shard(head.weight.detach(), batch.local, x.device, head.chunk_bytes)
    return Questions(batch, x, shard, len(embeddings))


def scores_of(head: ClassCenters, x: Tensor, weight: Tensor) -> Tensor:
    """Rows [B, D] with classes [c, D] or [c, K, D]. [B, c]"""
    softness = head.margin.softness if isinstance(head.margin, ClassLoss) else 0.0
    return pool(center_scores(head, x, weight), softness)


def center_scores(head: ClassCenters, x: Tensor, weight: Tensor) -> Tensor:
    """Rows [B, D] with every centre of classes [c, D] or [c, K, D]. [B, c, K]"""
    rows = units(head, weight.to(x))
    centers = 1 if weight.dim() == 2 else weight.shape[1]
    return (x @ rows.flatten(0, -2).T).view(len(x), len(weight), centers)


def units(head: ClassCenters, weight: Tensor) -> Tensor:
    """Rows of the table as they are multiplied."""
    return unit_rows(weight) if head.normalize else weight


def _best_here(head: ClassCenters, asked: Questions, k: int) -> tuple[Tensor, Tensor]:
    """The k best of this shard, [B, k] each; -inf and class 0 where it has fewer."""
    x, shard = asked.x, asked.shard
    scores = x.new_full((len(x), k), -torch.inf)
    classes = torch.zeros((len(x), k), dtype=torch.int64, device=x.device)
    for rows, first, found in _blocks(head, x, shard):
        best, at = found.topk(min(k, found.shape[1]), dim=1)
        best = torch.cat([scores[rows], best], dim=1)
        ids = torch.cat([classes[rows], at + (head.class_start + first)], dim=1)
        scores[rows], at = best.topk(k, dim=1)
        classes[rows] = ids.gather(1, at)
    return scores, classes


def _blocks(head: ClassCenters, x: Tensor, shard: Shard) -> Iterator[tuple[slice, int, Tensor]]:
    """Some rows, the first of some classes, their scores; each chunk of the table moves once."""
    for first in range(0, len(shard.weight), shard.height):
        part = shard.weight[first : first + shard.height].to(shard.device)
        height = max(1, BLOCK_BYTES // (part[..., 0].numel() * x.element_size()))
        for start in range(0, len(x), height):
            rows = slice(start, start + height)
            yield rows, first, scores_of(head, x[rows], part)

"""What every loss over a head's table goes through: who is there, what takes part, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fused_losses.centers.batch import GlobalBatch, gather_batch
from fused_losses.centers.collectives import Gathered
from fused_losses.centers.sampling import groups
from fused_losses.centers.shard import ClassGroup, ShardChunks
from fused_losses.centers.step import SavedForward, Sharded
from fused_losses.centers.stepped_table import SteppedTable
from fused_losses.centers.update import RowUpdates


class SweptTable(SteppedTable):
    """A table that a loss sweeps over, whatever the loss."""

    seed: int
    ignore_index: int
    log_q: bool
    gradient_scale: str
    chunk_bytes: int
    precision: str
    backend: str | None

    def _groups(self, local: Tensor) -> list[ClassGroup]:
        """The rows of this shard that take part."""
        if not self.training or self.sample_rate == 1:
            return [ClassGroup(None)]
        return groups(
            local,
            self.class_start,
            self.num_local,
            self.sample_rate,
            log_q=self.log_q,
            seed=self.seed,
            step=self.step_count,
        )

    def _counted(self, taking_part: list[ClassGroup]) -> int:
        """Classes that a loss is a mean over: all, or without log_q those of the sample."""
        drawn = [len(ids) for ids, _ in taking_part if ids is not None]
        if not drawn or self.log_q:
            return self.num_classes
        count = torch.tensor(sum(drawn), device=self._table.device)
        self.ranks.sum_(count)
        return int(count)

    def _met(
        self,
        embeddings: Tensor,
        labels: Tensor,
        row_weight: Tensor | None,
        further: Callable[[], int] | None = None,
    ) -> tuple[GlobalBatch, Gathered]:
        """`gather_batch` for this table."""
        batch, arriving = gather_batch(
            self.ranks, embeddings, labels, self._table, class_start=self.class_start,
            num_classes=self.num_classes, embedding_dim=self.embedding_dim,
            ignore_index=self.ignore_index, row_weight=row_weight, further=further,
        )  # fmt: skip
        learns = isinstance(self.scale, Tensor) and self.scale.requires_grad
        if learns and torch.is_grad_enabled():
            batch = batch._replace(need_x=True)  # its gradient is made of theirs
        return batch, arriving

    def _saved(
        self,
        batch: GlobalBatch,
        x: Tensor,
        statistics: Tensor,
        values: Tensor | None,
        negatives: Tensor | None,
        sweep: ShardChunks[Any],
    ) -> SavedForward:
        leaf = self._leaf
        return SavedForward(
            self._updates.generation, batch, x, statistics, values, negatives, sweep,
            need_weight=leaf.requires_grad,
            normalize=self.normalize,
            dx_scale=self.ranks.world if self.gradient_scale == "ddp_mean" else 1,
            trains=self.training and torch.is_grad_enabled() and leaf.requires_grad,
            leaf=get_gradient_edge(leaf).node if leaf.requires_grad else None,
            incoming=[],
        )  # fmt: skip

    def _apart(
        self, embeddings: Tensor, saved: SavedForward, targets: Tensor, rows: Tensor
    ) -> tuple[Tensor, ...]:
        """Statistics, targets, norms and rows, whose gradients come back to the shards."""
        if saved.batch.need_x and not embeddings.requires_grad:
            embeddings = embeddings.detach().requires_grad_()  # every rank has a backward
        learned = self.scale if isinstance(self.scale, Tensor) else None
        return Sharded.apply(
            embeddings, self._leaf, self._updates.backward, saved, targets, rows, learned
        )

    def _mean(self, each: Tensor, saved: SavedForward) -> Tensor:
        """Of a loss a row [B], whose incoming gradient a step will ask for."""
        total = saved.batch.mean(each).to(saved.x.dtype)
        if saved.trains and isinstance(self._updates, RowUpdates):
            total.register_hook(saved.incoming.append)
        return total

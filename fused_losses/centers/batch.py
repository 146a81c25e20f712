"""The batch of all ranks: checked at each one's door, then gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.class_labels import check_positions, class_labels
from fused_losses.base.numerics import reduced, row_dtype
from fused_losses.base.parameters import check_row_weight
from fused_losses.base.validation import NO_TARGET, describe
from fused_losses.centers.arguments import check_width
from fused_losses.centers.collectives import DTYPES, Gathered, Ranks, exchange_shapes


class GlobalBatch(NamedTuple):
    """The rows of all ranks."""

    counts: list[int]  # of each rank
    first: int  # where this rank's begin
    need_x: bool  # any rank's embeddings need a gradient
    labels: Tensor  # [B, L] class ids, NO_TARGET: nothing there
    local: Tensor  # [B, L] rows of this shard, NO_TARGET: nothing there, or elsewhere
    weights: Tensor | None  # [B] what each row counts for in the mean; None: 1

    @property
    def present(self) -> Tensor:
        return self.labels != NO_TARGET

    @property
    def valid(self) -> Tensor:
        """[B] rows with a label."""
        return self.present.any(dim=1)

    def mean(self, each: Tensor) -> Tensor:
        """Of the rows with a label, by their weights; 0 of none. [B] -> []"""
        return reduced(each, self.valid, "mean", each.dtype, self.weights)


def device_of(embeddings: Tensor, table: Tensor) -> torch.device:
    """Where the rows are; where the table is, of what is no tensor (`gather_batch` refuses it)."""
    return embeddings.device if isinstance(embeddings, Tensor) else table.device


def gather_batch(
    ranks: Ranks,
    embeddings: Tensor,  # [n, D] of this rank
    labels: Tensor,  # [n] or [n, L]
    table: Tensor,  # the shard's rows, of which the first is class_start
    *,
    class_start: int,
    num_classes: int,
    embedding_dim: int,
    ignore_index: int,
    row_weight: Tensor | None = None,  # [n]
    further: Callable[[], int] | None = None,
) -> tuple[GlobalBatch, Gathered]:
    """The ranks meet; the labels of all, and their embeddings on the way.

    further: checks more of this rank's arguments, and gives a number of what must be alike on all.
    Raises this rank's ValueError, TypeError or IndexError, on the others a RuntimeError.
    """
    refusal: Exception | None = None
    asked = 0
    said: tuple[int, int, int, int] = (0, 0, 0, 0)
    try:
        own = _checked_labels(embeddings, labels, table, num_classes, embedding_dim, ignore_index)
        n, d = embeddings.shape
        said = (n, d, own.shape[1], DTYPES.index(embeddings.dtype))
        check_row_weight(row_weight, n, embeddings)
        asked = 0 if further is None else further()
    except (ValueError, TypeError, IndexError) as error:
        refusal = error
    needs = refusal is None and torch.is_grad_enabled() and embeddings.requires_grad
    weighted, device = row_weight is not None, device_of(embeddings, table)
    shapes = exchange_shapes(ranks, refusal is not None, *said, needs, weighted, device, asked)
    if refusal is not None:
        raise refusal
    counts = shapes.rows
    everyones = Gathered(ranks, own, counts).wait()
    place = everyones - class_start
    local = torch.where((place >= 0) & (place < table.shape[0]), place, NO_TARGET)
    first = sum(counts[: ranks.rank])
    weights = None
    if row_weight is not None:
        weights = Gathered(ranks, row_weight.to(row_dtype(row_weight.device)), counts).wait()
    batch = GlobalBatch(counts, first, shapes.needs_gradient, everyones, local, weights)
    return batch, Gathered(ranks, embeddings.detach(), counts)


def _checked_labels(
    embeddings: Tensor,
    labels: Tensor,
    table: Tensor,
    num_classes: int,
    embedding_dim: int,
    ignore_index: int,
) -> Tensor:
    """The labels [n, L] of this rank's rows, NO_TARGET where there is none."""
    check_positions(embeddings, labels)
    validation.check_matrix("embeddings", embeddings, "[n, D]")
    if embeddings.layout != torch.strided:
        raise TypeError(f"embeddings: expected dense rows, got {embeddings.layout}")
    check_width(embeddings, num_classes, embedding_dim)
    if (embeddings.dtype == torch.float64) != (table.dtype == torch.float64):
        raise TypeError(
            f"embeddings: expected float64 where the table is, and only there: it is "
            f"{table.dtype}, got {describe(embeddings)}"
        )
    return class_labels(labels, embeddings, num_classes, ignore_index)

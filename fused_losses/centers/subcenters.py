"""Cleaning by sub-centres: which centre of a class is the main one, and which rows belong to none.

Sub-centre ArcFace (Deng et al., 2020): after training with K centres a class, each class keeps the
centre that is nearest to most of its samples; samples far from it are taken for noise; training
goes on with one centre.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_losses.base.numerics import no_autocast
from fused_losses.base.validation import NO_TARGET
from fused_losses.centers.collectives import local_rows
from fused_losses.centers.predict import Questions, questions, units
from fused_losses.centers.resize import carry_tables, is_table

if TYPE_CHECKING:
    from fused_losses.centers.head import ClassCenters

NOISE_DEGREES = 75.0  # the paper's


class SubCenters:
    """Counts over batches which centre of its class each sample is nearest to.

        centers = SubCenters(head)
        for images, labels in loader:  # every rank its own batches, as many batches on each
            centers.add(backbone(images), labels)
        for images, labels in loader:
            noisy = centers.noisy(backbone(images), labels)
        centers.carry_over(ClassCenters(num_classes, dim, ...))  # with one centre a class

    head: with sub_centers > 1 and normalize=True (ValueError). It is read, and does not change.
    """

    def __init__(self, head: ClassCenters) -> None:
        if head.sub_centers == 1 or not head.normalize:
            raise ValueError(
                f"head: expected sub_centers > 1 and normalize=True, got {head.sub_centers} and "
                f"{head.normalize}"
            )
        self.head = head
        shape = (head.num_local, head.sub_centers)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=head.weight.device)

    @property
    def main(self) -> Tensor:
        """The centre with the most samples, of this rank's classes; of equal ones the first. [c]"""
        return self.counts.argmax(dim=1)

    @torch.no_grad()
    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Count this rank's rows, [n, D] and [n] or [n, L]; every rank must call it.

        Raises as the head's forward. Time O(B L K D).
        """
        with no_autocast(embeddings.device):
            asked = questions(self.head, embeddings, labels)
            row, label = _here(asked)
            nearest = self._cosines(asked, row, label).argmax(dim=1).to(self.counts.device)
            one = torch.ones_like(nearest)
            self.counts.index_put_((label.to(nearest), nearest), one, accumulate=True)

    @torch.no_grad()
    def noisy(self, embeddings: Tensor, labels: Tensor, degrees: float = NOISE_DEGREES) -> Tensor:
        """Of this rank's rows: farther than this angle from the main centre of its class. [n] bool

        Of several labels: from that of any of them. A row without a label is not noisy.
        """
        if not 0 < degrees < 180:
            raise ValueError(f"degrees: expected an angle in (0, 180), got {degrees}")
        with no_autocast(embeddings.device):
            asked = questions(self.head, embeddings, labels)
            row, label = _here(asked)
            main = self.main.to(label.device)[label]
            cosine = self._cosines(asked, row, label).gather(1, main[:, None])[:, 0]
            far = torch.zeros(len(asked.x), dtype=torch.float64, device=asked.x.device)
            far.index_add_(0, row, (cosine < math.cos(math.radians(degrees))).to(far))
            self.head.ranks.sum_(far)
            return far[asked.own] > 0

    def main_rows(self) -> Tensor:
        """The main centres of this rank's classes. [c, D]"""
        self.head.settle()
        return self._main_of(self.head.weight.detach())

    def carry_over(self, new: ClassCenters) -> None:
        """Go on in a head with one centre a class: the main ones, with their optimiser's states.

        As `carry_over` of heads in all else: new may have more classes or fewer.
        """
        tables = {name: local_rows(t) for name, t in self.head.state().items()}
        carry_tables(
            self.head,
            {name: self._main_of(t) if is_table(name) else t for name, t in tables.items()},
            new,
        )

    def _main_of(self, table: Tensor) -> Tensor:
        at = self.main.to(table.device)
        return table[torch.arange(len(at), device=table.device), at]

    def _cosines(self, asked: Questions, row: Tensor, label: Tensor) -> Tensor:
        """Of rows with the centres of classes that live here, pair by pair. [P, K]"""
        found = asked.x.new_zeros(len(row), self.head.sub_centers)
        if len(row) == 0:
            return found
        ids, at = label.unique(return_inverse=True)
        weight = asked.shard.taken(ids)
        for part in torch.arange(len(row), device=row.device).split(asked.shard.height):
            centers = units(self.head, weight[at[part]].to(found))
            found[part] = (asked.x[row[part], None] * centers).sum(dim=2)
        return found


def _here(asked: Questions) -> tuple[Tensor, Tensor]:
    """The pairs of a row and a label that lives in this shard: rows of batch and shard."""
    row, at = (asked.batch.local != NO_TARGET).nonzero(as_tuple=True)
    return row, asked.batch.local[row, at]

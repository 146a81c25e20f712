"""The fixed classifier of a regular simplex: C directions in C - 1 dimensions, none stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fused_losses.base import validation
from fused_losses.base.class_labels import one_label
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced, unit_rows
from fused_losses.base.parameters import check_above, check_margin
from fused_losses.base.validation import NO_TARGET
from fused_losses.centers import arguments
from fused_losses.functions.margin_calls import apply_margin, penalty_of
from fused_losses.margins import Margin

WIDE = torch.float64
BLOCK_BYTES = 4 << 20  # of scores that are alive at once


class Simplex(NamedTuple):
    """dim + 1 unit vectors of pairwise cosine -1 / dim, the first `count` of which take part.

        v_c = (e_c - m 1) / r  (c < dim),    v_dim = -1 / sqrt(dim)

    what e_1, ..., e_dim and one more point on their axis become, centred and normalised.
    """

    dim: int
    count: int

    @property
    def shift(self) -> float:
        """m"""
        return (1 + (1 - math.sqrt(1 + self.dim)) / self.dim) / (self.dim + 1)

    @property
    def length(self) -> float:
        """r"""
        m = self.shift
        return math.hypot(1 - m, m * math.sqrt(self.dim - 1))

    @property
    def plain(self) -> int:
        """How many of those that take part have a coordinate of their own."""
        return min(self.count, self.dim)

    def products(self, x: Tensor) -> Tensor:
        """<x, v_c>. [N, dim] -> [N, count], time and memory O(N dim)."""
        total = x.sum(dim=1, keepdim=True, dtype=WIDE)
        found = ((x[:, : self.plain] - self.shift * total) / self.length).to(x.dtype)
        if self.count == self.plain:
            return found
        return torch.cat([found, (-total / math.sqrt(self.dim)).to(x.dtype)], dim=1)

    def chosen(self, x: Tensor, ids: Tensor) -> Tensor:
        """<x_i, v_c> of one c a row, in float64. [N, dim], [N] -> [N]"""
        total = x.sum(dim=1, dtype=WIDE)
        own = x.gather(1, ids.clamp(max=self.dim - 1)[:, None])[:, 0].to(WIDE)
        plain = (own - self.shift * total) / self.length
        return torch.where(ids == self.dim, -total / math.sqrt(self.dim), plain)

    def back(self, grad: Tensor) -> Tensor:
        """sum_c g_c v_c. [N, count] -> [N, dim]"""
        part = grad[:, : self.plain]
        moved = -self.shift / self.length * part.sum(dim=1, keepdim=True, dtype=WIDE)
        if self.count > self.plain:
            moved = moved - grad[:, -1:] / math.sqrt(self.dim)
        out = moved.to(grad.dtype).repeat(1, self.dim)
        out[:, : self.plain] += part / self.length
        return out

    def vectors(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """v_c, [...] -> [..., dim]"""
        out = F.one_hot(ids.clamp(max=self.dim - 1), self.dim).to(WIDE).sub_(self.shift)
        out /= self.length
        return torch.where((ids == self.dim)[..., None], -1 / math.sqrt(self.dim), out).to(dtype)


class SimplexStatistics(torch.autograd.Function):
    """logsumexp over the other vertices, and the target's product, a block of rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, simplex: Simplex) -> tuple[Tensor, Tensor]:
        lse = x.new_empty(len(x), dtype=WIDE)
        for rows in _blocks(x, simplex):
            lse[rows] = torch.logsumexp(_others(x[rows], labels[rows], simplex), dim=1)
        target = torch.where(labels < 0, 0, simplex.chosen(x, labels.clamp_min(0)))
        ctx.save_for_backward(x, labels, lse)
        ctx.simplex = simplex
        return lse, target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_lse: Tensor, d_target: Tensor) -> tuple[Tensor, None, None]:
        x, labels, lse = ctx.saved_tensors
        out = torch.empty_like(x)
        # a row without other vertices has lse = -inf and no gradient to share out
        lse = torch.where(lse == -torch.inf, 0, lse)
        for rows in _blocks(x, ctx.simplex):
            own = labels[rows]
            z = _others(x[rows], own, ctx.simplex)
            grad = z.sub_(lse[rows, None]).exp_().mul_(d_lse[rows, None])
            named = torch.where(own < 0, 0, d_target[rows]).to(grad.dtype)
            grad.scatter_add_(1, own.clamp_min(0)[:, None], named[:, None])
            out[rows] = ctx.simplex.back(grad)
        return out, None, None


def _blocks(x: Tensor, simplex: Simplex) -> Iterator[slice]:
    height = max(1, BLOCK_BYTES // (simplex.count * x.element_size()))
    for first in range(0, len(x), height):
        yield slice(first, first + height)


def _others(x: Tensor, labels: Tensor, simplex: Simplex) -> Tensor:
    """Products with every vertex but the row's own, which is -inf."""
    z, own = simplex.products(x), labels.clamp_min(0)[:, None]
    return z.scatter_(1, own, z.gather(1, own).masked_fill_(labels[:, None] >= 0, -torch.inf))


class DSimplexHead(nn.Module):
    """A classifier of fixed, maximally separated directions, of which no matrix exists.

        z_c = scale <x, v_c>,    <v_a, v_b> = -1 / dim  (a != b),    |v_c| = 1
        loss = -log softmax(z)_y,    z_y = scale margin(<x, v_y>)

    The dim + 1 vertices of a regular simplex: class c has the c-th for good, so that embeddings of
    models trained years apart can be compared. There is nothing to train and nothing to store.

    Args:
        num_classes: C >= 2 that labels may name.
        embedding_dim: D >= C - 1; None: C - 1. Vertices without a class are kept for later ones.
        margin: None or an object of `fused_losses.margins` without bends, of <x, v_y>.
        scale: > 0.
        normalize: rows by their norm; zero rows count as zero.
        preallocated: vertices without a class are in the softmax, as the authors have it, which
            keeps their directions free.
        reduction: "mean" over the rows that are not ignored (0 of none), "sum", "none" [N].

    Time O(N D), forward and backward; memory beyond inputs and gradients O(N D) at scale or
    normalize, and a block. Paper: Biondi et al., "Stationary representations: optimally
    approximating compatibility and implications for improved model replacements", 2024.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int | None = None,
        *,
        margin: Margin | None = None,
        scale: float = 1.0,
        normalize: bool = False,
        preallocated: bool = True,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        (num_classes,) = arguments.counts(num_classes=num_classes)
        (dim,) = arguments.counts(
            embedding_dim=max(num_classes - 1, 1) if embedding_dim is None else embedding_dim
        )
        check_margin(margin)
        if hasattr(margin, "bend"):
            raise ValueError(f"margin: expected one without bends, got {margin}")
        check_above("scale", scale)
        validation.check_choice("reduction", reduction, validation.REDUCTIONS)
        (self.ignore_index,) = arguments.integers(ignore_index=ignore_index)
        self.embedding_dim, self.num_classes = dim, 0
        self.margin, self.scale, self.normalize = margin, float(scale), normalize
        self.preallocated, self.reduction = preallocated, reduction
        self.grow(num_classes)

    @property
    def simplex(self) -> Simplex:
        """The vertices that take part."""
        count = self.embedding_dim + 1 if self.preallocated else self.num_classes
        return Simplex(self.embedding_dim, count)

    def grow(self, num_classes: int) -> None:
        """More classes, up to D + 1: the old ones keep their directions.

        ValueError beyond: the vertices of another simplex are other directions, in all of which the
        old classes' would change.
        """
        (num_classes,) = arguments.counts(num_classes=num_classes)
        if not max(2, self.num_classes) <= num_classes <= self.embedding_dim + 1:
            raise ValueError(
                f"num_classes: expected {max(2, self.num_classes)} to {self.embedding_dim + 1} in "
                f"{self.embedding_dim} dimensions, got {num_classes}; a simplex of more vertices "
                "has other directions for the classes that there are"
            )
        self.num_classes = num_classes

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of [N, D] and labels [N] int64, in the accumulation dtype.

        Raises ValueError, TypeError, IndexError. A NaN row has a NaN loss.
        """
        self._check(embeddings)
        labels = one_label(labels, embeddings, self.num_classes, self.ignore_index)
        valid = labels != NO_TARGET
        with no_autocast(embeddings.device):
            # an ignored row must not reach the gradients, not even with NaN
            x = torch.where(valid[:, None], self._rows(embeddings), 0)
            norm = torch.linalg.vector_norm(x, dim=1)
            x = (unit_rows(x) if self.normalize else x) * self.scale
            lse, target = SimplexStatistics.apply(x, labels, self.simplex)
            moved = apply_margin(
                self.margin, target / self.scale, norm.to(target.dtype), "exact", valid
            )
            each = -F.logsigmoid(self.scale * moved - lse) + penalty_of(self.margin, norm)
            return reduced(each, valid, self.reduction, x.dtype)

    def logits(self, embeddings: Tensor) -> Tensor:
        """scale <x, v_c> of every vertex that takes part, without margin; differentiable. [N, V]"""
        self._check(embeddings)
        with no_autocast(embeddings.device):
            x = self._rows(embeddings)
            return self.simplex.products((unit_rows(x) if self.normalize else x) * self.scale)

    @torch.no_grad()
    def predict(self, embeddings: Tensor) -> Tensor:
        """The class of the highest score, ties to the lowest id. [N] int64, O(N D), no logits."""
        self._check(embeddings)
        x, simplex = self._rows(embeddings), Simplex(self.embedding_dim, self.num_classes)
        best = x[:, : simplex.plain].argmax(dim=1)
        if simplex.count == simplex.plain:
            return best
        last = torch.full_like(best, self.embedding_dim)
        return torch.where(simplex.chosen(x, last) > simplex.chosen(x, best), last, best)

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Directions of some classes, [...] int64 -> [..., D]."""
        validation.check_class_ids("ids", ids.flatten(), self.num_classes)
        return self.simplex.vectors(ids.long(), dtype)

    def _check(self, embeddings: Tensor) -> None:
        validation.check_matrix("embeddings", embeddings, "[N, D]")
        arguments.check_width(embeddings, self.num_classes, self.embedding_dim, of="DSimplexHead")

    @staticmethod
    def _rows(embeddings: Tensor) -> Tensor:
        return embeddings.to(accumulate_dtype(embeddings.dtype))

    def get_extra_state(self) -> Tensor:
        """[1] int64: the classes."""
        return torch.tensor([self.num_classes], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The classes of a head of the same dimension."""
        self.num_classes = 0
        self.grow(int(state.sum()))

    def extra_repr(self) -> str:
        return f"{self.num_classes}, {self.embedding_dim}, scale={self.scale}"

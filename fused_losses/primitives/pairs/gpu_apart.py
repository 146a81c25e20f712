"""Pairs whose scores are squared distances, on both GPU forms: u_ij = -scale |x_i - y_j|^2.

A block of squared distances is made where other calls make products, near pairs from differences
(`apart.share`), and kernels score it as they score products, by -scale. Backward, with G = dL/du:

    dx_i = 2 scale (sum_far G_ij y_j - x_i sum_far G_ij + sum_near G_ij (y_j - x_i))

the first of a library product over G with zeros for near pairs, the last from differences, in the
tiles of a block that have near pairs; dy alike, and dscale = -sum G |x - y|^2 over all pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_losses.primitives.pairs.gpu import Block, RowSums, add
from fused_losses.primitives.pairs.inputs import PairInputs, PairNeeds


class SplitBlock(NamedTuple):
    """A block of G for its products, and its sums."""

    far: Tensor  # [rows, columns] as products take it, 0 for near pairs
    row_sums: Tensor  # [rows] of `far`
    column_sums: Tensor  # [columns]
    moment: Tensor  # [] sum of G |x - y|^2 over all pairs
    near: Any  # which tiles have near pairs, as the backend's kernels know them


class NearSums(Protocol):
    """Adds sum_near G (other - own) to `to`."""

    def __call__(
        self,
        block: Block,
        g: Tensor,  # float32, of which the block has the first rows and columns
        squares: Tensor,
        near: Any,
        to: Tensor,  # [rows, D], or with `turned` [columns, D]: float32
        turned: bool,
    ) -> None: ...


class ApartGradients(RowSums):
    """What G makes of x, y and scale, block by block."""

    def __init__(
        self,
        p: PairInputs,
        x: Tensor,
        y: Tensor,
        scale: Tensor,  # [1] float32
        needs: PairNeeds,
        unscale: Tensor | float,
        near_sums: NearSums,
    ) -> None:
        super().__init__(p, x, y, 2 * scale, unscale, needs.x, needs.y)
        self.near_sums = near_sums
        self.mass = torch.zeros(p.x.shape[0], **self.wide) if needs.x else None
        self.moment = torch.zeros((), **self.wide) if needs.scale else None

    def add(self, block: Block, g: Tensor, squares: Tensor, split: SplitBlock) -> None:
        top, stop, first, end = block
        triangle, far = self.p.triangle, split.far
        near = g, squares, split.near
        if self.dx is not None and self.mass is not None:
            add(self.dx[top:stop], far, self.y[first:end].to(far.dtype))
            self.near_sums(block, *near, self.dx[top:stop], False)
            self.mass[top:stop] += split.row_sums
            if triangle:
                add(self.dx[first:end], far.T, self.x[top:stop])
                self.near_sums(block, *near, self.dx[first:end], True)
                self.mass[first:end] += split.column_sums
        if self.dy is not None:

            def rest(sums: Tensor) -> None:
                own = self.p.y[first:end].to(sums.dtype)
                sums.addcmul_(own, split.column_sums[:, None], value=-1)
                self.near_sums(block, *near, sums, True)

            self.dy.add(block, far, self.x, rest)
        if self.moment is not None:
            self.moment += split.moment

    def results(self) -> tuple[Tensor | None, ...]:
        p, dx, dscale = self.p, None, None
        if self.dx is not None and self.mass is not None:
            dx = self.dx.addcmul_(p.x.float(), self.mass.float()[:, None], value=-1)
            dx = (dx * self.scale).to(p.x.dtype)
        if self.moment is not None:
            dscale = (-self.moment * self.unscale).reshape(()).to(p.scale)
        return dx, None if self.dy is None else self.dy.out, dscale, None, None

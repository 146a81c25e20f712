"""A table of classes in factors, whose dense gradient steps cost O(D^2) a row of the batch.

    W = rows mixing + 1 shift^T,    gram = W^T W,    total = W^T 1

A loss of q = |W h|^2, s = sum_j (W h)_j and the outputs o_c of some classes alone has a gradient in
every row of W, and an SGD step by it changes `mixing` [D, D], `shift` [D] and the rows of those
classes: exact, whatever the number of classes (Vincent et al., 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_losses.base.validation import describe

WIDE = torch.float64  # of all that is not the height of the table
BLOCK_BYTES = 32 << 20  # of rows that are alive in float64
MATRICES = ("mixing", "shift", "gram", "total")


class Outputs(NamedTuple):
    """What of all outputs W h is known without them."""

    chosen: Tensor  # [N, K] o_c of the row's classes, 0 where there is none
    square: Tensor  # [N] sum over all classes of o^2
    total: Tensor  # [N] sum over all classes of o


class Slopes(NamedTuple):
    """A batch's loss in its `Outputs`, and the batch: all that a step is made of."""

    rows: Tensor  # [N, D] h
    classes: Tensor  # [N, K] int64, -1: none
    chosen: Tensor  # [N, K] 0 where there is no class
    square: Tensor  # [N]
    total: Tensor  # [N]

    def times(self, factor: float) -> Slopes:
        """Those of the loss times a factor."""
        chosen, square, total = (each * factor for each in self[2:])
        return self._replace(chosen=chosen, square=square, total=total)


def together(parts: list[Slopes]) -> Slopes:
    """Of the sum of some losses."""
    width = max(part.classes.shape[1] for part in parts)

    def wide(each: Tensor, value: float) -> Tensor:
        return nn.functional.pad(each, (0, width - each.shape[1]), value=value)

    rows, classes, chosen, square, total = zip(*parts, strict=True)
    return Slopes(
        torch.cat(rows),
        torch.cat([wide(each, -1) for each in classes]),
        torch.cat([wide(each, 0) for each in chosen]),
        torch.cat(square),
        torch.cat(total),
    )


class FactoredTable(nn.Module):
    """The factors, as buffers: they are moved, cast, copied and saved together.

    rows [C, D] may have any floating dtype; the matrices beside them stay float64. `gram` and
    `total` are those of the rows as stored: what rounding a row does is taken up in both.
    max_condition: of `mixing`, beyond which it is multiplied into the rows, in O(C D^2).
    """

    rows: Tensor
    mixing: Tensor
    shift: Tensor
    gram: Tensor
    total: Tensor

    def __init__(self, rows: Tensor, max_condition: float) -> None:
        super().__init__()
        self.max_condition = max_condition
        self.refactored = 0  # times that mixing went into the rows
        self.generation = 0  # changes with every step, and whenever another writes the table
        wide: dict[str, Any] = dict(dtype=WIDE, device=rows.device)
        dim = rows.shape[1]
        self.register_buffer("rows", rows)
        self.register_buffer("mixing", torch.eye(dim, **wide))
        self.register_buffer("shift", torch.zeros(dim, **wide))
        self.register_buffer("gram", torch.zeros(dim, dim, **wide))
        self.register_buffer("total", torch.zeros(dim, **wide))
        self.measure()

    # ---- what is read ----

    @torch.no_grad()
    def of(self, classes: Tensor) -> Tensor:
        """Rows of W, in float64. [..., D]"""
        return self.rows[classes].to(WIDE) @ self.mixing + self.shift

    @torch.no_grad()
    def outputs(self, h: Tensor, classes: Tensor) -> Outputs:
        """Of rows [N, D] in float64 and their classes [N, K], -1: none. Time O(N (D^2 + K D))."""
        chosen = self._chosen(h @ self.mixing.T, classes) + (h @ self.shift)[:, None]
        return Outputs(
            torch.where(classes < 0, 0, chosen), (h @ self.gram * h).sum(dim=1), h @ self.total
        )

    @torch.no_grad()
    def gradient(self, slopes: Slopes) -> Tensor:
        """Of the rows h. [N, D]"""
        grad = slopes.chosen.to(WIDE)
        picked = self.rows[slopes.classes.clamp_min(0)].to(WIDE)  # [N, K, D]
        along = torch.einsum("nk,nkd->nd", grad, picked) @ self.mixing
        along += grad.sum(dim=1, keepdim=True) * self.shift
        return (
            2 * slopes.square[:, None] * (slopes.rows @ self.gram)
            + slopes.total[:, None] * self.total
            + along
        )

    @torch.no_grad()
    def norm(self, slopes: Slopes) -> float:
        """Of the gradient in W, without it: O(N D (N + D))."""
        square = (self._overlap(slopes) * (slopes.rows @ slopes.rows.T)).sum()
        return float(square.clamp_min(0).sqrt())

    def condition(self) -> float:
        """Of `mixing`, in the 1-norm: how much the rows' rounding is magnified at most."""
        return float(torch.linalg.cond(self.mixing, 1))

    @torch.no_grad()
    def drift(self) -> float:
        """|gram - W^T W| over |W^T W|, both Frobenius; O(C D^2)."""
        gram, _ = self._measured()
        return float(torch.linalg.norm(self.gram - gram) / torch.linalg.norm(gram))

    def _chosen(self, mixed: Tensor, classes: Tensor) -> Tensor:
        picked = self.rows[classes.clamp_min(0)].to(WIDE)
        return torch.einsum("nkd,nd->nk", picked, mixed)

    def _overlap(self, slopes: Slopes) -> Tensor:
        """[N, N]: <g_a, g_b> of the gradients in the outputs W h, C numbers a row."""
        at, spread = _spread(slopes)
        h, two = slopes.rows, 2 * slopes.square[:, None]
        own = spread.sum(dim=0)  # [N]
        # of W h with the sparse part and with the sums
        known = (spread.T @ self.of(at) + slopes.total[:, None] * self.total) @ h.T
        crossed = known.T * two  # 2 diag(g_q) H^T Z
        sums = torch.outer(slopes.total, own)
        return (
            two * (h @ self.gram @ h.T) * two.T
            + len(self.rows) * torch.outer(slopes.total, slopes.total)
            + spread.T @ spread
            + (sums + sums.T)
            + (crossed + crossed.T)
        )

    # ---- what is written ----

    @torch.no_grad()
    def step(self, slopes: Slopes, lr: float, decay: float) -> None:
        """W <- (1 - lr decay) W - lr dL/dW, exactly. Time O(N D (N + D) + D^3 + K N D)."""
        h, dim = slopes.rows, self.mixing.shape[0]
        at, spread = _spread(slopes)  # [U], [U, N]
        kept, two = 1 - lr * decay, 2 * slopes.square[:, None]
        # every sum is of the old factors
        moved_in = self.gradient(slopes).T @ h  # W^T dW
        overlap = h.T @ self._overlap(slopes) @ h
        sums = h.T @ (
            two[:, 0] * (h @ self.total) + len(self.rows) * slopes.total + spread.sum(dim=0)
        )
        factor = kept * torch.eye(dim, dtype=WIDE, device=h.device) - lr * (h.T @ (two * h))
        self.mixing.copy_(self.mixing @ factor)
        self.shift.copy_(factor @ self.shift - lr * (h.T @ slopes.total))
        self.gram.mul_(kept**2).sub_(lr * kept * (moved_in + moved_in.T)).add_(lr**2 * overlap)
        self.total.mul_(kept).sub_(lr * sums)
        inverse = torch.linalg.inv_ex(self.mixing)
        condition = torch.linalg.norm(self.mixing, 1) * torch.linalg.norm(inverse.inverse, 1)
        size = self.mixing.abs().max()
        # what a kernel's answer decides: one wait for the device a step
        if not bool((condition < self.max_condition) & (size < 1e6) & (size > 1e-6)):
            self._fold()
            self.rows[at] = (self.rows[at].to(WIDE) - lr * (spread @ h)).to(self.rows.dtype)
            self.measure()
        else:
            self._add(at, -lr * (spread @ (h @ inverse.inverse)))
        self.generation += 1

    def _add(self, at: Tensor, change: Tensor) -> None:
        """Adds to some rows; what storing them rounds goes into gram and total, too."""
        wanted = self.rows[at].to(WIDE) + change
        self.rows[at] = wanted.to(self.rows.dtype)
        rounded = (self.rows[at].to(WIDE) - wanted) @ self.mixing
        crossed = (wanted @ self.mixing + self.shift).T @ rounded
        self.gram.add_(crossed + crossed.T + rounded.T @ rounded)
        self.total.add_(rounded.sum(dim=0))

    @torch.no_grad()
    def refactor(self) -> None:
        """mixing and shift go into the rows. O(C D^2), a block at a time."""
        self._fold()
        self.measure()

    def _fold(self) -> None:
        for block in self._blocks():
            block.copy_(block.to(WIDE) @ self.mixing + self.shift)
        self._plain()
        self.refactored += 1

    def _plain(self) -> None:
        """The rows are W."""
        self.mixing.zero_().fill_diagonal_(1)
        self.shift.zero_()

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Takes a table [C, D] as it is."""
        if weight.shape != self.rows.shape:
            expected = tuple(self.rows.shape)
            raise ValueError(f"weight: expected shape {expected}, got {describe(weight)}")
        self.rows.copy_(weight)
        self._plain()
        self.measure()

    def measure(self) -> None:
        """gram and total from the rows, O(C D^2)."""
        gram, total = self._measured()
        self.gram.copy_(gram)
        self.total.copy_(total)
        self.generation += 1

    def _measured(self) -> tuple[Tensor, Tensor]:
        gram, total = torch.zeros_like(self.gram), torch.zeros_like(self.total)
        for block in self._blocks():
            rows = block.to(WIDE) @ self.mixing + self.shift
            gram.addmm_(rows.T, rows)
            total += rows.sum(dim=0)
        return gram, total

    def _blocks(self) -> Iterator[Tensor]:
        return iter(self.rows.split(max(1, BLOCK_BYTES // (8 * self.rows.shape[1]))))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredTable:
        """Casts the rows alone; gram and total are then those of the rows as cast."""
        former, matrices = self.rows.dtype, {name: self._buffers[name] for name in MATRICES}
        super()._apply(fn, recurse)
        for name, matrix in matrices.items():
            assert matrix is not None
            moved = self._buffers[name]
            if moved is not None and moved.dtype != WIDE:
                self._buffers[name] = matrix.to(moved.device)
        if self.rows.dtype != former:
            self.measure()
        self.generation += 1
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As torch has it; of rows that come without their matrices these are measured."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name in MATRICES:
            self._buffers[name] = getattr(self, name).to(WIDE)
        given = [prefix + name in state_dict for name in MATRICES]
        if prefix + "rows" in state_dict and not all(given):
            if not any(given):
                self._plain()
            self.measure()
        self.generation += 1


def _spread(slopes: Slopes) -> tuple[Tensor, Tensor]:
    """The classes that a batch names, once each [U], and their gradients of each row [U, N]."""
    n = len(slopes.rows)
    named = slopes.classes >= 0
    at, where = slopes.classes[named].unique(return_inverse=True)
    spread = torch.zeros((len(at), n), dtype=WIDE, device=slopes.rows.device)
    row = torch.arange(n, device=at.device)[:, None].expand_as(slopes.classes)[named]
    spread.index_put_((where, row), slopes.chosen[named].to(WIDE), accumulate=True)
    return at, spread

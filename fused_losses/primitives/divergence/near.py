"""Sides near each other: u - v as products of differences, whose rounding is as small as it is.

With 1/|w| = a and 1/|wt| = b where both are divided by their norms:

- <x, w> - <t, wt> = <x - t, w> + <t, w - wt> = s,
- a <x, w> - b <t, wt> = a s + (<x, w> - s) (a - b),
- a - b = <wt - w, wt + w> a^2 b^2 / (a + b).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_losses.primitives.divergence.inputs import DivergenceInputs

SMALL = 2.0**-5  # of a length: a difference below it is near, and worth two more products


def may_be_near(p: DivergenceInputs) -> bool:
    """Whether both sides have the same coordinates, and products that do not round them."""
    alike = p.teacher_weight is not None and p.teacher.shape[1] == p.x.shape[1]
    return alike and p.normalize == p.teacher_normalize and p.precision in ("fp32", "mixed")


def rows_near(apart: Tensor, x: Tensor) -> Tensor:
    """Whether each row of x is near the teacher's, bool [N]; a row out of range is not."""
    between, whole = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in (apart, x))
    return (between <= SMALL * whole) & between.isfinite()


def _is_small(difference: Tensor, whole: Tensor) -> Tensor:
    """A bool [] where it stands: a GPU is not waited for."""
    lengths = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (difference, whole))
    return next(lengths) <= SMALL * next(lengths)


class NearSides:
    """u - v of tiles, where rows and weights of both sides are near each other."""

    def __init__(self, x: Tensor, teacher: Tensor, normalize: bool) -> None:
        self.apart, self.teacher, self.normalize = x - teacher, teacher, normalize
        self.small = _is_small(self.apart, x)
        self.possible = x.is_cuda or bool(self.small)

    def adjusted(
        self,
        u: Tensor,  # [N, T], products of the student alone
        v: Tensor,  # [N, T]
        w: Tensor,  # [T, D] as given
        wt: Tensor,
        multiply: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """v from u and what is between them, where the tile is near; else v as it is."""
        if not self.possible:
            return v
        w, wt = w.to(self.apart.dtype), wt.to(self.apart.dtype)
        moved = w - wt
        small = self.small & _is_small(moved, w)
        if not (small.is_cuda or bool(small)):
            return v
        if not self.normalize:
            between = multiply(self.apart, w) + multiply(self.teacher, moved)
            return torch.where(small, u - between.to(u.dtype), v)
        a, b = (1 / torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in (w, wt))
        # of length near 1, as far as the dtype goes: products of short rows lose their digits
        near_one = a.clamp(max=2.0**126).to(w.dtype)
        moved.mul_(near_one[:, None])
        between = multiply(self.apart, w * near_one[:, None]) + multiply(self.teacher, moved)
        between, rest = between.to(u.dtype), a / near_one
        whole = (w + wt).mul_(near_one[:, None]).mul_(moved)
        shorter = -whole.sum(dim=1, dtype=torch.float64) * (b * rest) ** 2 / (a + b)
        # a row of zeros, or one whose length is out of range, is multiplied as it comes
        small = small & shorter.isfinite()
        between = between * rest + (u / a - between / near_one) * shorter
        return torch.where(small, u - between.to(u.dtype), v)

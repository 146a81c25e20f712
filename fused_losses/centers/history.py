"""What the steps that a row missed would have done to it, in closed form.

What a missed step does to weight and momentum is linear and the same for all rows, so the steps
since a row's last one are one product of 2 x 2 matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[float, float, float, float]  # a, b, c, d of w, v = w + a w + b v, c w + d v

IDENTITY: Factors = (0.0, 0.0, 0.0, 1.0)


class History:
    """Products of the latest steps' matrices: what a row does that last took part in step t.

    w's own factor is kept less 1: a small decay is not lost beside it. Memory O(steps), time
    O(steps) a step.
    """

    def __init__(self) -> None:
        self.clear(0)

    def clear(self, step: int) -> None:
        """No row has missed a step that changes anything, up to this one."""
        self.start = step
        self.idle = True  # every step so far was the identity
        self._products = torch.tensor([IDENTITY], dtype=torch.float64, device="cpu")

    def __len__(self) -> int:
        return len(self._products) - 1

    def push(self, factors: Factors) -> None:
        """The next step's matrix."""
        a, b, c, d = factors
        old = self._products
        new = old.new_empty(len(old) + 1, 4)
        new[:-1, 0] = a + old[:, 0] + a * old[:, 0] + b * old[:, 2]
        new[:-1, 1] = (1 + a) * old[:, 1] + b * old[:, 3]
        new[:-1, 2] = c * (1 + old[:, 0]) + d * old[:, 2]
        new[:-1, 3] = c * old[:, 1] + d * old[:, 3]
        new[-1] = old.new_tensor(IDENTITY)
        self._products = new
        self.idle = self.idle and factors == IDENTITY

    def since(self, last: Tensor) -> Tensor:
        """[K, 4] float64, the factors of rows whose last steps are [K] int64."""
        at = (last - self.start).clamp(0, len(self))
        return self._products.to(last.device).index_select(0, at)

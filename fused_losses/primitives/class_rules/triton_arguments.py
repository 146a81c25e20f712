"""What the Triton kernels of class rules take in groups."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PARAMS = 4  # the most that a rule has


class Params(NamedTuple):
    """A rule's, then zeros."""

    first: float
    second: float
    third: float
    fourth: float

    @classmethod
    def of(cls, params: list[float]) -> Params:
        return cls(*params, *[0.0] * (PARAMS - len(params)))


class RuleRows(NamedTuple):
    """What the kernels read of the rows, beside those of x; the last four in the backward."""

    places: Tensor  # [N, L] int32: columns of the row's labels, -1 = none
    numbers: (
        Tensor | None
    )  # [N, R] float32, the rule's values; a group of Triton has `values` itself
    lse: Tensor | None = None  # [N] the first statistic, merged, where it is one
    grad_first: Tensor | None = None  # [N]
    grad_second: Tensor | None = None  # [N]
    grad_targets: Tensor | None = None  # [N, L]

    def cut(self, part: slice) -> RuleRows:
        """Those of some rows."""
        places, *rest = self
        return RuleRows(places[part], *(None if r is None else r[part] for r in rest))


class RulePartials(NamedTuple):
    """Statistics of rows over a part of the classes; [T, N] of T parts, or [N] of all so far."""

    high: Tensor  # the highest cosine
    best: Tensor  # int32 column of it
    total: Tensor  # the first statistic: its sum, or sum exp(term - peak)
    peak: Tensor | None  # the highest term, where the first is an lse
    second: Tensor | None  # sum of the second statistic, where there is one

    def cut(self, start: int) -> RulePartials:
        """From one of the parts on."""
        high, best, total, *rest = self
        rest = (None if r is None else r[start:] for r in rest)
        return RulePartials(high[start:], best[start:], total[start:], *rest)

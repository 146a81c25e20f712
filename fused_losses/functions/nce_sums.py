"""The parts of InfoNCE's sums: of all pairs, a bank's, a row's own negatives, the diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.integers import count_up
from fused_losses.base.memory_budget import Room
from fused_losses.base.numerics import accumulate_dtype, nan_where_infinite, over_last
from fused_losses.base.products import product
from fused_losses.base.unit_norm import unit
from fused_losses.functions.pair_sums import PairSums
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, PairInputs, Rule
from fused_losses.primitives.pairs.op import PairStatistics, pair_statistics


def both_ways(
    inputs: PairInputs,
    hardness: float,
    cols: bool,
    backend: str | None,
    room: Room | None = None,
) -> tuple[PairSums, PairSums | None]:
    how: dict[str, Any] = dict(cols=cols, room=room, backend=backend)
    tilted = inputs._replace(negative=Rule(1 + hardness)) if hardness else inputs
    first = pair_statistics(tilted, **how)
    second: tuple[PairStatistics | None, ...] = (None, None)
    if hardness:
        second = pair_statistics(inputs._replace(negative=Rule(hardness)), **how)

    def sums(s: PairStatistics, t: PairStatistics | None) -> PairSums:
        tilt = None if t is None else t.value[NEGATIVE]
        return PairSums(s.value, tilt, s.count[NEGATIVE])

    rows, columns = first
    return sums(rows, second[0]), None if columns is None else sums(columns, second[1])


def of_own_negatives(inputs: PairInputs, negatives: Tensor, hardness: float) -> PairSums:
    """The side of negatives [N, K, D] that each row has to itself."""
    narrow = accumulate_dtype(inputs.x.dtype)
    found = product(inputs.x.to(narrow)[:, None], negatives.to(narrow))[:, 0]
    bad = nan_where_infinite(inputs.x)[:, None] + nan_where_infinite(negatives)
    z = found.double() * inputs.scale + bad
    kept = torch.ones_like(z, dtype=torch.bool)
    if inputs.x_window is not None:
        kept = ~(z.to(narrow) >= inputs.x_window[3, :, None])
    tilt = over_last(hardness * z, kept) if hardness else None
    return PairSums(
        torch.stack([torch.full_like(z[:, 0], -torch.inf), over_last((1 + hardness) * z, kept)]),
        tilt,
        kept.sum(dim=1).double(),
    )


def diagonal(inputs: PairInputs, offset: int) -> Tensor:
    """z of query i and key offset + i, -inf where it is excluded. [N]"""
    n, narrow = inputs.x.shape[0], accumulate_dtype(inputs.x.dtype)
    x, y = inputs.x.to(narrow), inputs.y[offset : offset + n].to(narrow)
    z = product(x[:, None], y[:, None])[:, 0, 0].double() * inputs.scale
    z = z + nan_where_infinite(x) + nan_where_infinite(y)
    if inputs.exclude is None:
        return z
    out = (inputs.exclude == count_up(n, x, offset)[:, None]).any(dim=1)
    return torch.where(out, -torch.inf, z)


def alone(positive: Tensor, hardness: float) -> PairSums:
    """Positives without a negative."""
    nothing = torch.full_like(positive, -torch.inf)
    value = torch.stack([positive, nothing])
    return PairSums(value, nothing if hardness else None, torch.zeros_like(positive))


def against(
    bank: Tensor, bank_labels: Tensor | None, inputs: PairInputs, normalize: bool
) -> PairInputs:
    """The pairs of the queries and a bank."""
    return inputs._replace(
        y=(unit(bank) if normalize else bank).contiguous(),
        x_labels=None if bank_labels is None else inputs.x_labels,
        y_labels=bank_labels,
        exclude=None,
    )


@torch.no_grad()
def with_windows(
    inputs: PairInputs,
    further: list[PairInputs],
    on_diagonal: bool,
    margin: float,
    symmetric: bool,
    backend: str | None,
) -> PairInputs:
    """Leaves out the negatives above the best positive of their row (column) plus the margin.

    The positives' scores are the sweep's own: another sum's rounding would part equal scores.
    """
    # ids leave no positive of the diagonal out
    seen = inputs._replace(x_ids=None, y_ids=None) if on_diagonal else inputs
    rows, columns = pair_statistics(seen, cols=symmetric, backend=backend)
    best = [rows.best[POSITIVE]]
    labelled = [bank for bank in further if bank.x_labels is not None]
    best += [pair_statistics(bank, backend=backend)[0].best[POSITIVE] for bank in labelled]
    return inputs._replace(
        x_window=window(torch.stack(best).amax(dim=0), inputs, margin),
        y_window=None if columns is None else window(columns.best[POSITIVE], inputs, margin),
    )


def window(best: Tensor, inputs: PairInputs, margin: float) -> Tensor:
    """No negative above best + margin; a row without a positive keeps all. [4, N]"""
    narrow = accumulate_dtype(inputs.x.dtype)
    top = torch.where(best == -torch.inf, torch.inf, best + margin * inputs.scale).to(narrow)
    # a window leaves out its end, and equal to the limit is not above it
    high = top.nextafter(torch.full_like(top, torch.inf))
    endless = torch.full_like(top, torch.inf)
    return torch.stack([-endless, endless, -endless, high])

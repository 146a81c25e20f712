"""The k best by metrics that no product screens: blocks of distances, the best carried along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_losses.base.blocks import runs
from fused_losses.base.numerics import accumulate_dtype, followed, recomputed
from fused_losses.pairwise.class_covariance import (
    class_distances,
    class_roots,
    listed_distances,
    of_classes,
)
from fused_losses.pairwise.distance import pairwise_distance
from fused_losses.pairwise.own_metric import OwnMetric, check_backend, listed_values
from fused_losses.primitives.distances.op import choose
from fused_losses.primitives.topk.inputs import QuantizedRows, TopkInputs
from fused_losses.primitives.topk.reference import allowed, best

BLOCK_BYTES = 8 << 20  # of a block
BYTES_A_PAIR = 48  # a distance and what sorting it takes
LISTED = 2_048  # chosen columns of a row at once


def finished(x: Tensor, values: Tensor, index: Tensor, largest: bool) -> Tensor:
    # a padded value is a constant
    nothing = -torch.inf if largest else torch.inf
    values = torch.where(index < 0, nothing, values)
    on_host = x.device.type == "cpu" and not torch.compiler.is_compiling()
    # without a padded value no row has NaN: asking is cheaper than reading x
    if not x.is_floating_point() or (on_host and not bool((index < 0).any())):
        return values
    return torch.where(x.isnan().any(dim=1, keepdim=True), torch.nan, values)


class Unscreened:
    """A metric that no product screens, of rows and a bank that become one dtype."""

    def __init__(
        self,
        x: Tensor,
        bank: Tensor,
        metric: str | OwnMetric,
        options: dict[str, Any],
        dtype: torch.dtype,
    ) -> None:
        self.bank, self.metric, self.dtype = bank, metric, dtype
        self.options = dict(options)
        self.variance = self.options.pop("variance", None)
        self.inverse, self.width = None, max(x.shape[1], 1)
        if callable(metric):
            check_backend(self.options.get("backend"), x)
        if of_classes(self.options.get("covariance")):
            choose(self.options.get("backend"), x.device, x.dtype, "fp32", "euclidean")
            self.inverse, _ = class_roots(self.options.pop("covariance"), bank)
            self.width *= self.width

    def distances(self, rows: Tensor, others: Tensor, at: slice | Tensor) -> Tensor:
        """Rows against these of the bank, which stand at `at`."""
        rows, others = rows.to(self.dtype), others.to(self.dtype)
        if self.inverse is not None:
            return class_distances(rows, others, self.inverse[at])
        some = {} if self.variance is None else {"variance": self.variance[at].to(others.dtype)}
        return pairwise_distance(rows, others, self.metric, **self.options, **some)

    def _of_rows(self, rows: Tensor, bank: Tensor, at: Tensor) -> Tensor:
        if self.inverse is not None:
            rows, bank = rows.to(self.dtype), bank.to(self.dtype)
            return listed_distances(rows, bank, self.inverse, at)
        if callable(self.metric):
            return listed_values(self.metric, rows, bank, at, self.dtype)
        return self.distances(rows[:, None], bank[at], at)[:, 0]

    def listed(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows against the columns [N, k] that are listed; autograd keeps the rows. [N, k]"""
        (n, k), m, dtype = index.shape, self.bank.shape[0], accumulate_dtype(self.dtype)
        moving = x, self.bank, *(() if self.inverse is None else (self.inverse,))
        found = [torch.zeros((0 if m else n, k), dtype=dtype, device=x.device)]
        step = max(1, BLOCK_BYTES // (min(k, LISTED) * self.width * BYTES_A_PAIR))
        for rows in runs(n if m else 0, step):
            line = []
            for at in index[rows].clamp_min(0).split(LISTED, dim=1):
                given = (self._of_rows, x[rows], self.bank, at)
                if callable(self.metric):  # which may hold what asks for a gradient
                    line.append(recomputed(*given))
                elif followed(*moving):
                    line.append(checkpoint(*given, use_reentrant=False))
                else:
                    line.append(self._of_rows(*given[1:]))
            found.append(torch.cat(line, dim=1))
        values = torch.cat(found)
        if followed(*moving) and not values.numel():  # gradients of nothing
            for t in moving:
                values = values + t[:0].sum().to(values.dtype)
        return values


def in_full(
    x: Tensor,
    bank: Tensor | QuantizedRows,
    metric: str | OwnMetric,
    asked: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Metrics without a product: blocks of distances, the best carried from block to block."""
    if isinstance(bank, QuantizedRows):
        raise ValueError(f"y: expected float rows with metric={metric!r}, got QuantizedRows")
    n, m, k = x.shape[0], bank.shape[0], asked["k"]
    inputs = TopkInputs(x, bank, kind="own" if callable(metric) else metric, **asked)
    dtype = torch.promote_types(x.dtype, bank.dtype)
    of = Unscreened(x, bank, metric, options, dtype)
    wide = max(k, 2_048)
    step = max(1, BLOCK_BYTES // (wide * BYTES_A_PAIR))
    found = [torch.zeros((0, k), dtype=torch.int64, device=x.device)]
    with torch.no_grad():
        for i in range(0, n, step):
            run = slice(i, min(i + step, n))
            index = torch.full((run.stop - i, k), -1, device=x.device)
            keys = torch.full(
                index.shape, torch.nan, device=x.device, dtype=accumulate_dtype(dtype)
            )
            for j in range(0, m, wide):
                block = slice(j, min(j + wide, m))
                fresh = of.distances(x[run], bank[block], block)
                fresh = torch.where(allowed(inputs, run, block), fresh, torch.nan)
                at = torch.arange(j, block.stop, device=x.device).expand(fresh.shape)
                keys, index = best(
                    torch.cat([keys, fresh], 1), torch.cat([index, at], 1), k, inputs.largest
                )
            found.append(index)
    index = torch.cat(found)
    values = of.listed(x, index).to(accumulate_dtype(x.dtype))
    return finished(x, values, index, asked["largest"]), index

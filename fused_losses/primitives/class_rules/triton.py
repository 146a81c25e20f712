"""`class_rules` on Triton: one sweep forward, a stored chunk of G backward; any rule and pool.

Memory beyond the outputs: partial statistics (at most PARTIAL_BYTES), N x D accumulators in
float32, and in the backward one chunk of G and of dW. Never N x C.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.products import float16_scale, float32_products
from fused_losses.backends.gpu.tiles import Tile
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.backends.triton.launch import kernel
from fused_losses.base.numerics import row_dtype
from fused_losses.base.validation import NO_TARGET
from fused_losses.primitives.class_rules.bounded import targets, targets_workspace
from fused_losses.primitives.class_rules.inputs import (
    ClassInputs,
    ClassNeeds,
    ClassStatistics,
    check_ids,
    places,
    weight_rows,
)
from fused_losses.primitives.class_rules.rules import BEND, CLASS_FOLDS
from fused_losses.primitives.class_rules.triton_arguments import Params, RulePartials, RuleRows
from fused_losses.primitives.class_rules.triton_tiles import TABLES
from fused_losses.primitives.row_statistics import triton_chunks
from fused_losses.primitives.row_statistics.gpu import Problem, weight_gradient
from fused_losses.primitives.row_statistics.triton_arguments import ClassVectors

PARTIAL_BYTES = 64 << 20
MERGE = Tile(16, 32, 0, 4, 2)


# of a class tile, on any device: shapes alone say nothing of the architecture
MOST_COLUMNS = max(t.columns for table in TABLES.values() for t in table.tiles.values())


def workspace(p: ClassInputs, needs: ClassNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    n, d = p.x.shape
    around = 4 * 8 * n * (3 + p.labels.shape[1])  # vectors of a row's numbers
    around += n * d * p.weight.element_size()  # x in the dtype of weight
    if p.classes is not None:
        around += 3 * 8 * p.taking_part * p.centers  # the centres' rows
    if needs is None:
        unit = 4 * p.centers * MOST_COLUMNS  # their norms
        chunk = max(PARTIAL_BYTES, 4 * 5 * n) + max(unit, 4 * p.taking_part * p.centers)
        return max(chunk, targets_workspace(p.x, p.labels, p.centers)) + around
    unit, count = p.centers * MOST_COLUMNS, p.centers * p.taking_part
    return triton_chunks.chunk_bytes(n, d, count, p.x.device, unit) + 3 * n * d * 4 + around


class RuleCall:
    """One call as the kernels read it: the problem over centres, and what classes are of them."""

    def __init__(self, p: ClassInputs, gradient: bool) -> None:
        self.inputs, self.rule = p, CLASS_FOLDS[p.rule]
        self.centers, self.classes = p.centers, p.taking_part
        rows = None
        if p.classes is not None:
            rows = weight_rows(p, slice(0, p.taking_part))
            assert isinstance(rows, Tensor)
        self.problem = Problem.of(
            p.x.to(p.weight.dtype),  # tensor cores take both operands in one dtype
            p.weight,
            p.precision,
            gradient,
            exact=p.x,
            positions=places(p).to(torch.int32).contiguous(),
            classes=None if rows is None else rows.contiguous(),
            bias=None,
            column_weight=None,
            bend=None,
            normalize=p.normalize,
        )
        values = p.values
        self.bent = values is not None and BEND in self.rule.values
        self.rows = RuleRows(
            self.problem.positions,
            # copied even where a view would do: a kernel reads a row's values at once
            None if values is None else values.T.to(torch.float32, copy=True).contiguous(),
        )
        self.params = Params.of(list(p.params))
        self.has_lse, self.two = self.rule.kinds[0] == "lse", len(self.rule.kinds) > 1
        self.table = TABLES[gpu_device.architecture(p.x.device)]

    def tile(self, direction: str) -> Tile:
        p, tiles = self.problem, self.table.tiles
        whole = p.aligned() and p.even(tiles[direction, p.products].depth)
        if not whole or (self.centers > 1 and self.inputs.softness):
            direction += "_soft"
        elif self.centers > 1 or self.two or self.bent:
            direction += "_extra"
        return tiles[direction, p.products]

    def varying(self, first: int, end: int, height: int, row_tiles: int) -> tuple:
        """Arguments from n on."""
        sharpness = 1 / self.inputs.softness if self.inputs.softness else 0.0
        labels = self.inputs.labels.shape[1]
        return height, first, end, self.problem.d, row_tiles, labels, self.centers, sharpness

    def constants(self, tile: Tile) -> dict[str, Any]:
        p, pool = self.problem, 0 if self.centers == 1 else (2 if self.inputs.softness else 1)
        many = self.inputs.labels.shape[1] > 1
        return dict(
            RULE=self.inputs.rule, BENT=self.bent, POOL=pool, MANY=many, BM=tile.rows
        ) | dict(BN=tile.columns, BK=tile.depth, EVEN=p.even(tile.depth), BF16=p.bf16, DOT=p.dot)


def forward(p: ClassInputs) -> ClassStatistics:
    """The rule's statistics, the labels' cosines, and the hardest negative class of each row."""
    check_ids(p)
    call = RuleCall(p, gradient=False)
    n, wide = p.x.shape[0], row_dtype(p.x.device)
    found = _partials(call, (n,), wide)
    for values, start in zip(found, (-torch.inf, NO_TARGET, 0, -torch.inf, 0), strict=True):
        if values is not None:
            values.fill_(start)
    if n and call.classes:
        _sweep(call, found)
    first = found.total if found.peak is None else found.total.log().add_(found.peak)
    statistics = first[None] if found.second is None else torch.stack([first, found.second])
    hardest = found.best.to(torch.int64)
    if p.classes is not None and call.classes:
        hardest = torch.where(hardest < 0, hardest, p.classes[hardest.clamp_min(0)])
    of_labels = targets(p.x, p.weight, p.labels, p.centers, p.softness, p.normalize)
    return ClassStatistics(statistics, of_labels, hardest, found.high)


def _partials(call: RuleCall, shape: tuple[int, ...], sums: torch.dtype) -> RulePartials:
    def make(dtype: torch.dtype, wanted: bool = True) -> Tensor:
        return torch.empty(shape if wanted else 0, dtype=dtype, device=call.inputs.x.device)

    return RulePartials(
        make(torch.float32),
        make(torch.int32),
        make(sums),
        make(torch.float32) if call.has_lse else None,
        make(sums) if call.two else None,
    )


def _sweep(call: RuleCall, found: RulePartials) -> None:
    """Every class tile against every row, merged a segment at a time."""
    p, tile, n = call.problem, call.tile("forward"), call.problem.n
    row_tiles, tiles = ceil_div(n, tile.rows), ceil_div(call.classes, tile.columns)
    parts = sum(values is not None for values in found)
    segment = min(tiles, max(1, PARTIAL_BYTES // (4 * parts * n)))
    segment = ceil_div(tiles, ceil_div(tiles, segment))
    part = _partials(call, (segment, n), torch.float32)
    chunk = tile.columns * call.centers
    step = min(segment, max(1, call.table.norm_rows // chunk)) if p.normalize else segment
    inverse = (
        torch.empty(step * chunk, dtype=torch.float32, device=p.x.device) if p.normalize else None
    )
    of_class = ClassVectors.of(p, inverse)
    for start in range(0, tiles, segment):
        stop = min(start + segment, tiles)
        for at in range(start, stop, step):
            first = at * tile.columns
            end = min(min(at + step, stop) * tile.columns, call.classes)
            if inverse is not None:
                triton_chunks.norms(p, inverse, first * call.centers, end * call.centers)
            here = part.cut(at - start)
            triton_launch.launch(
                kernel("class_rules.triton_forward.forward_classes"),
                row_tiles * ceil_div(end - first, tile.columns),
                (p.x, p.weight, of_class, call.rows, here, call.params)
                + (p.x.stride(0), p.weight.stride(0), *call.varying(first, end, n, row_tiles)),
                call.constants(tile),
                tile,
            )
        triton_launch.launch(
            kernel("class_rules.triton_forward.merge_classes"),
            ceil_div(n, MERGE.rows),
            (part, found, n, stop - start),
            dict(BM=MERGE.rows, BT=MERGE.columns),
            MERGE,
        )


def backward(
    grad_statistics: Tensor,
    grad_targets: Tensor,
    statistics: Tensor,
    p: ClassInputs,
    compact: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dweight, each empty where it is not needed."""
    call = RuleCall(p, gradient=True)
    problem, compact = call.problem, compact and p.classes is not None
    dx = torch.zeros_like(p.x) if need_x else p.x.new_empty(0)
    dweight = weight_gradient(problem, compact) if need_weight else None
    if problem.n and call.classes and (need_x or need_weight):
        with float32_products(p.precision == "tf32"):
            found = _gradients(
                call, grad_statistics, grad_targets, statistics, need_x, dweight, compact
            )
        if found is not None:
            dx = found.to(p.x.dtype)
    return dx, p.weight.new_empty(0) if dweight is None else dweight


def _gradients(
    call: RuleCall,
    grad_statistics: Tensor,
    grad_targets: Tensor,
    statistics: Tensor,
    need_x: bool,
    dweight: Tensor | None,
    compact: bool,
) -> Tensor | None:
    p, unscale = call.problem, None
    grads = [grad_statistics.to(torch.float32), grad_targets.to(torch.float32)]
    if p.low == torch.float16:
        steepest = call.rule.steepest(list(call.inputs.params))
        scale = float16_scale([grads[0] * max(1.0, steepest), grads[1]], None)
        grads, unscale = [g * scale for g in grads], (1 / scale).reshape(1)
    of_row = call.rows._replace(
        lse=statistics[0].to(torch.float32) if call.has_lse else None,
        grad_first=grads[0][0].contiguous(),
        grad_second=grads[0][1].contiguous() if call.two else None,
        grad_targets=grads[1].contiguous(),
    )
    tile, strides = call.tile("gradient"), (p.x.stride(0), p.weight.stride(0))

    def fill(
        part: slice, of_class: ClassVectors, ds: Tensor, _: Tensor | None, first: int, end: int
    ) -> None:
        height = part.stop - part.start
        first, end = first // call.centers, end // call.centers
        row_tiles = ceil_div(height, tile.rows)
        triton_launch.launch(
            kernel("class_rules.triton_backward.gradient_classes"),
            row_tiles * ceil_div(end - first, tile.columns),
            (p.x[part], p.weight, of_class, of_row.cut(part), ds, call.params, *strides)
            + (ds.stride(0), *call.varying(first, end, height, row_tiles)),
            call.constants(tile),
            tile,
        )

    given = (unscale, need_x, dweight, None, compact, call.centers)
    sizes = partial(call.table.stored, p.x.device), call.table.norm_rows
    dx = triton_chunks.gradients(p, fill, tile, *sizes, *given)
    return dx if dx is None or unscale is None else dx * unscale

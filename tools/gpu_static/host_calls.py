"""The host code whose Triton kernels are compiled: a function an operation, tensors without data.

A call runs a forward and a backward, so that the kernels, their tiles and their specialisations are
those that the host code chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.backends.triton import target_loss as triton_target_loss
from fused_losses.backends.triton import unit_rows as triton_unit_rows
from fused_losses.base.target_loss import MovedTarget, TargetEnd
from fused_losses.primitives.class_rules import triton as triton_class_rules
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS
from fused_losses.primitives.distances import triton as triton_distances
from fused_losses.primitives.distances.inputs import DistanceInputs, DistanceNeeds
from fused_losses.primitives.divergence import triton as triton_divergence
from fused_losses.primitives.divergence.inputs import (
    DivergenceGradients,
    DivergenceInputs,
    DivergenceNeeds,
    DivergenceSaved,
)
from fused_losses.primitives.divergence.rules import DIVERGENCES
from fused_losses.primitives.maxsim import triton as triton_maxsim
from fused_losses.primitives.maxsim.inputs import MaxsimInputs, MaxsimNeeds
from fused_losses.primitives.pairs import triton as triton_pairs
from fused_losses.primitives.pairs.inputs import PairInputs, PairNeeds, Rule
from fused_losses.primitives.row_statistics import triton
from fused_losses.primitives.row_statistics.inputs import Inputs, Needs, RowGradients
from fused_losses.primitives.topk import triton as triton_topk

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def unit_rows(d: int, dtype: torch.dtype, n: int = 1024) -> None:
    x = empty(n, d, dtype=dtype)
    triton_unit_rows.forward(x)
    triton_unit_rows.backward(x, x)


def target_loss(beyond_pi: str | None, n: int = 1024, mean: bool = True) -> None:
    labels, wide = empty(n, dtype=torch.int64), empty(n, dtype=torch.float64)
    for dtype in (torch.int64, torch.int32):
        triton_target_loss.label_names(labels, 1000, -100, dtype)
    moved = None if beyond_pi is None else MovedTarget(0.5, 0.1, beyond_pi)
    triton_target_loss.losses(wide, wide, labels, TargetEnd(64.0, moved, mean))


def row_statistics(
    d: int,
    dtype: torch.dtype,
    precision: str = "fp32",
    normalize: bool = True,
    extra: bool = False,  # bias and weights
    classes: int = 0,
    bent: bool = False,  # scores; with classes compact gradients, too
    n: int = 1024,
    c: int = 1_000_000,
) -> None:
    labels = empty(n, dtype=torch.int64)
    ids = empty(classes, dtype=torch.int64) if classes else None
    bias = empty(c, dtype=dtype) if extra else None
    weights = empty(c) if extra else None
    operands = empty(n, d), empty(c, d, dtype=dtype)  # x in float32, as the losses have it
    bend = empty(4, n) if bent else None
    inputs = Inputs(*operands, labels, ids, bias, weights, normalize, extra, precision, bend)
    triton.forward(inputs)
    grads = empty(n), empty(n), empty(n) if extra else None
    triton.backward(inputs, empty(n), RowGradients(*grads), Needs(True, True, extra, bent))


def class_rules(
    d: int,
    dtype: torch.dtype,
    precision: str = "fp32",
    rule: str = "softmax",
    bent: bool = False,
    centers: int = 1,
    softness: float = 0.0,
    many: int = 1,  # labels a row
    classes: int = 0,
    normalize: bool = True,
    n: int = 64,  # few: the labels' cosines are gathered step by step
    c: int = 1_000_000,
) -> None:
    fold = CLASS_FOLDS[rule]
    values = 4 * bent or min(fold.values)
    p = ClassInputs(
        empty(n, d),
        empty(c * centers, d, dtype=dtype),
        empty(n, many, dtype=torch.int64),
        empty(classes, dtype=torch.int64) if classes else None,
        empty(values, n) if values else None,
        rule,
        [2.0] * fold.params,
        centers,
        softness,
        normalize,
        precision,
    )
    out = triton_class_rules.forward(p)
    grads = empty(*out.statistics.shape), empty(*out.targets.shape), out.statistics
    triton_class_rules.backward(*grads, p, bool(classes), True, True)


def pairs(
    d: int,
    dtype: torch.dtype,
    precision: str = "fp32",
    reduction: str = "lse",
    cols: bool = False,
    triangle: bool = False,
    labels: bool = True,
    biases: bool = False,
    ids: bool = False,
    groups: bool = False,
    exclude: int = 0,
    windows: bool = False,
    root: bool = False,
    reach: float = float("inf"),
    skip_self: bool = False,
    apart: bool = False,
    attention: int = 0,  # width of the values; 0: statistics
    n: int = 4096,
    m: int = 8192,
) -> None:
    def sides(
        wanted: bool, *head: int, dtype: torch.dtype = FP32
    ) -> tuple[Tensor | None, Tensor | None]:
        both = empty(*head, n, dtype=dtype), empty(*head, m, dtype=dtype)
        return (both[0], None if triangle else both[1]) if wanted else (None, None)

    x = empty(n, d, dtype=dtype)
    p = PairInputs(
        x,
        x if triangle else empty(m, d, dtype=dtype),
        empty(dtype=torch.float64),
        *sides(biases),
        *sides(labels, dtype=torch.int32),
        *sides(ids, dtype=torch.int32),
        *sides(groups, dtype=torch.int32),
        empty(n, exclude, dtype=torch.int32) if exclude else None,
        *sides(windows, 4),
        score="root" if root else "linear",
        positive=Rule(-1.5, 0.25, reach),
        negative=Rule(2.0, 0.75, reach),
        skip_self=skip_self,
        triangle=triangle,
        apart=apart,
        precision=precision,
    )
    if not cols:
        p = p._replace(y_window=None)
    needs = PairNeeds(True, not triangle, True, biases, biases and not triangle)
    wide = dict(dtype=torch.float64)
    if attention:
        values = empty(m, attention, dtype=dtype)
        out, lse = triton_pairs.attention(values, p, labels)
        grads = empty(*out.shape), empty(n, **wide)
        triton_pairs.attention_backward(*grads, out, lse, values, p, labels, True, needs)
        return
    rows, columns = triton_pairs.statistics(p, reduction, cols)
    grads = empty(2, 2, n, **wide), empty(2, 2, columns.shape[-1], **wide)
    triton_pairs.statistics_backward(*grads, rows, columns, p, reduction, cols, needs)


def distances(
    kind: str, d: int, dtype: torch.dtype, precision: str = "fp32", n: int = 4096, m: int = 8192
) -> None:
    x, y = empty(n, d, dtype=dtype), empty(m, d, dtype=dtype)
    inputs = DistanceInputs(x, y, None, kind, 2.0, precision)
    out = triton_distances.forward(inputs)
    needs = DistanceNeeds(True, True, False)
    triton_distances.backward(empty(*out.shape), out, inputs, needs)


def topk(
    keep: int,
    d: int,
    dtype: torch.dtype,
    precision: str = "fp32",
    y_dtype: torch.dtype | None = None,
    everything: bool = False,  # multipliers, ids, exclusions
    match: str = "any",
    center: bool = False,
    n: int = 4096,
    m: int = 65536,
) -> None:
    def integers(wanted: bool, *shape: int) -> torch.Tensor | None:
        return empty(*shape, dtype=torch.int32) if wanted else None

    triton_topk.screen(
        empty(n, d, dtype=dtype),
        empty(m, d, dtype=y_dtype or dtype),
        empty(m),
        empty(m) if everything else None,
        keep,
        integers(match != "any", n),
        integers(match != "any", m),
        match,
        integers(everything, n),
        integers(everything, m),
        integers(everything, n, 3),
        everything,
        precision,
        empty(d) if center else None,
    )


def maxsim(
    d: int,
    dtype: torch.dtype,
    precision: str = "fp32",
    shape: tuple[int, int, int, int] = (64, 32, 64, 256),  # queries, tokens, documents, tokens
) -> None:
    query_count, query_length, count, length = shape
    inputs = MaxsimInputs(
        empty(query_count * query_length, d, dtype=dtype),
        empty(count * length, d, dtype=dtype),
        empty(query_count + 1, dtype=torch.int64),
        empty(count + 1, dtype=torch.int64),
        precision,
    )
    scores, index = triton_maxsim.forward(inputs)
    triton_maxsim.backward(empty(*scores.shape), index, inputs, MaxsimNeeds(True, True))


def divergence(
    d: int,
    dtype: torch.dtype,
    kind: str = "forward",
    precision: str = "fp32",
    normalize: bool = True,
    extra: bool = False,  # biases of both sides, and of dense scores a scale
    classes: int = 0,
    dense: bool = False,  # the teacher's scores are given
    teacher_d: int = 0,  # 0: d, and both sides may be near each other
    n: int = 1024,
    c: int = 1_000_000,
) -> None:
    """The gradients of both sides."""
    teacher_d = teacher_d or d
    rule, wide = DIVERGENCES[kind], dict(dtype=torch.float64)
    bias = empty(c, dtype=dtype) if extra else None
    p = DivergenceInputs(
        empty(n, d),  # rows in float32, as the losses have them
        empty(c, d, dtype=dtype),
        empty(n, c, dtype=dtype) if dense else empty(n, teacher_d),
        None if dense else empty(c, teacher_d, dtype=dtype),
        empty(n, dtype=torch.int64),
        empty(classes, dtype=torch.int64) if classes else None,
        bias,
        bias,
        empty(n) if dense and extra else None,
        normalize,
        normalize and not dense,
        kind,
        [0.5] * len(rule.params),
        precision,
    )
    triton_divergence.forward(p)
    row, folds = empty(n, **wide), empty(rule.folds, n, **wide)
    needs = DivergenceNeeds(False, True, True, True, not dense, extra, extra, dense and extra)
    grads = DivergenceGradients(row, row, row, row, folds)
    triton_divergence.backward(p, DivergenceSaved(row, row, folds), grads, needs)

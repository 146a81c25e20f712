"""What the roofline is of: every operation at the shapes that matter, on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_losses.backends.gpu.device import ceil_div
from fused_losses.bench.roofline.class_ops import class_rule_op, divergence_op
from fused_losses.bench.roofline.operation import (
    BF16,
    FP32,
    HostCode,
    Operation,
    bytes_of,
    empty,
    plain_backward,
    short,
)
from fused_losses.primitives.distances import cuda as cuda_distances
from fused_losses.primitives.distances import triton as triton_distances
from fused_losses.primitives.distances.inputs import DistanceInputs, DistanceNeeds
from fused_losses.primitives.maxsim import cuda as cuda_maxsim
from fused_losses.primitives.maxsim import triton as triton_maxsim
from fused_losses.primitives.maxsim.inputs import MaxsimInputs, MaxsimNeeds
from fused_losses.primitives.pairs import cuda as cuda_pairs
from fused_losses.primitives.pairs import triton as triton_pairs
from fused_losses.primitives.pairs.inputs import PairInputs, PairNeeds
from fused_losses.primitives.row_statistics import cuda, triton
from fused_losses.primitives.row_statistics.inputs import Inputs, Needs, RowGradients
from fused_losses.primitives.row_update import cuda as cuda_row_update
from fused_losses.primitives.row_update.inputs import Sgd
from fused_losses.primitives.topk import cuda as cuda_topk
from fused_losses.primitives.topk import triton as triton_topk
from fused_losses.primitives.topk.inputs import TopkInputs


def rows_op(
    name: str, n: int, c: int, d: int, normalize: bool, margin: bool, dtype: torch.dtype = BF16
) -> Iterator[Operation]:
    x, w, labels = empty(n, d, dtype=dtype), empty(c, d, dtype=dtype), empty(n, dtype=torch.int64)
    inputs = Inputs(x, w, labels, normalize=normalize)
    shape = f"B={n:,} C={c:,} D={d} {short(dtype)}"

    lse, grads = empty(n), RowGradients(empty(n), empty(n), None)

    def backward(module: Any) -> HostCode:
        return lambda: module.backward(inputs, lse, grads, Needs(True, True, False))

    def plain(a: Tensor = x, b: Tensor = w) -> Tensor:
        if normalize:
            a, b = F.normalize(a), F.normalize(b)
        z = a @ b.T
        if margin:
            target = z.gather(1, labels[:, None])
            z = z.scatter(1, labels[:, None], torch.cos(torch.acos(target) + 0.5)) * 64.0
        return F.cross_entropy(z.float(), labels)

    modules = {"triton": triton, "cuda": cuda}
    sides = bytes_of(x, w)
    yield Operation(
        name,
        "forward",
        shape,
        sides + 8 * n,
        2 * n * c * d,
        {k: lambda m=m: m.forward(inputs) for k, m in modules.items()},
        plain,
    )
    yield Operation(
        name,
        "backward",
        shape,
        2 * sides + 12 * n,
        6 * n * c * d,
        {k: backward(m) for k, m in modules.items()},
        plain_backward(plain, x, w),
    )


def pairs_op(name: str, n: int, d: int, reduction: str, cols: bool) -> Iterator[Operation]:
    x, y = empty(n, d, dtype=BF16), empty(n, d, dtype=BF16)
    labels = empty(n, dtype=torch.int32)
    p = PairInputs(x, y, empty(dtype=torch.float64), x_labels=labels, y_labels=labels)
    other, wide = n if cols else 0, torch.float64
    stats = empty(4, 2, n, dtype=wide), empty(4, 2, other, dtype=wide)
    grads = empty(2, 2, n, dtype=wide), empty(2, 2, other, dtype=wide)
    needs = PairNeeds(True, True, True, False, False)
    modules = {"triton": triton_pairs, "cuda": cuda_pairs}

    def backward(m: Any) -> HostCode:
        return lambda: m.statistics_backward(*grads, *stats, p, reduction, cols, needs)

    def plain(x: Tensor = x, y: Tensor = y) -> Tensor:
        z = x @ y.T * 10.0
        if reduction == "softplus":
            sign = 2 * torch.eye(n, device="meta", dtype=z.dtype) - 1
            return -F.logsigmoid(z * sign).sum()
        labels = torch.arange(n, device="meta")
        return F.cross_entropy(z.float(), labels) + F.cross_entropy(z.float().T, labels)

    shape = f"N={n:,} D={d} bf16"
    sides = bytes_of(x, y)
    forward = {k: lambda m=m: m.statistics(p, reduction, cols) for k, m in modules.items()}
    yield Operation(name, "forward", shape, sides + 8 * n, 2 * n * n * d, forward, plain)
    yield Operation(
        name,
        "backward",
        shape,
        2 * sides + 8 * n,
        6 * n * n * d,
        {k: backward(m) for k, m in modules.items()},
        plain_backward(plain, x, y),
    )


def attention_op(n: int, d: int, width: int) -> Iterator[Operation]:
    x, y = empty(n, d, dtype=BF16), empty(n, d, dtype=BF16)
    values = empty(n, width, dtype=BF16)
    p = PairInputs(x, y, empty(dtype=torch.float64))
    grads = empty(n, width), empty(n, dtype=torch.float64)
    needs = PairNeeds(True, True, True, False, False)
    modules = {"triton": triton_pairs, "cuda": cuda_pairs}

    def backward(m: Any) -> HostCode:
        kept = empty(n, width), empty(n, dtype=torch.float64)
        return lambda: m.attention_backward(*grads, *kept, values, p, False, True, needs)

    def plain(x: Tensor = x, y: Tensor = y, values: Tensor = values) -> Tensor:
        return (torch.softmax((x @ y.T * 10.0).float(), 1).to(BF16) @ values).float().sum()

    shape = f"N={n:,} D={d} values {width} bf16"
    sides = bytes_of(x, y, values)
    forward = {k: lambda m=m: m.attention(values, p, False) for k, m in modules.items()}
    out, pairs = 4 * n * width, n * n
    yield Operation(
        "pair_attention", "forward", shape, sides + out, 2 * pairs * (d + width), forward, plain
    )
    yield Operation(
        "pair_attention",
        "backward",
        shape,
        2 * sides + out,
        2 * pairs * (3 * d + 2 * width),
        {k: backward(m) for k, m in modules.items()},
        plain_backward(plain, x, y, values),
    )


def topk_op(
    name: str, n: int, m: int, d: int, k: int, match: str, dtype: torch.dtype
) -> Iterator[Operation]:
    """The screen: its candidates' exact scores are n k rows, and left out."""
    x, y, offset = empty(n, d, dtype=dtype), empty(m, d, dtype=dtype), empty(m)
    own_labels, bank_labels = (
        empty(rows, dtype=torch.int32, below=ceil_div(n, 4)) for rows in (n, m)
    )
    labels = own_labels, bank_labels
    keep = min(m, k + max(16, k // 2))

    def own() -> None:
        for kind in ("different", "same") if match == "both" else (match,):
            triton_topk.screen(
                x, y, offset, None, keep, *labels, kind, None, None, None, False, "fp32"
            )

    def plain() -> list[Tensor]:
        if match == "both":
            gap = torch.cdist(x, x).square()
            same = labels[0][:, None] == labels[1]
            return [gap.where(same, 0.0).max(1)[0], gap.where(~same, torch.inf).min(1)[0]]
        return [(x @ y.T).topk(k)[0]]

    def cuda() -> None:
        p = TopkInputs(
            x, y, x_labels=labels[0], y_labels=labels[1], kind="dot", k=k, match="different"
        )
        for kind in ("different", "same") if match == "both" else (match,):
            cuda_topk.screened(p._replace(match=kind))

    times = 2 if match == "both" else 1
    sides = bytes_of(x) if match == "both" else bytes_of(x, y)
    yield Operation(
        name,
        "forward",
        f"N={n:,} M={m:,} D={d} k={k} {short(dtype)}",
        sides + 12 * n * k * times,
        2 * n * m * d,
        {"triton": own, "cuda": cuda},
        plain,
    )


def distance_op(n: int, d: int, kind: str) -> Iterator[Operation]:
    x, y = empty(n, d), empty(n, d)
    modules = {"triton": triton_distances, "cuda": cuda_distances}
    if kind == "cityblock":
        del modules["triton"]
    # a matrix of distances, none of which is near 0
    grad, out = empty(n, n), empty(n, n, around=10 + (2 * d) ** 0.5)
    inputs, needs = DistanceInputs(x, y, None, kind, 1.0), DistanceNeeds(True, True, False)

    def backward(m: Any) -> HostCode:
        return lambda: m.backward(grad, out, inputs, needs)

    def plain() -> Tensor:
        return torch.cdist(x, y, 1.0 if kind == "cityblock" else 2.0)

    shape = f"N={n:,} D={d} fp32"
    product = kind != "cityblock"
    yield Operation(
        kind,
        "forward",
        shape,
        bytes_of(x, y, out),
        2 * n * n * d * product,
        {k: lambda m=m: m.forward(inputs) for k, m in modules.items()},
        plain,
    )
    yield Operation(
        kind,
        "backward",
        shape,
        2 * bytes_of(x, y) + bytes_of(grad) * (2 if product else 1),
        4 * n * n * d * product,
        {k: backward(m) for k, m in modules.items()},
    )


def maxsim_op(queries: int, documents: int, lq: int, ld: int, d: int) -> Iterator[Operation]:
    x, y = empty(queries * lq, d, dtype=BF16), empty(documents * ld, d, dtype=BF16)
    offsets = (
        empty(queries + 1, dtype=torch.int64, step=lq),
        empty(documents + 1, dtype=torch.int64, step=ld),
    )
    inputs = MaxsimInputs(x, y, *offsets)
    scores = empty(queries, documents)
    index = empty(queries * lq, documents, dtype=torch.int32, below=ld)
    modules = {"triton": triton_maxsim, "cuda": cuda_maxsim}

    def backward(m: Any) -> HostCode:
        return lambda: m.backward(scores, index, inputs, MaxsimNeeds(True, True))

    def plain(x: Tensor = x, y: Tensor = y) -> Tensor:
        z = x @ y.T
        return z.view(queries, lq, documents, ld).amax(3).float().sum(1)

    shape = f"{queries} x {lq} against {documents} x {ld} tokens, D={d} bf16"
    forward = {k: lambda m=m: m.forward(inputs) for k, m in modules.items()}
    sides = bytes_of(x, y)
    flops = 2 * x.shape[0] * y.shape[0] * d
    yield Operation(
        "maxsim", "forward", shape, sides + bytes_of(scores, index), flops, forward, plain
    )
    yield Operation(
        "maxsim",
        "backward",
        shape,
        2 * sides + bytes_of(scores, index),
        0,
        {k: backward(m) for k, m in modules.items()},
        plain_backward(lambda x, y: plain(x, y).sum(), x, y),
    )


def update_op(table: int, count: int, d: int) -> Iterator[Operation]:
    """sgd with momentum on the rows that took part."""
    weight, momentum = empty(table, d), empty(table, d)
    grad, rows = empty(count, d), empty(count, dtype=torch.int64)

    def own() -> None:
        cuda_row_update.run(
            Sgd(weight, rows, grad, momentum, None, 0.1, 0.9, 0.0, 0.0, False, False)
        )

    def plain() -> None:
        step = momentum[rows].mul(0.9).add(grad)
        momentum.index_copy_(0, rows, step)
        weight.index_copy_(0, rows, weight[rows].sub(step, alpha=0.1))

    floor = 5 * bytes_of(grad) + bytes_of(rows)
    shape = f"{count:,} rows of D={d} fp32"
    yield Operation("sgd_rows", "forward", shape, floor, 0, {"cuda": own}, plain)


_margin_softmax = partial(rows_op, "margin_softmax", normalize=True, margin=True)
_linear_cross_entropy = partial(rows_op, "linear_cross_entropy", normalize=False, margin=False)
_info_nce = partial(pairs_op, "info_nce", reduction="lse", cols=True)
_sigmoid = partial(pairs_op, "sigmoid", reduction="softplus", cols=False)
_neighbours = partial(topk_op, "topk", match="any", dtype=BF16)
_batch_hard = partial(topk_op, "batch_hard", match="both", dtype=FP32)
_euclidean = partial(distance_op, kind="euclidean")
_cityblock = partial(distance_op, kind="cityblock")


class OpSizes(NamedTuple):
    """An operation's table at its sizes, and at some that interpreted kernels do in no time."""

    make: Callable[..., Iterator[Operation]]
    sizes: tuple[int, ...]
    tiny: tuple[int, ...]


TABLE = (
    OpSizes(_margin_softmax, (1024, 1_000_000, 512), (16, 40, 16)),
    OpSizes(_linear_cross_entropy, (8192, 131_072, 1024), (16, 40, 16)),
    OpSizes(divergence_op, (1024, 131_072, 512), (16, 40, 16)),
    OpSizes(class_rule_op, (1024, 1_000_000, 512), (16, 40, 16)),
    OpSizes(_info_nce, (32_768, 512), (16, 16)),
    OpSizes(_sigmoid, (32_768, 512), (16, 16)),
    OpSizes(attention_op, (16_384, 512, 512), (16, 16, 16)),
    OpSizes(_neighbours, (1024, 1_000_000, 256, 10), (16, 40, 16, 2)),
    OpSizes(_batch_hard, (8192, 8192, 128, 1), (16, 16, 16, 1)),
    OpSizes(_euclidean, (8192, 512), (16, 16)),
    OpSizes(_cityblock, (4096, 128), (16, 16)),
    OpSizes(maxsim_op, (64, 64, 32, 256, 128), (2, 3, 4, 5, 16)),
    OpSizes(update_op, (1_000_000, 65_536, 512), (40, 16, 16)),
)


@cache
def ops() -> tuple[Operation, ...]:
    return tuple(op for entry in TABLE for op in entry.make(*entry.sizes))

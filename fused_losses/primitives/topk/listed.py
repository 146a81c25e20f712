"""The scores of listed pairs, with their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.blocks import runs
from fused_losses.base.numerics import ZERO_NORM, accumulate_dtype, row_dtype
from fused_losses.primitives.op import StreamedOp

LISTED_BYTES = 4 << 20  # of gathered rows alive at once
LIVE_BLOCKS = 8  # how many such at the peak, in backward


def listed(x: Tensor, y: Tensor, index: Tensor, kind: str, y_scale: Tensor | None = None) -> Tensor:
    """The scores of listed pairs (i, index[i, l]), differentiable in x and y. [N, k]

    kind: "dot", "cosine" or "sqeuclidean"; NaN where the index is negative, with gradient 0. y in
    int8 goes with its y_scale [M]. Sums in float64 where the device has it. Time O(N k D), memory
    O(N k) and a block.
    """
    return LISTED("bounded", x, y, y_scale, index, kind)


def _rows_at_once(index: Tensor, d: int) -> int:
    return max(1, LISTED_BYTES // (max(1, index.shape[1]) * max(d, 1) * 8))


def _gathered(y: Tensor, y_scale: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of y, zero where the index is negative. [n, k, D]"""
    if y.shape[0] == 0:
        return torch.zeros((*index.shape, y.shape[1]), dtype=dtype, device=y.device)
    at = index.clamp_min(0)
    rows = y[at].to(dtype)
    if y_scale is not None:
        rows = rows * y_scale[at, None].to(dtype)
    # what a masked pair holds must not reach the sums, not even as 0 * inf
    return torch.where(index[..., None] < 0, 0, rows)


def _inverse_norms(x: Tensor) -> Tensor:
    """1 / |x|, 0 for a zero row."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    alive = ~(norm <= ZERO_NORM)
    return torch.where(alive, 1 / torch.where(alive, norm, 1), 0)


def scores_of(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """x [n, D] against its own rows y [n, k, D] -> [n, k]; the same bits for equal rows of y."""
    if kind == "sqeuclidean":
        return (x[:, None] - y).square().sum(dim=-1)
    product = (x[:, None] * y).sum(dim=-1)
    if kind == "dot":
        return product
    return _cosine(product, x.square().sum(dim=-1)[:, None], y.square().sum(dim=-1))


def _cosine(product: Tensor, x_square: Tensor, y_square: Tensor) -> Tensor:
    """Exactly 1 for equal rows, and the same for rows of integers in one direction.

    0 for a row of zeros; NaN for one with NaN or inf.
    """
    zero = (x_square.sqrt() <= ZERO_NORM) | (y_square.sqrt() <= ZERO_NORM)
    square = x_square * y_square
    size = (product.square() / square).sqrt()
    apart = product.abs() / x_square.sqrt() / y_square.sqrt()
    size = torch.where(square < 1e300, size, apart).clamp_max(1)
    return torch.where(zero, 0 * product, torch.where(product < 0, -size, size))


def listed_forward(
    x: Tensor, y: Tensor, y_scale: Tensor | None, index: Tensor, kind: str
) -> Tensor:
    dtype = row_dtype(x.device)
    out = x.new_empty(index.shape, dtype=dtype)
    step = _rows_at_once(index, x.shape[1])
    for rows in runs(x.shape[0], step):
        at = index[rows]
        exact = scores_of(x[rows].to(dtype), _gathered(y, y_scale, at, dtype), kind)
        out[rows] = torch.where(at < 0, torch.nan, exact)
    return out


def _listed_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    y_scale: Tensor | None,
    index: Tensor,
    kind: str,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    dtype = row_dtype(x.device)
    dx = torch.zeros_like(x) if need_x else x.new_empty(0)
    # sums of many rows of a narrow type would stall
    dy = torch.zeros_like(y, dtype=accumulate_dtype(y.dtype)) if need_y else y.new_empty(0)
    step = _rows_at_once(index, x.shape[1])
    for rows in runs(x.shape[0], step):
        at = index[rows]
        g = torch.where(at < 0, 0, grad[rows].to(dtype))[..., None]
        a, b = x[rows].to(dtype)[:, None], _gathered(y, y_scale, at, dtype)
        if kind == "sqeuclidean":
            da = 2 * g * (a - b)
            db = -da
        elif kind == "dot":
            da, db = g * b, g * a
        else:
            a_inverse, b_inverse = _inverse_norms(a)[..., None], _inverse_norms(b)[..., None]
            u, v = a * a_inverse, b * b_inverse
            cosine = (u * v).sum(dim=-1, keepdim=True)
            da, db = g * (v - cosine * u) * a_inverse, g * (u - cosine * v) * b_inverse
        if need_x:
            dx[rows] = da.sum(dim=1).to(x.dtype)
        if need_y and y.shape[0]:
            # a place of -1 adds 0 to the first row: to count the others a GPU would be waited for
            added = torch.where((at < 0)[..., None], 0, db)
            dy.index_add_(0, at.clamp_min(0).flatten(), added.to(dy.dtype).flatten(0, 1))
    return dx, dy.to(y.dtype)


def listed_workspace(x: Tensor, y: Tensor, index: Tensor, need_y: bool) -> int:
    """Bytes beyond inputs and outputs, at most; need_y: of a backward that y needs."""
    (n, d), k = x.shape, index.shape[1]
    block = min(n, _rows_at_once(index, d)) * k * d * 8
    summed = y.numel() * 4 if need_y and y.dtype.itemsize == 2 else 0
    return LIVE_BLOCKS * block + summed + 24 * n * k


class ListedPairsOp(StreamedOp):
    """`listed` as an op; on every device the same code."""

    name, primitive = "listed_pairs", "topk"
    schema = "(Tensor x, Tensor y, Tensor? y_scale, Tensor index, str kind) -> Tensor"
    backward_schema = (
        "(Tensor grad, Tensor x, Tensor y, Tensor? y_scale, Tensor index, str kind, bool need_x, "
        "bool need_y) -> (Tensor dx, Tensor dy)"
    )
    python_backends = ("bounded",)
    # the values of the listed pairs are this op's on every backend
    instead = "the indices, and values taken again of x and y[indices] in PyTorch"

    def forward(self, backend: str, *arguments: Any) -> Tensor:
        return listed_forward(*arguments)

    def backward(self, backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        return _listed_backward(*arguments)

    def setup_context(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.kind = inputs[4]

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        dx, dy = backward_op(grads[0].contiguous(), *ctx.saved_tensors, ctx.kind, *needed[:2])
        return dx if needed[0] else None, dy if needed[1] else None, None, None, None

    def fake_forward(self, x: Tensor, y: Tensor, y_scale: Any, index: Tensor, kind: str) -> Tensor:
        return x.new_empty(index.shape, dtype=row_dtype(x.device))

    def fake_backward(self, grad: Tensor, x: Tensor, y: Tensor, *rest: Any) -> tuple:
        need_x, need_y = rest[-2:]
        return x.new_empty(x.shape if need_x else 0), y.new_empty(y.shape if need_y else 0)

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        x, y, _, index, *_ = arguments[1:] if direction else arguments
        return listed_workspace(x, y, index, bool(direction) and arguments[-1])


LISTED = ListedPairsOp()
LISTED.define()

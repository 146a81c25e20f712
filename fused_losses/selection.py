"""The k best columns of each row, streamed: nearest neighbours, hard negatives, retrieval.

The primitive is `select`: scores <x, y>, their cosine or |x - y|^2. A product screens the pairs,
and whatever a bound on its rounding cannot rule out is scored again in float64: the answer is that
of the scores in float64 on every backend and at every precision of the screen, with ties going to
the lowest index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.numerics import ZERO_NORM, accumulate_dtype, row_dtype
from fused_losses.primitives.op import LIBRARY, PYTHON_BACKENDS, StreamedOp

KINDS = ("dot", "cosine", "sqeuclidean")
MATCHES = ("any", "same", "different")
SCREENS = ("auto", "fp32", "bf16")
LISTED_BYTES = 4 << 20  # of gathered rows alive at once


class QuantizedRows(NamedTuple):
    """Rows in int8: row j is scale[j] codes[j], and within error[j] of what it was made from."""

    codes: Tensor  # [M, D] int8
    scale: Tensor  # [M] float32
    error: Tensor  # [M] float32, Euclidean

    def dequantize(self) -> Tensor:
        """[M, D] float32."""
        return self.codes * self.scale[:, None]


def quantize_rows(y: Tensor, *, rows: int = 8_192) -> QuantizedRows:
    """Rounds rows [M, D] to int8, each with its own scale, a run of `rows` at a time.

    As `y` of `pairwise_topk` they are the bank itself; as `screen` they are read in the place of a
    larger bank, whose rows are then read for the few candidates only: the answer stays exact.
    Raises ValueError, TypeError unless y is a floating point matrix. Time O(M D).
    """
    validation.check_matrix("y", y, "[M, D]")
    m, d = y.shape
    codes = torch.empty((m, d), dtype=torch.int8, device=y.device)
    scale = torch.empty(m, dtype=torch.float32, device=y.device)
    error = torch.empty_like(scale)
    for i in range(0, m, rows):
        part = y[i : i + rows].to(row_dtype(y.device))
        step = (part.abs().amax(dim=1) / 127 if d else part.sum(dim=1)).float()
        wide = step.to(part.dtype)[:, None]
        code = torch.where(wide > 0, part / torch.where(wide > 0, wide, 1), 0).round()
        code = code.nan_to_num(0, 127, -127).clamp(-127, 127)
        codes[i : i + rows], scale[i : i + rows] = code.to(torch.int8), step
        # a bound must not be rounded down
        error[i : i + rows] = (part - code * wide).square().sum(dim=1).sqrt() * (1 + 1e-6)
    return QuantizedRows(codes, scale, error)


class TopkInputs(NamedTuple):
    """One call, in the order of the op's schema."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D], any floating point type, or int8 with y_scale
    y_scale: Tensor | None = None  # [M] float32
    codes: Tensor | None = None  # [M, D] int8, read in the place of y by the screen
    codes_scale: Tensor | None = None  # [M] float32
    codes_error: Tensor | None = None  # [M] float32
    x_labels: Tensor | None = None  # [N] int32
    y_labels: Tensor | None = None  # [M] int32
    x_ids: Tensor | None = None  # [N] int32; equal ids: the pair is left out
    y_ids: Tensor | None = None  # [M] int32
    exclude: Tensor | None = None  # [N, E] int32 columns left out, -1: none
    kind: str = "dot"
    k: int = 1
    largest: bool = True
    match: str = "any"
    skip_self: bool = False  # leave out i == j
    symmetric: bool = False  # y is x
    screen: str = "fp32"


SCHEMA = (
    "(Tensor x, Tensor y, Tensor? y_scale, Tensor? codes, Tensor? codes_scale, "
    "Tensor? codes_error, Tensor? x_labels, Tensor? y_labels, Tensor? x_ids, Tensor? y_ids, "
    "Tensor? exclude, str kind, int k, bool largest, str match, bool skip_self, bool symmetric, "
    "str screen) -> (Tensor keys, Tensor index)"
)


def select(inputs: TopkInputs, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The k best columns of each row: keys [N, k] float64 and indices [N, k] int64, no gradient.

    keys are <x, y>, the cosine or |x - y|^2, best first; where a row has fewer than k candidates
    the index is -1 and the key NaN. A pair whose score is NaN is no candidate. Time O(N M D), half
    for the kernels where symmetric with skip_self; memory O(N k) and a few blocks.
    """
    narrow = inputs.screen == "bf16"
    # a screen of float64 rows may be narrow, too: the answer is not
    dtype = torch.float32 if narrow else inputs.x.dtype
    name, _ = backends.choose(
        backend, inputs.x.device, dtype, "bf16" if narrow else "fp32", "topk", inputs.x.shape[1]
    )
    inputs = inputs._replace(x=inputs.x.detach(), y=inputs.y.detach())
    with torch.autocast(inputs.x.device.type, enabled=False):
        if name == "reference":
            return backends.flat("reference_topk").select(inputs)
        return getattr(torch.ops.fused_losses, f"pair_topk_{name}").default(*inputs)


def best_screen(x: Tensor, backend: str | None) -> str:
    """The fastest products to screen with that can run here."""
    refused = backends.reasons_against("cpu", x.device, torch.float32, "bf16")
    return "bf16" if backends.requested(backend) in ("auto", "cpu") and not refused else "fp32"


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    p = TopkInputs(*arguments)
    keys = p.x.new_empty((p.x.shape[0], p.k), dtype=row_dtype(p.x.device))
    return keys, torch.empty_like(keys, dtype=torch.int64)


def _python(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *a: backends.flat(f"{backend}_topk").select(TopkInputs(*a))


for _name in (*PYTHON_BACKENDS, *(() if backends.unavailable("cpu") else ("cpu",))):
    LIBRARY.define(f"pair_topk_{_name}{SCHEMA}")
    torch.library.register_fake(f"fused_losses::pair_topk_{_name}", _fake)
    if _name != "cpu":
        LIBRARY.impl(f"pair_topk_{_name}", _python(_name), "CompositeExplicitAutograd")


# ---- the chosen pairs' scores, with their gradient ----------------------------------------------


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


def _norms(x: Tensor) -> Tensor:
    """1 / |x|, 0 for a zero row."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    alive = ~(norm <= ZERO_NORM)
    return torch.where(alive, 1 / torch.where(alive, norm, 1), 0)


def scores_of(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """x [n, D] against its own rows y [n, k, D] -> [n, k]; the same bits for equal rows of y."""
    if kind == "sqeuclidean":
        return (x[:, None] - y).square().sum(dim=-1)
    product = (x[:, None] * y).sum(dim=-1)
    return product if kind == "dot" else product * _norms(x)[:, None] * _norms(y)


def listed_forward(
    x: Tensor, y: Tensor, y_scale: Tensor | None, index: Tensor, kind: str
) -> Tensor:
    dtype = row_dtype(x.device)
    out = x.new_empty(index.shape, dtype=dtype)
    step = _rows_at_once(index, x.shape[1])
    for i in range(0, x.shape[0], step):
        at = index[i : i + step]
        rows = scores_of(x[i : i + step].to(dtype), _gathered(y, y_scale, at, dtype), kind)
        out[i : i + step] = torch.where(at < 0, torch.nan, rows)
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
    for i in range(0, x.shape[0], step):
        at = index[i : i + step]
        g = torch.where(at < 0, 0, grad[i : i + step].to(dtype))[..., None]
        a, b = x[i : i + step].to(dtype)[:, None], _gathered(y, y_scale, at, dtype)
        if kind == "sqeuclidean":
            da = 2 * g * (a - b)
            db = -da
        elif kind == "dot":
            da, db = g * b, g * a
        else:
            a_inverse, b_inverse = _norms(a)[..., None], _norms(b)[..., None]
            u, v = a * a_inverse, b * b_inverse
            cosine = (u * v).sum(dim=-1, keepdim=True)
            da, db = g * (v - cosine * u) * a_inverse, g * (u - cosine * v) * b_inverse
        if need_x:
            dx[i : i + step] = da.sum(dim=1).to(x.dtype)
        if need_y:
            kept = at.flatten() >= 0
            dy.index_add_(0, at.flatten()[kept], db.to(dy.dtype).flatten(0, 1)[kept])
    return dx, dy.to(y.dtype)


def _listed_python(direction: str, backend: str, *arguments: Any) -> Any:
    return (_listed_backward if direction else listed_forward)(*arguments)


def _listed_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.kind = inputs[4]


def _listed_gradients(backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
    dx, dy = backward_op(grads[0].contiguous(), *ctx.saved_tensors, ctx.kind, *needed[:2])
    return dx if needed[0] else None, dy if needed[1] else None, None, None, None


LISTED = StreamedOp(
    name="listed_pairs",
    forward="(Tensor x, Tensor y, Tensor? y_scale, Tensor index, str kind) -> Tensor",
    backward=(
        "(Tensor grad, Tensor x, Tensor y, Tensor? y_scale, Tensor index, str kind, bool need_x, "
        "bool need_y) -> (Tensor dx, Tensor dy)"
    ),
    setup_context=_listed_setup,
    gradients=_listed_gradients,
    fake_forward=lambda x, y, y_scale, index, kind: x.new_empty(
        index.shape, dtype=row_dtype(x.device)
    ),
    fake_backward=lambda grad, x, y, y_scale, index, kind, need_x, need_y: (
        x.new_empty(x.shape if need_x else 0),
        y.new_empty(y.shape if need_y else 0),
    ),
    python=_listed_python,
    python_backends=("bounded",),
)
LISTED.define()

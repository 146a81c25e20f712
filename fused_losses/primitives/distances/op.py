"""The primitive of distances: every x_i against every y_j, by kind. [N, M]

    dot             <x, y>
    sqeuclidean     |x - y|^2             euclidean   |x - y|
    cityblock       sum |x - y|           minkowski   (sum |x - y|^p)^(1/p), p > 0
    chebyshev       max |x - y|
    canberra        sum w |x - y| / (|x| + |y|), 0/0 = 0, w [D] or None: 1
    braycurtis      sum |x - y| / sum |x + y|, 0/0 = 0
    jensenshannon   sqrt(1/2 sum [x log(x/m) + y log(y/m)]), m = (x + y)/2; 0 log 0 = 0
    kl              sum x log(x/y); x = 0: 0; y = 0 < x: inf
    hamming         sum w [x != y] / sum w
    jaccard         sum w [x != y] / sum w [x != 0 or y != 0], 0/0 = 0
    scaled          sqrt(sum_k w_jk (x_k - y_k)^2), w [M, D] >= 0

Other metrics are these of transformed rows (`pairwise.metrics`). The first three are made of
products; where |x|^2 + |y|^2 - 2<x, y> would cancel, the distance and its gradient are taken from
x - y itself, so that equal rows are at distance 0.

Where a kind has a kink the gradient is 0 (chebyshev: of the first coordinate that attains the
maximum; jensenshannon, kl: 0 for an entry that is 0; kl: 0 through a term that is inf), and at
distance 0 it is 0. A NaN in a row makes its distances NaN, and in jensenshannon and kl a negative
entry does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import plans, validation
from fused_losses.base.examples import EXACT, PRECISIONS, ROUNDED, ExampleInputs, examples
from fused_losses.base.numerics import (
    accumulate_dtype,
    common_factor,
    multiplied,
    no_autocast,
    traced,
)
from fused_losses.primitives.distances import bounded
from fused_losses.primitives.distances import reference as reference_distances
from fused_losses.primitives.distances.inputs import (
    BACKWARD,
    FLAT,
    FORWARD,
    KINDS,
    KINDS_OF,
    PRODUCTS,
    ROOTS,
    WEIGHTED,
    DistanceInputs,
    DistanceNeeds,
)
from fused_losses.primitives.op import StreamedOp, refused


def distance_matrix(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    w: Tensor | None = None,  # [D], or [M, D] for "scaled"
    *,
    kind: str,
    p: float = 2.0,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """The kind's matrix (module docstring), [N, M] float32, float64 for float64 inputs.

    Args:
        x, y: [N, D], [M, D] of one dtype, float32, bfloat16, float16 or float64; bool too for
            hamming and jaccard. They need not be contiguous.
        w: weights >= 0, for canberra, hamming, jaccard and scaled only.
        p: the exponent of minkowski.
        precision: of the products, where there are any; else it changes nothing.

    Differentiable in x, y and (canberra, scaled) w; dot, sqeuclidean and euclidean any number of
    times in x and y. hamming and jaccard have no gradient: the result needs none.
    Raises ValueError or TypeError for arguments that do not fit; RuntimeError where the backend
    cannot run the call; NotImplementedError for a second derivative of the other kinds.
    Time O(N M D); memory beyond inputs, result and their gradients O((N + M) D) plus a block.
    """
    _check(x, y, w, kind, p, precision)
    precision = precision if kind in PRODUCTS else "fp32"
    name, _ = choose(backend, x.device, x.dtype, precision, kind)
    dtype = accumulate_dtype(x.dtype)
    if x.shape[1] == 0:
        # no coordinate: every sum is 0, and so is every gradient
        return x.to(dtype).sum(dim=1)[:, None] + y.to(dtype).sum(dim=1)
    if w is not None:
        w = w.to(dtype)
    with no_autocast(x.device):
        x, y, factor = in_range(kind, x, y)
        if name == "reference":
            found = reference_distances.distance(kind, x, y, w, p)
        else:
            found = DISTANCE_MATRIX(name, x, y, w, kind, p, precision)
        return found if factor is None else found / factor


def in_range(kind: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows whose squares stay in range, if the kind is a root, and what they are multiplied by.

    None: by nothing, which is not asked where it would stop a GPU or a trace.
    """
    if kind not in ROOTS:
        return x, y, None
    factor = common_factor(x, y)
    asked = factor.device.type == "cpu" and not traced(x, y)
    if plans.explaining() or (asked and factor == 1):
        return x, y, None
    return *multiplied(factor, x, y), factor


def choose(
    backend: str | None, device: torch.device, dtype: torch.dtype, precision: str, kind: str
) -> tuple[str, dict[str, list[str]]]:
    """As `backends.choose`, of the backends that have this kind."""
    name = backends.requested(backend)
    has = KINDS_OF.get(name, KINDS)
    if kind not in has:
        raise RuntimeError(
            f"backend={name!r} cannot run kind {kind!r}: its kernels have {', '.join(has)}, which "
            "are made of products; use backend='auto', which takes the best path for this kind, "
            "or backend='bounded'"
        )
    precision = precision if kind in PRODUCTS else "fp32"
    return backends.choose(backend, device, dtype, precision, operation_of(kind))


def operation_of(kind: str) -> str:
    """What the dispatch table calls this kind."""
    return "distance_products" if kind in PRODUCTS else "distance_sums"


def _check(x: Tensor, y: Tensor, w: Tensor | None, kind: str, p: float, precision: str) -> None:
    validation.check_choice("kind", kind, KINDS)
    validation.check_choice("precision", precision, validation.PRECISIONS)
    for name, rows, shape in (("x", x, "[N, D]"), ("y", y, "[M, D]")):
        if kind in FLAT and isinstance(rows, Tensor) and rows.dtype == torch.bool:
            if rows.dim() != 2:
                raise ValueError(
                    f"{name}: expected two dimensions {shape}, got {validation.describe(rows)}"
                )
        else:
            validation.check_matrix(name, rows, shape)
    d = x.shape[1]
    validation.check_meeting(x, y)
    if kind == "minkowski" and not 0 < p < float("inf"):
        raise ValueError(f"p: expected a finite value > 0, got {p}")
    if kind == "scaled":
        if w is None:
            raise ValueError(
                f"w: expected weights [{y.shape[0]}, {d}] with kind='scaled', got None"
            )
        validation.check_matrix("w", w, "[M, D]")
        validation.check_device("x", x, "w", w)
        if w.shape != y.shape:
            raise ValueError(f"w: expected {tuple(y.shape)} as y, got {validation.describe(w)}")
    elif kind in WEIGHTED and w is not None:
        validation.check_vector("w", w, d, "one a coordinate", x)
    elif w is not None:
        raise ValueError(
            f"w: expected None with kind={kind!r} (weights are for {', '.join(WEIGHTED)}, "
            f"scaled), got {validation.describe(w)}"
        )


# ---- the op: autograd and registration ----------------------------------------------------------


class DistanceMatrixOp(StreamedOp):
    """A matrix of distances, with its gradient."""

    name, primitive = "distance_matrix", "distances"
    schema, backward_schema = FORWARD, BACKWARD

    def setup_context(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, y, w, *rest = inputs
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        if rest[0] in FLAT:
            ctx.mark_non_differentiable(output)
        else:
            ctx.save_for_backward(x, y, w, output)

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        if grads[0] is None or ctx.rest[0] in FLAT:
            return (None,) * 6
        x, y, w, out = ctx.saved_tensors
        needs = (needed[0], needed[1], needed[2] and w is not None)
        found = backward_op(grads[0], out, x, y, w, *ctx.rest, *needs)
        some = (g if need else None for g, need in zip(found, needs, strict=True))
        return (*some, None, None, None)

    def fake_forward(self, x: Tensor, y: Tensor, *_: Any) -> Tensor:
        return x.new_empty((x.shape[0], y.shape[0]), dtype=accumulate_dtype(x.dtype))

    def fake_backward(
        self, grad: Tensor, out: Tensor, x: Tensor, y: Tensor, w: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        return tuple(
            x.new_empty(0) if t is None or not need else t.new_empty(t.shape)
            for t, need in zip((x, y, w), rest[-3:], strict=True)
        )

    def setup_second(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        grad, out, x, y, _, kind, _, _, *needs = inputs
        ctx.kind, ctx.needs = kind, needs
        ctx.set_materialize_grads(False)
        if kind in PRODUCTS:
            ctx.save_for_backward(grad, out, x, y)

    def second(self, ctx: Any, *grads: Tensor | None) -> tuple:
        """The backward's own derivative, in PyTorch operations that autograd can follow."""
        if ctx.kind not in PRODUCTS:
            return refused(f"distance_matrix, kind={ctx.kind!r}")(ctx, *grads)
        ddx, ddy = (g if need else None for g, need in zip(grads[:2], ctx.needs[:2], strict=True))
        with no_autocast(ctx.saved_tensors[0].device):
            found = bounded.second(ddx, ddy, *ctx.saved_tensors, kind=ctx.kind)
        # grad, out, x, y, then w, kind, p, precision and the three needs
        return (*found, *(None,) * 7)

    def forward(self, backend: str, *arguments: Any) -> Tensor:
        return self.form(backend).forward(DistanceInputs(*arguments))

    def backward(self, backend: str, grad: Tensor, out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        p, needs = DistanceInputs(*rest[:-3]), DistanceNeeds(*rest[-3:])
        return self.form(backend).backward(grad, out, p, needs)

    def tangents(self, direction: str, arguments: tuple, moves: tuple, output: tuple) -> tuple:
        kind = arguments[5 if direction else 3]
        if kind in FLAT:
            return (None,)
        if not direction:
            dx, dy, dw = moves[:3]
            return (bounded.tangent(dx, dy, dw, output[0], DistanceInputs(*arguments)),)
        if kind not in PRODUCTS:
            name = f"distance_matrix, kind={kind!r}"
            return refused(name)(None)
        return super().tangents(direction, arguments, moves, output)

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        if not direction:
            return self.form(backend).workspace(DistanceInputs(*arguments), None)
        p, needs = DistanceInputs(*arguments[2:-3]), DistanceNeeds(*arguments[-3:])
        return self.form(backend).workspace(p, needs)


DISTANCE_MATRIX = DistanceMatrixOp()
DISTANCE_MATRIX.define()


def _entries(kind: str, t: ExampleInputs) -> tuple[Tensor, ...]:
    """Two matrices of what the kind is a distance of, and its weights."""
    if kind in ("jensenshannon", "kl"):
        x, y = t.x.abs() + 0.01, t.y.abs() + 0.01
        return tuple(s / s.sum(dim=1, keepdim=True) for s in (x, y))
    if kind in FLAT:
        return tuple(torch.where(s > 0, s.sign(), 0) for s in (t.x, t.y))
    return (t.x, t.y, t.w.detach().square()) if kind == "scaled" else (t.x, t.y)


for _kind in KINDS:
    examples(
        distance_matrix,
        lambda f, t, kind=_kind: f(*_entries(kind, t), p=3.0),
        {_kind: dict(kind=_kind)},
        name="distances",
        bound=EXACT if _kind in FLAT else ROUNDED,
        precisions=PRECISIONS if _kind in PRODUCTS else ("fp32",),
        not_on=() if _kind in PRODUCTS else ("triton",),
    )

"""Third-order attention: a softmax over pairs of keys, which never lie there at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import requested
from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import accumulate_dtype, merged, no_autocast, over_last
from fused_losses.base.validation import check_both, check_plain, number
from fused_losses.losses.scored_pairs import scored
from fused_losses.primitives.op import TangentFunction, duals, primals, refused, tangents_of
from fused_losses.primitives.opaque import OpaqueOp
from fused_losses.primitives.pairs.op import pair_attention
from fused_losses.similarity.attention import check_leading, check_values, one_by_one

TRILINEAR_ROWS = 4096  # of (query, first key) pairs that one sweep takes
# what has a second derivative: no backend, reference neither
SCORES = "scores written out in PyTorch, einsum('nd,jd,ld->njl', q, k1, k2)"


def trilinear_attention(
    q: Tensor,  # [..., N, D]
    k1: Tensor,  # [..., J, D]
    k2: Tensor,  # [..., L, D]
    v1: Tensor,  # [..., J, Dv]
    v2: Tensor,  # [..., L, Dv]
    scale: float | None = None,
    *,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Third-order attention: a softmax over pairs (j, l) of keys, values multiplied elementwise.

        out_i = sum_jl softmax_jl(scale sum_d q_id k1_jd k2_ld) (v1_j * v2_l)

    All of one dtype, leading dimensions alike. scale: None for 1 / sqrt(D). Returns [..., N, Dv] in
    v1's dtype. Differentiable once; a second derivative raises NotImplementedError.
    Raises ValueError, TypeError for bad arguments. Time O(N J L (D + Dv)), put J, the side that is
    looped over, on the smaller; memory O((N + J + L)(D + Dv)). Paper: Alman and Song, 2023.
    """
    check_plain(scale=scale)
    check_leading(("q", q), ("k1", k1), ("k2", k2), ("v1", v1), ("v2", v2))
    q, k2, v1, v2 = validation.in_one_dtype(k1, q, k2, v1, v2)
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1))
    number("scale", scale, q)
    given = (q, k1, k2, v1, v2)
    _check_item([t.new_empty(()).expand(t.shape[-2:]) for t in given], precision)

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out = _TRILINEAR(*tensors, float(scale), precision, requested(backend))
        return out, out.new_zeros(0)

    with no_autocast(q.device):
        return one_by_one(attend, q.shape[:-2], given, v1)[0]


def _check_item(item: list[Tensor], precision: str) -> None:
    """What holds of each item of the leading dimensions, of which there may be none."""
    q, k1, k2, v1, v2 = item
    for name, keys, rows in (("k1", k1, "J"), ("k2", k2, "L")):
        check_both("q", q, name, keys, precision, rows=rows)
        validation.check_same_dtype("q", q, name, keys)
    check_values("v1", v1, "k1", k1)
    check_values("v2", v2, "k2", k2)
    if v1.shape[1] != v2.shape[1]:
        raise ValueError(
            f"v2: expected [L, {v1.shape[1]}] to match v1, got {validation.describe(v2)}"
        )


def _trilinear_block(
    q: Tensor, k1: Tensor, k2: Tensor, v2: Tensor, scale: float, precision: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Attention over l for a few j: out [N, J', Dv] and lse [N, J']."""
    n = len(q)
    products = (q[:, None] * k1).flatten(0, 1)
    inputs = scored(products, k2, number("scale", scale, q), precision=precision)
    out, lse = pair_attention(v2.contiguous(), inputs, backend=backend)
    return out.unflatten(0, (n, len(k1))), lse.unflatten(0, (n, len(k1)))


class _Trilinear(torch.autograd.Function):
    """Blocks of first keys, merged online by their lse; the backward runs each block again."""

    @staticmethod
    def forward(
        q: Tensor,
        k1: Tensor,
        k2: Tensor,
        v1: Tensor,
        v2: Tensor,
        scale: float,
        precision: str,
        backend: str | None,
    ) -> Tensor:
        return _trilinear_forward(q, k1, k2, v1, v2, scale, precision, backend)[0].to(v1.dtype)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.rest = inputs[5:]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return *_TrilinearBackward.apply(grad, *ctx.saved_tensors, *ctx.rest), None, None, None

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None) -> Tensor:
        rest = ctx.rest

        def of(tensors: tuple, tangents: tuple, _: tuple) -> tuple:
            out = _trilinear_forward(*duals(tensors, tangents), *rest)[0]
            return tangents_of(out.to(tensors[3].dtype))

        given = *primals(ctx.saved_tensors), *tangents[:5]
        return TangentFunction.apply("trilinear_attention", of, 5, *given)[0]


class _TrilinearBackward(torch.autograd.Function):
    """The backward, where a second derivative is asked for: that is refused, not left out."""

    @staticmethod
    def forward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        with no_autocast(grad.device):
            return _trilinear_backward(grad, arguments[:5], *arguments[5:])

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        return refused("trilinear_attention", instead=SCORES)(ctx, *grads)


def _trilinear_backward(
    grad: Tensor,
    tensors: tuple[Tensor, ...],
    scale: float,
    precision: str,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k1, k2, v1 and v2."""
    rest = (scale, precision, backend)
    q, k1, k2, v1, v2 = tensors
    out, lse = _trilinear_forward(q, k1, k2, v1, v2, *rest)
    narrow = accumulate_dtype(q.dtype)
    grad = grad.to(narrow)
    shift = (grad * out).sum(dim=1, keepdim=True)
    totals = [torch.zeros_like(t, dtype=narrow) for t in tensors]
    dq, dk1, dk2, dv1, dv2 = totals
    for j in _blocks(q, k1):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k1[j], k2, v2)]
            a, b, c, v = leaves
            part, part_lse = _trilinear_block(a, b, c, v, *rest)
        weight = (part_lse.detach() - lse[:, None]).exp().to(narrow)
        mixed = part.detach() * grad[:, None]  # [N, J', Dv]
        dv1[j] = torch.einsum("nj,njv->jv", weight, mixed)
        v1_j = v1[j].to(narrow)
        to_part = weight[:, :, None] * grad[:, None] * v1_j
        to_lse = weight * ((mixed * v1_j).sum(dim=2) - shift)
        found = torch.autograd.grad((part, part_lse), leaves, (to_part, to_lse.to(part_lse.dtype)))
        for total, more in zip((dq, dk1[j], dk2, dv2), found, strict=True):
            total += more
    return tuple(t.to(g.dtype) for t, g in zip(totals, tensors, strict=True))


def _blocks(q: Tensor, k1: Tensor) -> list[slice]:
    step = max(1, TRILINEAR_ROWS // max(q.shape[0], 1))
    return [slice(j, min(j + step, k1.shape[0])) for j in range(0, k1.shape[0], step)]


@torch.no_grad()
def _trilinear_forward(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    scale: float,
    precision: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """out [N, Dv] in the accumulation dtype and lse [N] over all pairs of keys."""
    narrow = accumulate_dtype(q.dtype)
    out = q.new_zeros((q.shape[0], v1.shape[1]), dtype=narrow)
    lse = torch.full((q.shape[0],), -torch.inf, dtype=torch.float64, device=q.device)
    for j in _blocks(q, k1):
        part, part_lse = _trilinear_block(q, k1[j], k2, v2, scale, precision, backend)
        new = merged(lse, over_last(part_lse.to(lse.dtype)))
        shift = torch.where(new == -torch.inf, 0, new)
        weight = (part_lse - shift[:, None]).exp().to(narrow)
        more = torch.einsum("nj,njv->nv", weight, part * v1[j].to(narrow))
        out = out * (lse - shift).exp().to(narrow)[:, None] + more
        lse = new
    return out, torch.where(lse == -torch.inf, 0, lse)


_TRILINEAR = OpaqueOp(
    "trilinear_attention",
    "(Tensor q, Tensor k1, Tensor k2, Tensor v1, Tensor v2, float scale, str precision, "
    "str backend)",
    _Trilinear.apply,
    lambda q, k1, k2, v1, *_: v1.new_empty((q.shape[0], v1.shape[1])),
    SCORES,
)

examples(trilinear_attention, lambda f, t: f(t.x, t.few, t.z, t.few_values, t.w))

"""Third-order attention: a softmax over pairs of keys, which never lie there at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import choose, requested
from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import accumulate_dtype, merged, no_autocast, over_last
from fused_losses.base.validation import check_both, check_count, check_plain, number
from fused_losses.functions.scored_pairs import scored
from fused_losses.primitives.op import TangentFunction, duals, primals, refused, tangents_of
from fused_losses.primitives.opaque import OpaqueOp
from fused_losses.primitives.pairs.op import pair_attention
from fused_losses.similarity import trilinear_windows
from fused_losses.similarity.attention import check_leading, check_values, one_by_one
from fused_losses.similarity.trilinear_windows import ALL, CAUSAL

WITHIN = ("bounded", "reference")  # who has windows
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
    window: tuple[int | None, int | None] = (None, None),
    causal: bool = False,
    groups: int = 1,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Third-order attention: a softmax over pairs (j, l) of keys, values multiplied elementwise.

        out_i = sum_jl softmax_jl(scale sum_d q_id k1_jd k2_ld) (v1_j * v2_l)

    Args:
        q, k1, k2, v1, v2: of one dtype, leading dimensions alike (but for `groups`).
        scale: None for 1 / sqrt(D).
        window: (w1, w2), integers >= 1: query i meets the keys j with i - w1 < j <= i and l with
            i - w2 < l <= i, the convention of the public 2-simplicial kernels; None: no bound on
            that side. Row i of each tensor stands at place i. A query that meets nothing gets 0.
        causal: j <= i and l <= i, also on a side without a window.
        groups: so many neighbouring query heads share a head of keys and values: q is
            [..., groups * H, N, D] where these are [..., H, ., .].

    Returns [..., N, Dv] in v1's dtype. Differentiable once; a second derivative raises
    NotImplementedError. Within windows, in pure PyTorch on every device (precision "fp32").
    Raises ValueError, TypeError for bad arguments. Time O(N J L (D + Dv)), put J, the side that is
    looped over, on the smaller; within windows O(N w1 w2 (D + Dv)), the rest is not visited.
    Memory O((N + J + L)(D + Dv)) and a block. The same bits in every run on one number of threads.
    Papers: Alman and Song, 2023; Roy et al., Fast and
    Simplex: 2-Simplicial Attention in Triton, 2025 (windows, groups).
    """
    check_plain(scale=scale)
    check_count("groups", groups)
    first, second = _windows(window, causal)
    tensors = ("q", q), ("k1", k1), ("k2", k2), ("v1", v1), ("v2", v2)
    if groups > 1:
        q = _by_key_head(q, groups, k1)
        tensors = ("q", q), *tensors[1:]
    check_leading(*tensors)
    q, k2, v1, v2 = validation.in_one_dtype(k1, q, k2, v1, v2)
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1))
    number("scale", scale, q)
    given = (q, k1, k2, v1, v2)
    _check_item([t.new_empty(()).expand(t.shape[-2:]) for t in given], precision)
    name = requested(backend)
    if (first, second) != (ALL, ALL):
        name = _within_windows(name, k1, precision)
    rest = float(scale), first, second, int(groups), precision, name

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out = _TRILINEAR(*tensors, *rest)
        return out, out.new_zeros(0)

    with no_autocast(q.device):
        out = one_by_one(attend, q.shape[:-2], given, v1)[0]
    if groups > 1:
        out = out.unflatten(-2, (groups, out.shape[-2] // groups)).flatten(-4, -3)
    return out


def _windows(window: tuple[int | None, int | None], causal: bool) -> tuple[int, int]:
    """What a query sees of either side, as `trilinear_windows` says it."""
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window: expected (w1, w2), integers >= 1 or None, got {window!r}")
    for width in window:
        if width is not None:
            check_count("window", width)
    free = CAUSAL if causal else ALL
    first, second = (free if width is None else int(width) for width in window)
    return first, second


def _by_key_head(q: Tensor, groups: int, keys: Tensor) -> Tensor:
    """Query heads that share keys as further rows of one head: [..., H, groups N, D]"""
    if not isinstance(q, Tensor) or not isinstance(keys, Tensor):
        return q  # which is told where all tensors are looked at
    heads = keys.shape[-3] if keys.dim() > 2 else None
    if heads is None or q.dim() < 3 or q.shape[-3] != groups * heads:
        raise ValueError(
            f"q: expected [..., groups * H, N, D] with groups={groups} and k1 [..., H, J, D] "
            f"{tuple(keys.shape)}, got {validation.describe(q)}"
        )
    return q.unflatten(-3, (heads, groups)).flatten(-3, -2)


def _within_windows(name: str, keys: Tensor, precision: str) -> str:
    """Who runs where there are windows."""
    if name not in ("auto", *WITHIN):
        raise RuntimeError(
            f"backend={name!r} cannot run trilinear_attention within windows: its kernels know no "
            f"order of keys; use backend='auto', which takes 'bounded', or one of "
            f"{', '.join(WITHIN)}"
        )
    name = "bounded" if name == "auto" else name
    return choose(name, keys.device, keys.dtype, precision, "pairs", keys.shape[-1])[0]


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
    def forward(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, *rest: Any) -> Tensor:
        return _attended((q, k1, k2, v1, v2), *rest).to(v1.dtype)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.rest = inputs[5:]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        nothing = (None,) * len(ctx.rest)
        return *_TrilinearBackward.apply(grad, *ctx.saved_tensors, *ctx.rest), *nothing

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None) -> Tensor:
        rest = ctx.rest

        def of(tensors: tuple, tangents: tuple, _: tuple) -> tuple:
            out = _attended(tuple(duals(tensors, tangents)), *rest)
            return tangents_of(out.to(tensors[3].dtype))

        given = *primals(ctx.saved_tensors), *tangents[:5]
        return TangentFunction.apply("trilinear_attention", of, 5, *given)[0]


class _TrilinearBackward(torch.autograd.Function):
    """The backward, where a second derivative is asked for: that is refused, not left out."""

    @staticmethod
    def forward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        with no_autocast(grad.device):
            return _gradients(grad, arguments[:5], *arguments[5:])

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        return refused("trilinear_attention", instead=SCORES)(ctx, *grads)


def _attended(
    tensors: tuple[Tensor, ...],
    scale: float,
    first: int,
    second: int,
    groups: int,
    precision: str,
    backend: str,
) -> Tensor:
    """out [N, Dv] in the accumulation dtype."""
    if first == second == ALL:
        q, k1, k2, v1, v2 = tensors
        return _trilinear_forward(q, k1, k2, v1, v2, scale, precision, backend)[0]
    return trilinear_windows.forward(tensors, scale, first, second, groups)


def _gradients(
    grad: Tensor,
    tensors: tuple[Tensor, ...],
    scale: float,
    first: int,
    second: int,
    groups: int,
    precision: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of q, k1, k2, v1 and v2."""
    if first == second == ALL:
        return _trilinear_backward(grad, tensors, scale, precision, backend)
    return trilinear_windows.backward(grad, tensors, scale, first, second, groups)


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
    "(Tensor q, Tensor k1, Tensor k2, Tensor v1, Tensor v2, float scale, int first, int second, "
    "int groups, str precision, str backend)",
    _Trilinear.apply,
    lambda q, k1, k2, v1, *_: v1.new_empty((q.shape[0], v1.shape[1])),
    SCORES,
)

_GPU_AND_CPU = ("cpu", "triton", "cuda")
examples(trilinear_attention, lambda f, t: f(t.x, t.few, t.z, t.few_values, t.w))
examples(
    trilinear_attention,
    lambda f, t: f(t.x, t.few, t.z, t.few_values, t.w),
    {
        "windows": dict(window=(5, 3)),
        "one window": dict(window=(None, 4)),
        "causal": dict(window=(4, None), causal=True),
    },
    precisions=("fp32",),
    not_on=_GPU_AND_CPU,
)
# a head of keys, which two of queries share
examples(
    trilinear_attention,
    lambda f, t: f(
        torch.stack([t.x, t.x.flip(0)]),
        *(k[None] for k in (t.few, t.z, t.few_values, t.w)),
        groups=2,
    ),
    {"groups": {}},
)

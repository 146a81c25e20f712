"""`distance_matrix` on the CUDA C++ kernels: every kind, float32, bfloat16, float16 and bool rows.

Kinds that are sums over coordinates (`cuda_sums`) and those made of products (`cuda_products`).
Nothing of N x M is stored but the output, and nothing of N x D but gradients in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.primitives.distances.cuda_products import from_products, through_products
from fused_losses.primitives.distances.cuda_sums import (
    BLOCK,
    PARTIAL_BYTES,
    WITH_PAIRS,
    bits,
    sums,
    through_pairs,
    through_terms,
)
from fused_losses.primitives.distances.inputs import KINDS, PRODUCTS, DistanceInputs, DistanceNeeds


def workspace_bytes(n: int, m: int, d: int, dtype: torch.dtype, kind: str) -> int:
    """Peak memory of forward and backward beyond inputs, output and gradients, at most."""
    rows = n + m
    if kind in ("hamming", "jaccard"):
        # of bools words of bits, or with weights a copy in bfloat16
        return 2 * rows * d + 16 * rows if dtype == torch.bool else 4
    block = max(BLOCK.values())
    block = 4 * min(n, block) * min(m, block)
    wide = 0 if dtype == torch.float32 else 4 * rows * d
    if kind in PRODUCTS:
        # G, rows of a block that are widened, norms and sums, near tiles
        return block + wide + 8 * max(BLOCK.values()) * d + 20 * rows + block // 16 + n * m // 1024
    if kind in WITH_PAIRS:
        return block + wide
    return wide + max(PARTIAL_BYTES, 4 * max(n, m) * d)


def workspace(p: DistanceInputs, needs: DistanceNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward, which has fewer."""
    (n, d), m = p.x.shape, p.y.shape[0]
    return workspace_bytes(n, m, d, p.x.dtype, p.kind)


def forward(inputs: DistanceInputs) -> Tensor:
    """out [N, M] float32 of `fused_losses.primitives.distances`."""
    x, y, w, kind, p, precision = inputs
    kind = _simplified(kind, p)
    n, m, d = x.shape[0], y.shape[0], x.shape[1]
    if min(n, m, d) == 0:
        return torch.zeros((n, m), dtype=torch.float32, device=x.device)
    out = torch.empty((n, m), dtype=torch.float32, device=x.device)
    if x.dtype == torch.bool:
        if w is None:
            words = [bits(_rows(t)) for t in (x, y)]
            cuda_launch.launch(
                "distance_bits",
                x=words[0],
                y=words[1],
                out=out,
                n=n,
                m=m,
                d=d,
                width=words[0].shape[1],
                jaccard=kind == "jaccard",
            )
            return out
        # 0 and 1 are the same in any type
        x, y = x.to(torch.bfloat16), y.to(torch.bfloat16)
    x, y = _rows(x), _rows(y)
    if kind in PRODUCTS:
        from_products(x, y, out, kind, precision)
    else:
        sums(KINDS.index(kind), x, y, w, p, out)
    return out


def backward(
    grad: Tensor, out: Tensor, inputs: DistanceInputs, needs: DistanceNeeds
) -> tuple[Tensor, ...]:
    """dx, dy, dw; what is not needed is empty."""
    x, y, w, kind, p, precision = inputs
    kind = _simplified(kind, p)
    need_x, need_y, need_w = needs.x, needs.y, needs.w and w is not None
    asked = ((x, need_x), (y, need_y), (w, need_w))
    if min(x.shape[0], y.shape[0], x.shape[1]) == 0:
        return tuple(
            t.new_zeros(t.shape) if need and t is not None else x.new_empty(0) for t, need in asked
        )
    own, other = _rows(x), _rows(y)
    if kind in PRODUCTS:
        dx, dy = through_products(grad, out, own, other, kind, precision, need_x, need_y)
        dw = None
    elif kind in WITH_PAIRS:
        dx, dy = through_pairs(grad, out, own, other, kind, need_x, need_y)
        dw = None
    else:
        dx, dy, dw = through_terms(grad, out, own, other, w, kind, p, need_x, need_y, need_w)
    return tuple(
        x.new_empty(0) if g is None or t is None else g.to(t.dtype)
        for g, (t, _) in zip((dx, dy, dw), asked, strict=True)
    )


def _simplified(kind: str, p: float) -> str:
    """Minkowski's p = 1 and 2 have kernels of their own."""
    return {1.0: "cityblock", 2.0: "euclidean"}.get(p, kind) if kind == "minkowski" else kind


def _rows(t: Tensor) -> Tensor:
    """Rows whose elements are neighbours; the rows themselves may be any distance apart."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()

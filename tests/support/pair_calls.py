"""Calls of the primitive over pairs, and what they are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.primitives.pairs.inputs import PairInputs
from fused_losses.primitives.pairs.op import (
    pair_attention,
    pair_statistics,
)

TENSORS = ("x", "y", "scale", "x_bias", "y_bias")


def with_leaves(p: PairInputs, double: bool = False) -> tuple[PairInputs, dict[str, Tensor]]:
    """The same problem on leaves that need gradients, in float64 if so wanted."""
    wide = lambda t: t.double() if double and t is not None else t
    names = [k for k in TENSORS if getattr(p, k) is not None and not (p.triangle and k == "y")]
    leaves = {k: wide(getattr(p, k)).detach().clone().requires_grad_() for k in names}
    q = p._replace(**leaves, x_window=wide(p.x_window), y_window=wide(p.y_window))
    return (q._replace(y=q.x) if p.triangle else q), leaves


def statistics(p: PairInputs, reduction: str, cols: bool, backend: str, double: bool = False):
    """Statistics and the gradients of a random functional of them."""
    q, leaves = with_leaves(p, double)
    rows, columns = pair_statistics(q, reduction=reduction, cols=cols, backend=backend)
    generator = torch.Generator().manual_seed(0)
    total, found = 0, []
    for side in (rows, columns) if cols else (rows,):
        shape = side.value.shape
        finite = side.value.isfinite()
        draws = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        total = total + (torch.where(finite, side.value, 0) * draws[0]).sum()
        total = total + (side.total * draws[1] * 0.1).sum()
        found += [s.detach() for s in side]
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return found, dict(zip(leaves, gradients, strict=True))


def attention(p: PairInputs, positives: bool, backend: str, double: bool = False):
    q, leaves = with_leaves(p, double)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(p.y.shape[0], 37, generator=generator).to(p.x.dtype)
    values = (values.double() if double else values).requires_grad_()
    out, lse = pair_attention(values, q, positives=positives, backend=backend)
    draws = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    finite = lse.isfinite()
    total = (out * draws).sum() + (torch.where(finite, lse, 0) * draws[:, 0]).sum()
    leaves = {"values": values, **leaves}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [out.detach(), lse.detach()], dict(zip(leaves, gradients, strict=True))

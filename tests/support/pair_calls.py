"""Calls of the primitive over pairs, and what they are held to."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.memory_budget import Room
from fused_losses.primitives.pairs.inputs import PairInputs, Rule
from fused_losses.primitives.pairs.op import (
    pair_attention,
    pair_statistics,
)

RULES = (Rule(), Rule(-2.0, 0.3), Rule(0.0), Rule(3.0, 0.2, 1.1), Rule(-3.0, 0.5, 1.2))
SIZES = (1, 2, 7, 63, 64, 65, 191, 192, 193, 400)
TENSORS = ("x", "y", "scale", "x_bias", "y_bias")


def draw(seed: int, dtype: torch.dtype = torch.float64) -> tuple[PairInputs, str, bool]:
    """A random problem: its inputs, reduction and cols."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    on = lambda chance: pick.random() < chance
    triangle = on(0.3)
    n, d = pick.choice(SIZES), pick.choice((1, 3, 16, 33, 64, 130))
    m = n if triangle else pick.choice((1, 3, 64, 192, 250, 700, 1201))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    root, classes = on(0.3), pick.choice((1, 2, 5, 50))
    x = (torch.randn(n, d) * d**-0.5).to(dtype)
    y = x if triangle else (torch.randn(m, d) * d**-0.5).to(dtype)

    def integers(below: int) -> dict[str, Tensor]:
        def one(size: int) -> Tensor:
            return torch.randint(0, below, (size,), dtype=torch.int32)

        x_side = one(n).sort().values if on(0.5) else one(n)
        return dict(x=x_side, y=None if triangle else one(m))

    def window(size: int) -> Tensor:
        out = torch.tensor([-1e9, 1e9, -1e9, 1e9], dtype=wide)[:, None].repeat(1, size)
        middle = -8.0 if root else 0.0
        out[1], out[2] = torch.rand(size) * 4 - 2 + middle, torch.randn(size) + middle
        return out

    more: dict[str, Any] = {}
    for name, below, chance in (("labels", classes, 0.7), ("ids", 300, 0.3), ("groups", 2, 0.3)):
        if on(chance):
            drawn = integers(below)
            more |= {f"x_{name}": drawn["x"], f"y_{name}": drawn["y"]}
    if on(0.3) and not triangle:
        more["exclude"] = torch.randint(-1, m, (n, 3), dtype=torch.int32)
    if on(0.3) and dtype == torch.float64:
        # a rounded score may fall on the other side of a window
        more |= dict(x_window=window(n), y_window=None if triangle else window(m))
    if root or on(0.4):
        more["x_bias"] = torch.randn(n, dtype=wide) - (64 if root else 0)
    if on(0.4) and not triangle:
        more["y_bias"] = torch.randn(m, dtype=wide)
    scale = torch.tensor(pick.choice((1.0, 5.0, 30.0)), dtype=torch.float64)
    rules = dict(positive=pick.choice(RULES), negative=pick.choice(RULES))
    more |= rules | dict(score="root" if root else "linear", skip_self=on(0.2), triangle=triangle)
    reductions = ("lse", "lse", "softplus") + (("relu",) if dtype == torch.float64 else ())
    return PairInputs(x, y, scale, **more), pick.choice(reductions), on(0.6) and not triangle


def with_leaves(p: PairInputs, double: bool = False) -> tuple[PairInputs, dict[str, Tensor]]:
    """The same problem on leaves that need gradients, in float64 if so wanted."""
    wide = lambda t: t.double() if double and t is not None else t
    names = [k for k in TENSORS if getattr(p, k) is not None and not (p.triangle and k == "y")]
    leaves = {k: wide(getattr(p, k)).detach().clone().requires_grad_() for k in names}
    q = p._replace(**leaves, x_window=wide(p.x_window), y_window=wide(p.y_window))
    return (q._replace(y=q.x) if p.triangle else q), leaves


def statistics(
    p: PairInputs,
    reduction: str,
    cols: bool,
    backend: str,
    double: bool = False,
    room: Room | None = None,
):
    """Statistics and the gradients of a random functional of them."""
    q, leaves = with_leaves(p, double)
    how = dict(reduction=reduction, cols=cols, room=room, backend=backend)
    rows, columns = pair_statistics(q, **how)
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

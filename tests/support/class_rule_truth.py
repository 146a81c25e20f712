"""The class rules literally in float64, and how far roundings may take a call from them.

Bounds are roundings: a cosine is off by at most those of its products (`off`), a term by what that
moves it and the rule's own, a sum by one rounding an addend of a tile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.op import class_gradients, class_statistics

TILE = 384  # centres at most


@dataclasses.dataclass(frozen=True)
class Ruled:
    """A rule with its numbers: term s of cosines [N, M], literally, in float64."""

    rule: str
    params: tuple[float, ...]
    terms: Callable[[Tensor, Tensor | None], list[Tensor]]
    lse: tuple[bool, ...]
    own: float = 8.0  # units in the last place that a term takes beside those of the cosine
    values: int = 0


def _softmax(scale: float) -> Callable[[Tensor, Tensor | None], list[Tensor]]:
    return lambda c, v: [scale * c]


def _bent(c: Tensor, v: Tensor | None) -> list[Tensor]:
    assert v is not None
    t, p, q, r = v[:, :, None]
    return [16 * torch.where(c > t, p + q * c + r * c**2, c)]


def _sface(k: float, b: float) -> Callable[[Tensor, Tensor | None], list[Tensor]]:
    def terms(c: Tensor, v: Tensor | None) -> list[Tensor]:
        angle = torch.acos(c.detach().clamp(-1, 1))
        return [c / (1 + torch.exp(-k * (b - angle)))]

    return terms


def _sphereface2(
    r: float, m: float, t: float, through: bool
) -> Callable[[Tensor, Tensor | None], list[Tensor]]:
    def terms(c: Tensor, v: Tensor | None) -> list[Tensor]:
        assert v is not None
        g = 2 * ((c + 1) / 2).clamp_min(0) ** t - 1
        g = c + (g - c).detach() if through else g
        z = r * (g + m) + v[0][:, None]
        return [torch.logaddexp(z, torch.zeros_like(z)), 1 / (1 + torch.exp(-z))]

    return terms


RULES = {
    "softmax": Ruled("softmax", (64.0,), _softmax(64.0), (True,)),
    "softmax-bent": Ruled("softmax", (16.0,), _bent, (True,), values=4),
    "summed": Ruled(
        "summed_softmax", (10.0,), lambda c, v: _softmax(10.0)(c, v) * 2, (True, False)
    ),
    "summed-bent": Ruled(
        "summed_softmax", (16.0,), lambda c, v: _bent(c, v) * 2, (True, False), values=4
    ),
    # k times the angle's rounding
    "sface": Ruled("sface", (80.0, 1.23), _sface(80.0, 1.23), (False,), own=8 + 80 * 4),
    "sface-gentle": Ruled("sface", (5.0, 1.5), _sface(5.0, 1.5), (False,), own=8 + 5 * 4),
    # the scale times the roundings of 2 h^t - 1 + m
    "sphereface2": Ruled(
        "sphereface2",
        (40.0, 0.4, 3.0, 0.0),
        _sphereface2(40.0, 0.4, 3.0, False),
        (False, False),
        own=8 + 40 * 8,
        values=1,
    ),
    "sphereface2-through": Ruled(
        "sphereface2",
        (40.0, 0.4, 3.0, 1.0),
        _sphereface2(40.0, 0.4, 3.0, True),
        (False, False),
        own=8 + 40 * 8,
        values=1,
    ),
    "sphereface2-power": Ruled(
        "sphereface2",
        (20.0, 0.2, 2.6, 0.0),
        _sphereface2(20.0, 0.2, 2.6, False),
        (False, False),
        own=8 + 20 * 16,
        values=1,
    ),
    "sphereface2-linear": Ruled(
        "sphereface2",
        (4.0, 0.2, 1.0, 0.0),
        _sphereface2(4.0, 0.2, 1.0, False),
        (False, False),
        own=8 + 4 * 8,
        values=1,
    ),
}


def values_of(ruled: Ruled, n: int, dtype: torch.dtype) -> Tensor | None:
    """[R, n]: a bend that is whole in value and slope, or biases."""
    if ruled.values == 0:
        return None
    if ruled.values == 1:
        return torch.linspace(-3, 3, n, dtype=dtype)[None]
    t = torch.linspace(-0.4, 0.6, n, dtype=dtype)
    return torch.stack([t, t * t / 2, 1 - t, torch.full_like(t, 0.5)])


# ---- whole calls against float64 ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    centers: int
    softness: float
    n: int = 261  # past one block of rows
    d: int = 9
    classes: int = 0  # 0: past one tile of centres
    sampled: bool = False

    @property
    def count(self) -> int:
        return self.classes or (TILE // self.centers + 7)


SHAPES = {
    "one centre": Shape(1, 0.0),
    "classes": Shape(1, 0.0, sampled=True),
    "centres": Shape(3, 0.0, n=40),
    "soft": Shape(3, 0.1, n=40, sampled=True),
    "a class": Shape(2, 0.0, n=5, classes=1),
    "a tile": Shape(1, 0.0, n=3, classes=TILE),
    "two rows of sixteen": Shape(1, 0.0, n=32, d=65, classes=49),
}


def drawn(x: Tensor, w: Tensor) -> None:
    """As they are."""


def peaked(x: Tensor, w: Tensor) -> None:
    """Every other row is a centre: a cosine of 1."""
    x[::2] = w[torch.arange(0, len(x), 2) % len(w)].double().to(x)


def tied(x: Tensor, w: Tensor) -> None:
    """All centres of the even classes are one, and so are two classes."""
    w[: len(w) // 2] = w[0]


def zeros(x: Tensor, w: Tensor) -> None:
    """Rows of nothing on both sides."""
    x[::3] = 0
    w[::4] = 0


def wild(x: Tensor, w: Tensor) -> None:
    """Centres of all lengths."""
    w *= (torch.arange(len(w)) % 4 * 5 - 10.0).exp2()[:, None].to(w)


DATA = {f.__name__: f for f in (drawn, peaked, tied, zeros, wild)}


def made(ruled: Ruled, shape: Shape, data: str, dtype: torch.dtype) -> ClassInputs:
    k, c = shape.centers, shape.count
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape.n, shape.d, dtype=wide)
    w = torch.randn(c * k, shape.d).to(dtype)
    DATA[data](x, w)
    norm = x.norm(dim=1, keepdim=True)
    x = torch.where(norm > 0, x / norm, x)
    labels = torch.randint(0, c, (shape.n, 3))
    labels[:, 2] = labels[:, 0]  # counts twice
    labels[1::4, 1] = -1
    labels[2::8] = -1
    classes = None
    if shape.sampled:
        classes = torch.unique(torch.cat([labels[labels >= 0], torch.arange(0, c, 2)]))
    return ClassInputs(
        x, w, labels, classes, values_of(ruled, shape.n, wide), ruled.rule, ruled.params, k,
        shape.softness,
    )  # fmt: skip


@dataclasses.dataclass
class Truth:
    """What a call is to give, in float64, and how far roundings of eps may take it."""

    statistics: Tensor
    targets: Tensor
    dx: Tensor
    dw: Tensor
    room: Tensor  # of statistics
    room_dx: Tensor  # [N] in L2
    room_dw: Tensor  # [M K] in L2


def truth(ruled: Ruled, p: ClassInputs, up: Tensor, up_targets: Tensor, eps: float) -> Truth:
    """Dense, row against class; `eps` of the accumulation."""
    k, d = p.centers, p.x.shape[1]
    ids = torch.arange(len(p.weight) // k) if p.classes is None else p.classes
    x, w = p.x.double(), p.weight.double().unflatten(0, (-1, k))[ids]
    length = w.norm(dim=-1, keepdim=True)
    unit = torch.where(length > 0, w / torch.where(length > 0, length, 1), 0)
    values = None if p.values is None else p.values.double()
    products = torch.einsum("nd,jkd->njk", x, unit)
    # sums of d products, a norm of d squares, its root, inverse and two more
    off = eps * ((d + 4) * torch.einsum("nd,jkd->njk", x.abs(), unit.abs()) + 16).amax(dim=-1)
    if p.softness:
        share = torch.exp((products - products.amax(-1, True)) / p.softness)
        share = share / share.sum(-1, True)
        c = (share * products).sum(-1)
        spread = share * (1 + (products - c[..., None]) / p.softness)
        off = off * (1 + 2 / p.softness)
    else:
        best = products.argmax(dim=-1, keepdim=True)
        c = products.gather(-1, best)[..., 0]
        spread = torch.zeros_like(products).scatter_(-1, best, 1.0)
    place = [[(ids == y).nonzero().flatten().tolist() for y in row] for row in p.labels.tolist()]
    own = torch.zeros_like(c, dtype=torch.bool)
    for i, row in enumerate(place):
        for found in row:
            own[i, found] = True

    def folded(cosine: Tensor) -> list[Tensor]:
        return ruled.terms(cosine, values)

    statistics, room = [], []
    moved = [folded(c + side * off) for side in (-1, 1)]
    for s, still in enumerate(folded(c)):
        by = torch.stack([(m[s] - still).abs() for m in moved]).amax(dim=0)
        by = (by + ruled.own * eps * (1 + still.abs())).masked_fill(own, 0)
        lse = ruled.lse[s]
        value = still.masked_fill(own, -math.inf if lse else 0.0)
        value = torch.logsumexp(value, dim=1) if lse else value.sum(dim=1)
        statistics.append(value)
        sizes = still.abs().masked_fill(own, 0)
        room.append(
            by.amax(dim=1) + TILE * eps if lse else by.sum(dim=1) + TILE * eps * sizes.sum(dim=1)
        )
    stacked = torch.stack(statistics)
    safe = torch.where(stacked == -math.inf, 0, stacked)

    def slope(at: Tensor) -> Tensor:
        """G of the negatives at cosines, of the statistics as they are."""
        at = at.detach().requires_grad_()
        out = torch.zeros_like(at)
        for s, term in enumerate(folded(at)):
            (of,) = torch.autograd.grad(term.sum(), at, retain_graph=True)
            out = out + up[s][:, None] * of * (
                (term - safe[s][:, None]).exp().detach() if ruled.lse[s] else 1
            )
        return out.masked_fill(own, 0).detach()

    g = slope(c)
    change = torch.stack([(slope(c + side * off) - g).abs() for side in (-1, 1)]).amax(dim=0)
    rounding = (torch.stack(room).amax(dim=0)[:, None] + ruled.own * eps) * g.abs()
    rounding = rounding + eps * ruled.own * (up.abs().sum(dim=0)[:, None] * ~own)
    change = change + rounding
    for i, row in enumerate(place):
        for slot, found in enumerate(row):
            for j in found:
                g[i, j] += up_targets[i, slot]
    each = g[..., None] * spread
    near = (products - c[..., None]).abs() <= 2 * off[..., None]
    # of two centres that roundings cannot tell apart either may be the best one
    torn = (near.sum(dim=-1) > 1) & (torch.tensor(p.softness == 0))
    change = change + torn * g.abs() * 2
    of_centre = change[..., None] * spread.abs().clamp_min(torn[..., None].double())
    if p.softness:
        of_centre = of_centre + g.abs()[..., None] * 4 * (off / p.softness**2)[..., None]
    dx = torch.einsum("njk,jkd->nd", each, unit)
    along = (each * products).sum(dim=0)[..., None]
    back = torch.einsum("njk,nd->jkd", each, x) - along * unit
    scale = torch.where(length > 0, 1 / torch.where(length > 0, length, 1), 0)
    dw = torch.zeros_like(p.weight, dtype=torch.float64).unflatten(0, (-1, k))
    dw[ids] = back * scale
    sums = (each.abs() * (len(ids) * k + 8)).sum(dim=(1, 2)) * eps
    room_dx = of_centre.sum(dim=(1, 2)) + sums
    length_x = x.norm(dim=1)[:, None, None]
    room_dw = ((of_centre + each.abs() * (len(x) + 16) * eps) * length_x).sum(dim=0) * 2
    whole = torch.zeros(dw.shape[:2], dtype=torch.float64)
    whole[ids] = room_dw * scale[..., 0]
    targets = torch.zeros(p.labels.shape, dtype=torch.float64)
    for i, row in enumerate(place):
        for slot, found in enumerate(row):
            targets[i, slot] = c[i, found[0]] if found else 0
    return Truth(
        stacked, targets, dx, dw.flatten(0, 1), torch.stack(room), room_dx,
        whole.flatten(),
    )  # fmt: skip


def held_to_float64(ruled: Ruled, p: ClassInputs) -> None:
    found = class_statistics(p, backend="cpu")
    eps = torch.finfo(p.dtype).eps
    up = torch.randn(found.statistics.shape, dtype=torch.float64)
    up_targets = torch.randn(p.labels.shape, dtype=torch.float64)
    want = truth(ruled, p, up, up_targets, eps)
    torch.testing.assert_close(found.targets, want.targets, rtol=0.0, atol=1e-12)
    empty = want.statistics == -math.inf
    assert torch.equal(found.statistics == -math.inf, empty)
    apart = (found.statistics - want.statistics).abs()
    assert (apart[~empty] <= want.room[~empty]).all(), (apart / want.room).amax()
    dx, dw = class_gradients(p, found.statistics, up, up_targets, backend="cpu")
    apart = (dx.double() - want.dx).norm(dim=1)
    assert (apart <= want.room_dx + 1e-300).all(), (apart / want.room_dx).amax()
    kept = torch.finfo(dw.dtype).eps * want.dw.norm(dim=1)
    apart = (dw.double() - want.dw).norm(dim=1)
    tiny = torch.finfo(dw.dtype).tiny * 16  # of float16
    assert (apart <= want.room_dw + kept + tiny).all(), (apart / want.room_dw).amax()
    if p.classes is not None:
        some = class_gradients(
            p, found.statistics, up, up_targets, backend="cpu", compact=True, need_x=False
        )[1]
        rows = (p.classes[:, None] * p.centers + torch.arange(p.centers)).flatten()
        assert torch.equal(some, dw[rows])

"""Kernels over pairs whose scores are squared distances, on rows that cancel: against float64.

Truth: the formulas below with differences of all pairs, which share no code with the package.
Bounds, each a budget of roundings: |x - y|^2 of far pairs, made of products, is off by
(D / 8 + 16) u / share of itself, near ones by less; a softmax makes of an error of z the same
share of its weights; G and sums round to the type of their products.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, PairInputs, PairNeeds, Rule

STEP = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
INFINITY = float("inf")


@dataclass(frozen=True)
class Apart:
    """One call; data: what cancels in its rows."""

    data: str = "clusters"
    n: int = 37
    m: int = 43
    d: int = 24
    dtype: torch.dtype = torch.float32
    precision: str = "fp32"
    reduction: str = "lse"
    root: bool = False
    cols: bool = False
    triangle: bool = False
    labels: int = 0  # how many; 0: every pair is negative
    skip_self: bool = False
    exclude: int = 0
    bias: bool = False
    values: int = 0  # width of the values: attention

    @property
    def name(self) -> str:
        options = [f"{self.data}-{self.n}x{self.m}x{self.d}", str(self.dtype)[6:], self.reduction]
        options += [self.precision] if self.precision != "fp32" else []
        flags = ("root", "cols", "triangle", "labels", "skip_self", "exclude", "bias", "values")
        return "-".join([*options, *(flag for flag in flags if getattr(self, flag))])


def rows_of(case: Apart, g: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """x, y and a scale that makes scores of a few units of their near pairs."""
    n, m, d = case.n, case.m, case.d
    x, y = (torch.randn(count, d, generator=g, dtype=torch.float64) for count in (n, m))
    if case.data == "clusters":
        # each near a center far from the origin
        centers = 100 * torch.randn(2, d, generator=g, dtype=torch.float64).sign()
        size = 0.01 if case.dtype == torch.float32 else 4.0
        of_x, of_y = (torch.arange(count) % 2 for count in (n, m))
        return size * x + centers[of_x], size * y + centers[of_y], 1 / (d * size**2)
    # partners close by among others of unit norm, and some the same to the last bit
    x, y = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
    paired = min(n, m) if case.data == "partners" else 0
    gap = {torch.float32: 3e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[case.dtype]
    y[:paired] = x[:paired] + gap * y[:paired]
    y[: paired // 4] = x[: paired // 4]
    return x, y, 2.0


def inputs(case: Apart) -> tuple[PairInputs, Tensor]:
    g = torch.Generator().manual_seed(11)
    x, y, scale = rows_of(case, g)
    if case.triangle and case.data == "partners":
        x[case.n // 2 : 2 * (case.n // 2)] = y[: case.n // 2]
    x = x.to(case.dtype)
    y = x if case.triangle else y.to(case.dtype)
    m = y.shape[0]

    def integers(count: int, high: int) -> Tensor:
        return torch.randint(high, (count,), generator=g, dtype=torch.int32)

    labels = case.labels > 0
    p = PairInputs(
        x,
        y,
        torch.tensor(scale**2 if case.root else scale, dtype=torch.float64),
        x_bias=torch.randn(case.n, generator=g) if case.bias else None,
        y_bias=torch.randn(m, generator=g) if case.bias and not case.triangle else None,
        x_labels=integers(case.n, case.labels) if labels else None,
        y_labels=integers(m, case.labels) if labels and not case.triangle else None,
        exclude=integers(case.n * case.exclude, m).view(case.n, -1) if case.exclude else None,
        score="root" if case.root else "linear",
        positive=Rule(-0.75, 0.5),
        negative=Rule(1.25, 0.25),
        skip_self=case.skip_self,
        triangle=case.triangle,
        apart=True,
        precision=case.precision,
    )
    values = torch.randn(m, case.values, generator=g).to(case.dtype)
    return p, values


def biases(p: PairInputs) -> Tensor:
    """What is added to u, [N, M], [N, 1], [1, M] or []."""
    own, other = (p.x_bias, p.x_bias) if p.triangle else (p.x_bias, p.y_bias)
    if own is None or other is None:
        return torch.zeros((), dtype=torch.float64)
    return own.double()[:, None] + other.double()


def truth(p: PairInputs, leaves: list[Tensor]) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """u [N, M], z of each pair by its class, and which pairs the classes have."""
    x, y, scale = leaves
    u = -scale * (x[:, None, :] - y[None, :, :]).square().sum(-1) + biases(p)
    u.retain_grad()
    s = u
    if p.score == "root":
        positive = u < 0
        s = torch.where(positive, -torch.where(positive, -u, 1).sqrt(), 0)
    n, m = u.shape
    part = torch.ones(n, m, dtype=torch.bool)
    if p.triangle:
        part = part.triu(1)
    if p.skip_self:
        part &= torch.arange(n)[:, None] != torch.arange(m)[None, :]
    if p.exclude is not None:
        part[torch.arange(n)[:, None], p.exclude.long()] = False
    same = torch.zeros(n, m, dtype=torch.bool)
    if p.x_labels is not None:
        of_y = p.x_labels if p.triangle else p.y_labels
        assert of_y is not None
        same = p.x_labels[:, None] == of_y[None, :]
    z = torch.where(
        same,
        p.positive.factor * (s - p.positive.center),
        p.negative.factor * (s - p.negative.center),
    )
    return u, z, {POSITIVE: part & same, NEGATIVE: part & ~same}


def folded(z: Tensor, member: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Value and total of each row."""
    total = torch.where(member, z, 0).sum(1)
    if reduction != "lse":
        f = torch.nn.functional.softplus(z) if reduction == "softplus" else z.clamp_min(0)
        return torch.where(member, f, 0).sum(1), total
    none = ~member.any(1)
    value = torch.logsumexp(z.masked_fill(~member, -INFINITY).masked_fill(none[:, None], 0), 1)
    return torch.where(none, -INFINITY, value), total


def within(got: Tensor, want: Tensor, allowed: Tensor, what: str) -> None:
    got, want = got.double(), want.detach()
    finite = want.isfinite()
    assert torch.equal(got[~finite], want[~finite]), what
    if not finite.any():
        return
    excess = ((got - want)[finite].abs() / allowed.expand(want.shape)[finite]).max().item()
    assert excess <= 1, f"{what}: {excess:.3g} of what is allowed"


class Truth(NamedTuple):
    """Of one call: its pairs, and how far the terms of a kernel may be off."""

    z: Tensor  # [N, M]
    members: dict[int, Tensor]  # by class, which pairs
    error: Tensor  # of z


class Outcome(NamedTuple):
    """Outputs of the truth, their gradients, and the kernel's of x, y and scale."""

    wanted: list[Tensor]
    grads: list[Tensor]
    found: tuple


def check(case: Apart, backend: ModuleType) -> None:
    p, values = inputs(case)
    x, y, scale = (t.double().requires_grad_() for t in (p.x, p.y, p.scale))
    if case.triangle:
        y = x
    u, z, members = truth(p, [x, y, scale])
    rounded = case.precision != "fp32"
    share = 1 / 4 if rounded else 1 / 16
    operand = 2**-11 if case.precision == "tf32" else 2**-9 if rounded else 0
    # of |x - y|^2, whose terms are (|x|^2 + |y|^2) / share at most, and then of z
    of_square = ((case.d / 8 + 16) * 2**-24 + 2 * operand) / share
    # no rule's factor is above 1.25
    size = z.detach().abs() + 1.25 * biases(p).abs()
    error = of_square * size + 2**-22 * (1 + size)
    run = attention if case.values else statistics
    leaf = values.double().requires_grad_()
    wanted, grads, found = run(case, p, values, leaf, Truth(z, members, error), backend)
    total = torch.zeros((), dtype=torch.float64)
    for out, grad in zip(wanted, grads, strict=True):
        finite = out.isfinite()
        total = total + (out[finite] * grad[finite]).sum()
    dx, dy, dscale, g = torch.autograd.grad(total, (x, y, scale, u))
    # of G: its exponential, and the rounding of it and of what it is multiplied with
    low = torch.bfloat16 if case.precision in ("mixed", "bf16") else case.dtype
    step = max(STEP[low], operand)
    of_g = 4 * error.clamp_max(1) + 16 * step / share**0.5 + 4 * STEP[case.dtype]
    size = (x[:, None, :] - y[None, :, :]).norm(dim=-1).detach()
    spread = 2 * p.scale * g.abs() * size * of_g
    rows, columns = spread.sum(1), spread.sum(0)
    sides = [("dx", found[0], dx, rows + columns if case.triangle else rows)]
    if not case.triangle:
        sides.append(("dy", found[1], dy, columns))
    for name, got, want, allowed in sides:
        assert got.dtype == case.dtype
        # and the rounding of the result
        allowed = allowed + 2 * STEP[case.dtype] * want.norm(dim=1) + 1e-30
        within((got.double() - want).norm(dim=1), torch.zeros(len(want)), allowed, name)
    within(found[2], dscale, (g.abs() * size**2 * of_g).sum() + 1e-30, "dscale")


def statistics(
    case: Apart, p: PairInputs, _: Tensor, __: Tensor, exact: Truth, backend: ModuleType
) -> Outcome:
    got = backend.statistics(p, case.reduction, case.cols)
    sides = [exact]
    if case.triangle:
        upper = torch.ones_like(exact.z, dtype=torch.bool).triu(1)
        both = {kind: part | part.T for kind, part in exact.members.items()}
        z, error = (torch.where(upper, t, t.T) for t in (exact.z, exact.error))
        sides = [Truth(z, both, error)]
    elif case.cols:
        turned = {kind: part.T for kind, part in exact.members.items()}
        sides.append(Truth(exact.z.T, turned, exact.error.T))
    g = torch.Generator().manual_seed(12)
    wanted, grads = [], []
    for found, side in zip(got, sides, strict=False):
        rows = [folded(side.z, part, case.reduction) for part in side.members.values()]
        want = torch.stack([torch.stack(t) for t in zip(*rows, strict=True)])
        for kind, part in side.members.items():
            z = side.z.detach()
            shares = part.double()
            if case.reduction == "lse":
                shares = z.masked_fill(~part, -INFINITY).softmax(1).nan_to_num(0)
            # sums of a few dozen terms
            value = want[0, kind].detach()
            rounding = 2**-21 * (1 + value.masked_fill(~value.isfinite(), 0).abs())
            within(found[0, kind], value, (shares * side.error).sum(1) + rounding, "value")
            allowed = (part * (side.error + 2**-21 * z.abs())).sum(1) + 1e-30
            within(found[1, kind], want[1, kind], allowed, "total")
        wanted.append(want)
        grads.append(torch.randn(want.shape, generator=g, dtype=torch.float64))
    given = list(grads)
    if len(given) == 1:
        given.append(torch.zeros(2, 2, got[1].shape[-1], dtype=torch.float64))
    needs = PairNeeds(True, not case.triangle, True, False, False)
    found = backend.statistics_backward(*given, *got, p, case.reduction, case.cols, needs)
    return Outcome(wanted, grads, found)


def attention(
    case: Apart, p: PairInputs, values: Tensor, leaf: Tensor, exact: Truth, backend: ModuleType
) -> Outcome:
    out, lse = backend.attention(values, p, False)
    terms = exact.z.masked_fill(~exact.members[NEGATIVE], -INFINITY)
    weights = terms.softmax(1)
    want = [weights @ leaf, terms.logsumexp(1)]
    low = torch.bfloat16 if case.precision == "bf16" else case.dtype
    error = weights.detach() * (2 * exact.error + 8 * STEP[low] + 2**-20)
    within(out, want[0], error @ leaf.detach().abs() + 1e-30, "out")
    rounding = 2**-21 * (1 + want[1].detach().abs())
    within(lse, want[1], (weights.detach() * exact.error).sum(1) + rounding, "lse")
    g = torch.Generator().manual_seed(12)
    grads = [torch.randn(t.shape, generator=g, dtype=torch.float64).float() for t in want]
    needs = PairNeeds(True, True, True, False, False)
    found = backend.attention_backward(*grads, out, lse, values, p, False, True, needs)
    wide = [t.double() for t in grads]
    (dvalues,) = torch.autograd.grad((want[0] * wide[0]).sum(), leaf, retain_graph=True)
    allowed = (error / weights.clamp_min(1e-30) * weights).detach().T @ wide[0].abs()
    allowed = allowed + 2 * STEP[case.dtype] * dvalues.abs()
    # the gradient rounds to the values' type as the weights do
    allowed = allowed + weights.detach().T @ (4 * STEP[low] * wide[0].abs()) + 1e-30
    within(found[0], dvalues, allowed, "dvalues")
    return Outcome(want, wide, found[1:])


MANY = dict(cols=True, labels=4, exclude=2, skip_self=True)
BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    Apart(**MANY),
    Apart(n=70, m=90, root=True, cols=True, labels=3),
    Apart(triangle=True, labels=4, n=70),
    Apart(data="partners", triangle=True, labels=4, root=True, reduction="softplus"),
    Apart(data="partners", cols=True, labels=5),
    Apart(data="partners", root=True, reduction="relu", d=27),
    Apart(data="far", cols=True, labels=4),
    Apart(dtype=BF16, cols=True, labels=3),
    Apart(data="partners", dtype=FP16, root=True, labels=3),
    Apart(data="partners", dtype=BF16, triangle=True),
    *(Apart(data="partners", precision=p, cols=True) for p in ("tf32", "mixed", "bf16")),
    Apart(bias=True, **MANY),
    Apart(bias=True, triangle=True, labels=4),
    Apart(values=20),
    Apart(values=20, bias=True),
    Apart(data="partners", values=17, root=True, skip_self=True),
    Apart(data="partners", values=24, dtype=FP16),
    Apart(data="partners", values=24, precision="bf16"),
]

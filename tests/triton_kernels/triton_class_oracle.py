"""Folds over classes from their formulas, gradients by autograd: the Triton tests' truth."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton_oracle import product_of


@dataclass
class Case:
    """One call of the primitive, forward and backward."""

    n: int = 37
    c: int = 53
    d: int = 24
    dtype: torch.dtype = torch.float32
    precision: str = "fp32"
    normalize: bool = True
    rule: str = "softmax"
    params: tuple[float, ...] = (16.0,)
    bend: bool = False  # with a jump at the threshold
    centers: int = 1
    softness: float = 0.0
    many: int = 1  # labels a row
    classes: int = 0  # how many take part; 0 = all
    no_label: float = 0.1  # share of the labels that are -1
    strided: bool = False
    wide: bool = False  # x in float32 beside a weight in 16 bits, which has its values
    edit: str = ""
    seed: int = 0
    name: str = field(default="", compare=False)


class Call(NamedTuple):
    """The arguments of the op by name, and the gradients that come back."""

    args: dict[str, Any]
    of_statistics: Tensor
    of_targets: Tensor


def call(case: Case) -> Call:
    g = torch.Generator().manual_seed(case.seed)
    n, c, d, k = case.n, case.c, case.d, case.centers

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x = torch.nn.functional.normalize(randn(n, d))
    weight = randn(c, k, d) * (0.3 if case.normalize else d**-0.5)
    ids = None
    if case.classes:
        ids = torch.randperm(c, generator=g)[: case.classes].sort().values
    pool = torch.arange(c) if ids is None else ids
    labels = pool[torch.randint(len(pool), (n, case.many), generator=g)]
    labels[torch.rand(n, case.many, generator=g) < case.no_label] = -1
    if case.edit == "equal centres":
        weight[:, 1:] = weight[:, :1]
    if case.edit == "equal classes":
        weight[1::2] = weight[0]
    if case.edit == "zero row":
        weight[c // 2, k - 1] = 0
    if case.edit == "lengths":
        weight *= torch.exp2(torch.arange(c) % 9 - 4.0)[:, None, None]
    if case.edit == "peaked":  # a row is its label's first centre, or the opposite of another's
        rows = torch.nn.functional.normalize(weight[labels[:, 0].clamp_min(0), 0], dim=-1)
        x = torch.where((torch.arange(n) % 3 == 0)[:, None], -rows, rows)
    if case.edit == "twice":
        labels[:, -1] = labels[:, 0]
    if case.edit == "nan row":
        x[n // 3, d // 2] = torch.nan
    x, weight = x.to(case.dtype), weight.flatten(0, 1).to(case.dtype)
    if case.wide:
        x = x.float()
    if case.strided:
        wide = torch.zeros(n, d + 5, dtype=case.dtype)
        wide[:, 3 : d + 3] = x
        x, weight = wide[:, 3 : d + 3], weight.T.contiguous().T
    args: dict[str, Any] = dict(x=x, weight=weight, labels=labels, classes=ids, values=None)
    args |= dict(rule=case.rule, params=list(case.params), centers=k, softness=case.softness)
    args |= dict(normalize=case.normalize, precision=case.precision)
    if case.rule == "sphereface2":
        args["values"] = 0.3 * randn(1, n)
    if case.bend:
        args["values"] = bends(args, torch.rand(3, n, generator=g))
    sums = 2 if case.rule in ("summed_softmax", "sphereface2") else 1
    return Call(args, randn(sums, n).double(), randn(n, case.many).double())


def cosines(x: Tensor, weight: Tensor, normalize: bool, centers: int, softness: float) -> Tensor:
    """[N, C]; of equal centres the first has the gradient."""
    each = product_of(x, weight, normalize).unflatten(1, (-1, centers))
    if softness:
        return (torch.softmax(each / softness, dim=-1) * each).sum(dim=-1)
    best = each == each.amax(dim=-1, keepdim=True)
    return torch.where(best & (best.cumsum(dim=-1) == 1), each, 0).sum(dim=-1)


def bends(args: dict[str, Any], drawn: Tensor) -> Tensor:
    """t, p, q, r [4, N], thresholds where no cosine is near. drawn: [3, N], uniform in [0, 1)."""
    given = (args[k] for k in ("normalize", "centers", "softness"))
    order = cosines(args["x"].double(), args["weight"].double(), *given).sort(dim=1).values
    gaps = order.diff(dim=1)
    at = gaps.argmax(dim=1, keepdim=True)
    t = (order.gather(1, at) + order.gather(1, at + 1))[:, 0] / 2
    t[0], t[1] = -torch.inf, torch.inf
    p, q, r = drawn - 0.5
    return torch.stack([t.float(), 0.2 * p, 0.5 * q + 0.75, 0.5 * r])


def terms(c: Tensor, rule: str, params: list[float], values: Tensor | None) -> list[Tensor]:
    """What a cosine adds to each statistic."""
    if rule == "sface":
        k, b = params
        weight = torch.sigmoid(k * (b - c.detach().clamp(-1, 1).acos()))
        return [weight * c]
    if rule == "sphereface2":
        scale, margin, t, straight = params
        g = 2 * ((c + 1) / 2).clamp_min(0) ** t - 1
        g = c + (g - c).detach() if straight else g
        z = scale * (g + margin) + values[0, :, None]
        return [torch.logaddexp(z, torch.zeros_like(z)), torch.sigmoid(z)]
    if values is not None:
        t, p, q, r = values[:, :, None]
        c = torch.where(c > t, p + q * c + r * c**2, c)
    return [params[0] * c] * (2 if rule == "summed_softmax" else 1)


def statistics(x: Tensor, weight: Tensor, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """Statistics, targets, hardest, hardest_score on the score matrix; any dtype."""
    given = (args[k] for k in ("normalize", "centers", "softness"))
    c = cosines(x, weight, *given)
    columns = torch.arange(c.shape[1])
    part = torch.ones(c.shape[1], dtype=torch.bool)
    if args["classes"] is not None:
        part = torch.isin(columns, args["classes"])
    own = (args["labels"][:, :, None] == columns).any(dim=1)
    others = part & ~own
    values = None if args["values"] is None else args["values"].to(c)
    out = []
    for s, term in enumerate(terms(c, args["rule"], args["params"], values)):
        if s == 0 and "softmax" in args["rule"]:
            some = others.any(dim=1)
            lse = torch.full_like(c[:, 0], -torch.inf)
            lse[some] = term.masked_fill(~others, -torch.inf)[some].logsumexp(dim=1)
            out.append(lse)
        else:
            out.append(torch.where(others, term, 0).sum(dim=1))
    targets = c.gather(1, args["labels"].clamp_min(0))
    best = c.detach().masked_fill(~others, -torch.inf).max(dim=1)
    hardest = torch.where(best.values > -torch.inf, best.indices, -1)
    return torch.stack(out), torch.where(args["labels"] >= 0, targets, 0), hardest, best.values


def answer(made: Call, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The four outputs, dx and dweight in `dtype` (float64: the truth)."""
    x, weight = (made.args[k].detach().to(dtype).requires_grad_() for k in ("x", "weight"))
    out = statistics(x, weight, made.args)
    finite = out[0].isfinite()
    total = (out[0] * made.of_statistics.to(dtype))[finite].sum()
    total = total + (out[1] * made.of_targets.to(dtype)).sum()
    return *(t.detach() for t in out), *torch.autograd.grad(total, (x, weight))


SUMMED = dict(rule="summed_softmax", bend=True)
SFACE = dict(rule="sface", params=(80.0, 1.23))
SPHERE = dict(rule="sphereface2", params=(40.0, 0.4, 3.0, 0.0))
STRAIGHT = dict(rule="sphereface2", params=(20.0, 0.2, 1.0, 1.0))
BEST = dict(centers=3)
SOFT = dict(centers=3, softness=0.1)
SOME = dict(c=90, classes=41)
CASES = [
    Case(name="ragged"),
    Case(name="one row, one class", n=1, c=1, d=8),
    Case(name="one class", n=9, c=1, centers=2, no_label=0.5),
    Case(name="more rows than classes", n=70, c=5, d=40, **SPHERE),
    Case(name="no label", no_label=1.0, many=2),
    Case(name="several labels", many=4, no_label=0.3, **SOME),
    Case(name="a label twice", many=3, edit="twice", **BEST),
    Case(name="peaked", params=(64.0,), edit="peaked", many=2),
    Case(name="bent", bend=True, params=(64.0,), **SOME),
    Case(name="bent best", bend=True, **BEST),
    Case(name="sums", **SUMMED),
    Case(name="sums of several", many=3, **SUMMED, **SOFT, **SOME),
    Case(name="sface", **SFACE),
    Case(name="sface peaked", edit="peaked", **SFACE, **BEST),
    Case(name="sface soft", **SFACE, **SOFT, **SOME),
    Case(name="sphereface2", **SPHERE, **SOME),
    Case(name="sphereface2 peaked", edit="peaked", many=2, **SPHERE, **SOFT),
    Case(name="straight through", **STRAIGHT, **BEST),
    Case(name="best", **BEST, **SOME),
    Case(name="equal centres", edit="equal centres", **BEST),
    Case(name="equal classes", edit="equal classes", **SFACE),
    Case(name="soft", **SOFT),
    Case(name="soft and sharp", centers=5, softness=0.01, **SOME),
    Case(name="zero row", edit="zero row", **BEST, **SPHERE),
    Case(name="lengths", edit="lengths", **SOFT, **SOME),
    Case(name="linear", normalize=False, **BEST, **SOME),
    Case(name="strided", strided=True, centers=2, softness=0.2),
]
LOW = [
    replace(case, name=f"{case.name} {str(dtype).split('.')[1]}", dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for case in CASES
    if case.name in ("several labels", "bent", "best", "sphereface2", "lengths", "strided")
]
LOW += [replace(case, name=f"{case.name} wide", wide=True) for case in LOW if case.centers == 3]
PRECISIONS = [
    # without a best centre, which rounding would change
    replace(case, name=f"{case.name} {precision}", precision=precision)
    for precision in ("tf32", "mixed", "bf16")
    for case in CASES
    if case.name in ("several labels", "soft", "sphereface2")
]

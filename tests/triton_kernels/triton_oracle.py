"""The primitive in float64 from its formula, gradients by autograd: the Triton tests' truth."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Case:
    """One call of the primitive, forward and backward."""

    n: int = 37
    c: int = 53
    d: int = 24
    dtype: torch.dtype = torch.float32
    precision: str = "fp32"
    normalize: bool = True
    weighted: bool = False
    bias: bool = False
    column_weight: bool = False
    bend: str = ""  # "jump": psi jumps at its threshold; "flat": all scores above it are one
    classes: int = 0  # how many take part; 0 = all
    no_target: float = 0.0  # share of the labels that are -1
    scale: float = 4.0
    strided: bool = False
    wide: bool = False  # x in float32 beside a weight in 16 bits, which has its values
    edit: str = ""
    seed: int = 0
    name: str = field(default="", compare=False)


# of rows of weight, of two: what their squares and G over them would take out of the range
POWERS = {
    torch.float32: (0, -100, 90, -60, 60, -116, 110, -21, 21),
    torch.float16: (0, -9, 6, -11, 4),
}


def lengths(case: Case) -> Tensor:
    """What the rows of the weight are multiplied by. [C, 1]"""
    powers = POWERS[torch.float16 if case.dtype == torch.float16 else torch.float32]
    some = [powers[j % len(powers)] if case.edit == "lengths" else 0 for j in range(case.c)]
    return torch.exp2(torch.tensor(some, dtype=torch.float64))[:, None]


def call(case: Case) -> dict[str, Any]:
    """The arguments of `forward`, by name, and the gradients that come back."""
    g = torch.Generator().manual_seed(case.seed)
    n, c, d = case.n, case.c, case.d

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x = randn(n, d)
    x = case.scale * x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)
    weight = randn(c, d) * (0.3 if case.normalize else d**-0.5)
    ids = None
    if case.classes:
        ids = torch.randperm(c, generator=g)[: case.classes].sort().values
    pool = torch.arange(c) if ids is None else ids
    labels = pool[torch.randint(len(pool), (n,), generator=g)]
    labels = torch.where(torch.rand(n, generator=g) < case.no_target, -1, labels)
    if case.edit == "zero row":
        weight[c // 2] = 0
    weight = (weight * lengths(case)).float()
    if case.edit == "duplicates":
        weight[1::2] = weight[0]
    if case.edit == "peaked":  # the target's score stands out by the whole scale
        known = labels >= 0
        x[known] = case.scale * weight[labels[known]] / weight[labels[known]].norm(dim=1)[:, None]
    if case.edit == "nan row":
        x[n // 3, d // 2] = torch.nan
    x, weight = x.to(case.dtype), weight.to(case.dtype)
    if case.wide:
        x = x.float()
    if case.strided:
        wide = torch.zeros(n, d + 5, dtype=case.dtype)
        wide[:, 3 : d + 3] = x
        x, weight = wide[:, 3 : d + 3], weight.T.contiguous().T
    bias = randn(c).to(case.dtype) if case.bias else None
    args = dict(x=x, weight=weight, labels=labels, classes=ids, bias=bias)
    args["column_weight"] = torch.rand(c, generator=g) if case.column_weight else None
    args |= dict(normalize=case.normalize, weighted=case.weighted, precision=case.precision)
    args["bend"] = bends(case, args, torch.rand(3, n, generator=g)) if case.bend else None
    grads = [randn(n), randn(n), randn(n) if case.weighted else None]
    return dict(args=args, grads=grads)


def product_of(x: Tensor, weight: Tensor, normalize: bool) -> Tensor:
    """<x_i, w_j>, w_j of unit norm if asked. [N, C]"""
    norm = weight.norm(dim=1, keepdim=True)
    if normalize:
        weight = torch.where(norm > 0, weight / torch.where(norm > 0, norm, 1), 0)
    return x @ weight.T


def bends(case: Case, args: dict[str, Any], drawn: Tensor) -> Tensor:
    """t, p, q, r [4, N]: thresholds where no product is near, in the upper two thirds of a row's.

    The first row is bent everywhere, the second nowhere. drawn: [3, N], uniform in [0, 1).
    """
    product = product_of(args["x"].double(), args["weight"].double(), args["normalize"])
    order = product.sort(dim=1).values
    gaps = order.diff(dim=1)[:, case.c // 3 :]
    t = order.mean(dim=1)
    if gaps.numel():
        at = gaps.argmax(dim=1, keepdim=True) + case.c // 3
        t = (order.gather(1, at) + order.gather(1, at + 1))[:, 0] / 2
    t = t.nan_to_num(0)
    t[0], t[1:2] = -torch.inf, torch.inf
    p, q, r = drawn - 0.5
    p, q, r = 0.2 * case.scale * p, 0.5 * q + 0.75, 0.5 * r / case.scale
    if case.bend == "flat":
        p, q, r = 2 * case.scale + p, 0 * q, 0 * r
    return torch.stack([t.float(), p, q, r])


def statistics(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    classes: Tensor | None,
    bias: Tensor | None,
    column_weight: Tensor | None,
    normalize: bool,
    bend: Tensor | None,
) -> list[Tensor]:
    """lse, target, weighted_sum, hardest, hardest_score on the score matrix; any dtype."""
    product = product_of(x, weight, normalize)
    scores = product
    if bend is not None:
        t, p, q, r = bend.to(product)[:, :, None]
        scores = torch.where(product > t, p + q * product + r * product**2, product)
    scores = scores if bias is None else scores + bias
    columns = torch.arange(len(weight))
    taking_part = torch.ones(len(weight), dtype=torch.bool)
    if classes is not None:
        taking_part = torch.isin(columns, classes)
    others = taking_part[None, :] & (columns[None, :] != labels[:, None])
    masked = scores.masked_fill(~others, -torch.inf)
    lse = torch.full_like(masked[:, 0], -torch.inf)
    some = others.any(1)
    lse[some] = masked[some].logsumexp(1)
    target = product.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    v = torch.ones_like(scores[0]) if column_weight is None else column_weight.to(scores)
    best = masked.max(1)
    return [
        lse,
        torch.where(labels >= 0, target, 0),
        torch.where(others, v * scores, 0).sum(1),
        torch.where(best.values > -torch.inf, best.indices, -1),
        best.values,
    ]


def gradients(args: dict[str, Any], grads: list[Tensor | None], dtype: torch.dtype) -> list:
    """dx, dweight, dbias by autograd through `statistics` in `dtype` (float64: the truth)."""
    leaves = [args[k] for k in ("x", "weight", "bias")]
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in leaves]
    x, weight, bias = leaves
    given = (args[k] for k in ("column_weight", "normalize", "bend"))
    out = statistics(x, weight, args["labels"], args["classes"], bias, *given)
    finite = out[0] > -torch.inf
    total = (out[0][finite] * grads[0].to(dtype)[finite]).sum() + (
        out[1] * grads[1].to(dtype)
    ).sum()
    if grads[2] is not None:
        total = total + (out[2] * grads[2].to(dtype)).sum()
    wanted = [t for t in leaves if t is not None]
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    return found if bias is not None else [*found, None]


def truth(args: dict[str, Any]) -> list[Tensor]:
    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double()

    with torch.no_grad():
        return statistics(
            wide(args["x"]),
            wide(args["weight"]),
            args["labels"],
            args["classes"],
            wide(args["bias"]),
            wide(args["column_weight"]),
            args["normalize"],
            wide(args["bend"]),
        )


EVERYTHING = dict(weighted=True, bias=True, column_weight=True, no_target=0.2)
CASES = [
    Case(name="ragged"),
    Case(name="one-row-one-class", n=1, c=1, d=8),
    Case(name="one-class", n=9, c=1, normalize=False, bias=True),
    Case(name="more-rows-than-classes", n=70, c=5, d=40),
    Case(name="classes-subset", c=300, n=33, classes=71, bias=True, no_target=0.3),
    Case(name="classes-of-one", c=40, n=5, classes=1),
    Case(name="no-target", no_target=1.0, weighted=True),
    Case(name="everything", **EVERYTHING),
    Case(name="linear-everything", normalize=False, weighted=True, bias=True, column_weight=True),
    Case(name="scale-64-peaked", scale=64.0, edit="peaked"),
    Case(name="scale-100", scale=100.0, no_target=0.1),
    Case(name="duplicates", edit="duplicates"),
    Case(name="zero-row", edit="zero row", weighted=True),
    Case(name="lengths", edit="lengths", **EVERYTHING),
    Case(name="lengths-classes", edit="lengths", n=33, c=300, classes=71, d=40),
    Case(name="strided", strided=True, bias=True),
    Case(name="wide-few-classes", d=512, c=7, n=19),
    Case(name="bent-everything", bend="jump", **EVERYTHING),
    Case(name="bent-linear-classes", bend="jump", c=300, n=33, classes=71, normalize=False),
    Case(name="bent-scale-100", bend="jump", scale=100.0, n=70, d=40),
    Case(name="bent-flat", bend="flat", edit="duplicates"),
    Case(name="bent-flat-bias", bend="flat", edit="zero row", bias=True, weighted=True),
    Case(name="bent-one-class", bend="jump", n=9, c=1, bias=True),
]
LOW = [
    replace(case, name=f"{case.name}-{str(dtype).split('.')[1]}", dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for case in CASES
    if case.name in ("ragged", "everything", "classes-subset", "scale-64-peaked", "strided")
    or case.name in ("bent-everything", "bent-linear-classes", "lengths", "lengths-classes")
]
PRECISIONS = [
    replace(case, name=f"{case.name}-{precision}", precision=precision)
    for precision in ("tf32", "mixed", "bf16")
    for case in CASES
    if case.name in ("everything", "scale-100", "bent-everything")
]
# what rounding the operands costs, relative to the largest value: 2^-24, 2^-11, 2^-8, 2^-11
STEP = {"fp32": 2**-24, "tf32": 2**-11, "mixed": 2**-8, "bf16": 2**-8}
DTYPE_STEP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
STEPS = 6  # a few: sums of a few dozen rounded terms


def close(got: Tensor, want: Tensor, eager: Tensor | None, step: float, what: str) -> None:
    finite = want.isfinite()
    got, want = got.double(), want.double()
    assert torch.equal(got.isfinite(), finite), what
    assert torch.equal(got[~finite].nan_to_num(7), want[~finite].nan_to_num(7)), what
    if not finite.any():
        return
    largest = want[finite].abs().max().clamp_min(1e-3)
    error = (got - want)[finite].abs().max() / largest
    allowed = STEPS * step
    if eager is not None:
        allowed += float((eager.double() - want)[finite].abs().max() / largest)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"

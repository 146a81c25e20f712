"""What the kernels over pairs are held to: cases, truth in float64, bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_losses.primitives.pairs import reference as truth
from fused_losses.primitives.pairs import triton as backend
from fused_losses.primitives.pairs.inputs import (
    PairInputs,
    PairNeeds,
    Rule,
)

STEPS = 8  # a few: sums of a few dozen rounded terms
STEP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# what a precision rounds float32 operands to, forward and backward
PRECISION_STEP = {"tf32": (2**-11, 2**-11), "mixed": (2**-24, 2**-8), "bf16": (2**-8, 2**-8)}
ALL_NEEDS = PairNeeds(True, True, True, True, True)


@dataclass
class Case:
    """One call of the primitive."""

    n: int = 37
    m: int = 43
    d: int = 24
    dtype: torch.dtype = torch.float32
    precision: str = "fp32"
    reduction: str = "lse"
    cols: bool = False
    triangle: bool = False
    scale: float = 4.0
    labels: int = 0  # how many; 0: every pair is negative
    biases: bool = False
    ids: int = 0
    groups: int = 0
    exclude: int = 0
    windows: bool = False
    root: bool = False
    skip_self: bool = False
    positive: Rule = Rule()
    negative: Rule = Rule()
    values: int = 0  # width of the values: attention
    positives: bool = False
    name: str = field(default="", compare=False)


def inputs(case: Case, seed: int = 0) -> tuple[PairInputs, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n, m = case.n, case.n if case.triangle else case.m

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def pair(wanted: Any, make: Any) -> tuple[Tensor | None, Tensor | None]:
        if not wanted:
            return None, None
        return make(n), None if case.triangle else make(m)

    def integers(high: int) -> Any:
        return lambda size: torch.randint(high, (size,), generator=g, dtype=torch.int32)

    def unit(size: int) -> Tensor:
        return torch.nn.functional.normalize(randn(size, case.d)).to(case.dtype)

    def window(size: int) -> Tensor:
        # around scores of unit size; the lower bound of the positives leaves all in
        low, high = -0.6 * case.scale, 0.5 * case.scale
        spread = 0.1 * case.scale * torch.rand(4, size, generator=g)
        bounds = torch.tensor([-torch.inf, high, low, high])
        return bounds[:, None] + spread - (case.scale if case.root else 0)

    x = unit(n)
    y = x if case.triangle else unit(m)
    # with u = 2 <x, y> - 2, scaled, the root is a distance
    bias = (lambda size: 0.3 * randn(size) - case.scale) if case.root else randn
    exclude = None
    if case.exclude:
        exclude = torch.randint(-1, m, (n, case.exclude), generator=g, dtype=torch.int32)
    p = PairInputs(
        x,
        y,
        torch.tensor(case.scale, dtype=torch.float64),
        *pair(case.biases or case.root, bias),
        *pair(case.labels, integers(max(case.labels, 1))),
        *pair(case.ids, integers(max(case.ids, 1))),
        *pair(case.groups, integers(max(case.groups, 1))),
        exclude,
        *pair(case.windows, window),
        score="root" if case.root else "linear",
        positive=case.positive,
        negative=case.negative,
        skip_self=case.skip_self,
        triangle=case.triangle,
        precision=case.precision,
    )
    if not case.cols:
        p = p._replace(y_window=None)
    return p, randn(m, case.values).to(case.dtype) if case.values else randn(0)


def leaves_of(p: PairInputs, dtype: torch.dtype) -> tuple[PairInputs, list[Tensor | None]]:
    """The inputs in `dtype` (scale stays), those that may need a gradient as leaves."""
    names = ["x", "y", "scale", "x_bias", "y_bias"]
    found: dict[str, Tensor | None] = {}
    for name in names:
        value = getattr(p, name)
        if value is not None:
            kind = dtype if name in ("x", "y") else torch.float64
            found[name] = value.detach().to(kind).requires_grad_()
    if p.triangle:
        found["y"] = found["x"]
    wide = {k: getattr(p, k) for k in ("x_window", "y_window")}
    wide = {k: None if v is None else v.to(dtype) for k, v in wide.items()}
    p = p._replace(**found, **wide)
    leaves = [found.get(name) for name in names]
    if p.triangle:
        leaves[1] = leaves[4] = None
    return p, leaves


def loss_of(outputs: list[Tensor], grads: list[Tensor]) -> Tensor:
    """sum of output x gradient over the finite outputs."""
    total = torch.zeros((), dtype=torch.float64)
    for out, grad in zip(outputs, grads, strict=True):
        finite = out.isfinite()
        total = total + (out[finite] * grad[finite]).sum()
    return total


def close(
    got: Tensor, want: Tensor, eager: Tensor | None, step: float, what: str, least: float = 1e-3
) -> None:
    """Error against the largest value, or against `least` if that is more."""
    finite = want.isfinite()
    got, want = got.double(), want.double()
    assert got.shape == want.shape, what
    assert torch.equal(got.isfinite(), finite), what
    assert torch.equal(got[~finite].nan_to_num(7), want[~finite].nan_to_num(7)), what
    if not finite.any():
        return
    largest = want[finite].abs().max().clamp_min(least)
    error = (got - want)[finite].abs().max() / largest
    allowed = STEPS * step
    if eager is not None:
        allowed += 2 * float((eager.double() - want)[finite].abs().max() / largest)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def rounded(p: PairInputs, dtype: torch.dtype) -> PairInputs:
    return p._replace(x=p.x.to(dtype).to(p.x.dtype), y=p.y.to(dtype).to(p.y.dtype))


def gradients(case: Case, p: PairInputs, values: Tensor, grads: list[Tensor], dtype: torch.dtype):
    """The truth's outputs and gradients, the operands rounded to `dtype` first."""
    q, leaves = leaves_of(rounded(p, dtype), torch.float64)
    if case.values:
        leaf = values.to(dtype).double().requires_grad_()
        outputs = list(truth.attention(leaf, q, case.positives))
        leaves = [leaf, *leaves]
    else:
        rows, columns = truth.statistics(q, case.reduction, case.cols)
        outputs = [rows[:2], columns[:2]]
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(loss_of(outputs, grads), wanted, allow_unused=True))
    result = []
    for leaf in leaves:
        grad = None if leaf is None else next(found)
        result.append(torch.zeros_like(leaf) if leaf is not None and grad is None else grad)
    return [o.detach() for o in outputs], result


def eager_error(case: Case, dtype: torch.dtype, want: list, other: list) -> list:
    """float32 truth carries no rounding of its own: only lower operands give a yardstick."""
    return [None] * len(want) if dtype == torch.float32 else other


def check(case: Case, seed: int = 0) -> None:
    p, values = inputs(case, seed)
    g = torch.Generator().manual_seed(seed + 1)
    forward_step, backward_step = PRECISION_STEP.get(case.precision, (STEP[case.dtype],) * 2)
    # 16-bit operands multiply exactly: what a float32 sum rounds is all of the forward's error
    forward_step = 2**-22 if case.precision in ("fp32", "mixed") else forward_step
    # a score of the size of scale is rounded to its 2^-24, which exp makes relative
    score_step = case.scale * 2**-25
    low = torch.bfloat16 if case.precision in ("mixed", "bf16") else case.dtype
    needs = ALL_NEEDS._replace(x_bias=p.x_bias is not None, y_bias=p.y_bias is not None)
    if case.triangle:
        needs = needs._replace(y=False, y_bias=False)
    exact = leaves_of(p, torch.float64)[0]
    if case.values:
        got = backend.attention(values, p, case.positives)
        want = [t.detach() for t in truth.attention(values.double(), exact, case.positives)]
        step = max(forward_step, STEP[case.dtype], score_step)
        for name, a, b in zip(("out", "lse"), got, want, strict=True):
            close(a, b, None, step if name == "out" else 4 * forward_step, name)
        grads = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in want]
        found = backend.attention_backward(
            grads[0].float(), grads[1], *got, values, p, case.positives, True, needs
        )
        grads[0] = grads[0].float().double()
    else:
        got = backend.statistics(p, case.reduction, case.cols)
        want = [t.detach() for t in truth.statistics(exact, case.reduction, case.cols)]
        for side, a, b in zip(("rows", "columns"), got, want, strict=True):
            assert a.dtype == torch.float64 and a.shape == b.shape
            for k, name in enumerate(("value", "total", "count", "best")):
                if b[k].numel() and (name != "count" or case.precision == "fp32"):
                    close(a[k], b[k], None, 4 * forward_step, f"{name} of {side}")
        grads = [torch.randn(t[:2].shape, generator=g, dtype=torch.float64) for t in want]
        found = backend.statistics_backward(*grads, *got, p, case.reduction, case.cols, needs)
    _, want = gradients(case, p, values, grads, torch.float64)
    _, eager = gradients(case, p, values, grads, low)
    eager = eager_error(case, low, want, eager)
    names = ["values"] if case.values else []
    names += ["x", "y", "scale", "x_bias", "y_bias"]
    step = max(backward_step, STEP[low], 2**-22, score_step)
    # what the gradient of scale is the sum of: its terms may all but cancel
    dx = want[names.index("x")]
    summed = float((p.x.double().norm(dim=1) * dx.norm(dim=1)).sum() / case.scale) + 1e-3
    for name, a, b, e in zip(names, found, want, eager, strict=True):
        if b is None:
            assert a is None, name
            continue
        if name in ("values", "x", "y"):
            assert a.dtype == case.dtype
        close(a, b, e, step, f"gradient of {name}", summed if name == "scale" else 1e-3)

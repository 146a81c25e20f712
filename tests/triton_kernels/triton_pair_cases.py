"""The kernels over pairs against float64, in Triton's interpreter; run by `test_triton_pairs.py`.

Truth: `reference_pairs` on float64 copies, gradients by autograd. Bound: the error of the same in
the operands' dtype, plus a few steps of that dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from draws import CASES as LOSSES
from draws import Call, Draw, judge
from far_rows import far_rows
from torch import Tensor

import fused_losses.backends
from fused_losses.primitives.pairs import reference as truth
from fused_losses.primitives.pairs import triton as backend
from fused_losses.primitives.pairs.inputs import (
    BEST,
    COUNT,
    NEGATIVE,
    POSITIVE,
    REDUCTIONS,
    TOTAL,
    VALUE,
    PairInputs,
    PairNeeds,
    Rule,
)
from fused_losses.primitives.pairs.op import pair_attention, pair_statistics

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


CIRCLE = dict(positive=Rule(-8.0, 0.75, 1.25), negative=Rule(8.0, 0.25, 0.25), scale=1.0)
TRIPLET = dict(
    root=True, labels=6, reduction="softplus", positive=Rule(-1.0), negative=Rule(2.0, -1.0)
)
EVERYTHING = dict(
    cols=True, labels=7, biases=True, ids=30, groups=3, exclude=3, windows=True, skip_self=True
)
CASES = [
    Case(name="ragged"),
    Case(name="one-pair", n=1, m=1, d=8, labels=1, cols=True),
    Case(name="one-row", n=1, m=70, cols=True, labels=3),
    Case(name="labels", labels=5, cols=True),
    Case(name="biases", biases=True, cols=True, positive=Rule(-1.0), labels=4),
    Case(name="scale-100", scale=100.0, labels=4, cols=True),
    Case(name="everything", **EVERYTHING, positive=Rule(-2.0, 0.3)),
    Case(name="circle", **CIRCLE, labels=5, cols=True),
    Case(name="distance", **TRIPLET),
    Case(name="softplus-everything", reduction="softplus", **EVERYTHING, negative=Rule(3.0, 0.5)),
    Case(name="relu", reduction="relu", labels=5, cols=True, negative=Rule(1.0, 0.7)),
    Case(name="factor-zero", labels=4, negative=Rule(0.0)),
    Case(name="nothing-takes-part", groups=1000, labels=5, cols=True),
    Case(name="triangle", triangle=True),
    Case(name="triangle-labels", triangle=True, n=70, labels=6, scale=20.0),
    Case(
        name="triangle-everything",
        triangle=True,
        n=67,
        labels=6,
        biases=True,
        ids=40,
        groups=3,
        windows=True,
        positive=Rule(-2.0, 0.5, 3.0),
    ),
    Case(name="triangle-distance", triangle=True, n=50, **TRIPLET),
]
LOW = [
    replace(case, dtype=dtype, name=f"{case.name}-{str(dtype).split('.')[1]}")
    for dtype in (torch.bfloat16, torch.float16)
    for case in CASES
    if case.name in ("labels", "biases", "scale-100", "circle", "triangle-labels")
]
PRECISIONS = [
    replace(case, precision=precision, name=f"{case.name}-{precision}")
    for precision in ("tf32", "mixed", "bf16")
    for case in CASES
    if case.name in ("labels", "biases", "triangle-labels")
]
ATTENTION = [
    Case(name="attention", values=20, biases=True),
    Case(name="attention-peaked", values=33, scale=100.0, exclude=2),
    Case(name="attention-positives", values=16, labels=4, positives=True, windows=True),
    Case(name="attention-negatives", values=16, labels=4, skip_self=True, negative=Rule(-2.0, 0.5)),
    Case(name="attention-lonely-rows", values=16, labels=1000, positives=True),
    Case(name="attention-no-positives", values=16, positives=True, scale=200.0),
    Case(name="attention-distance", values=16, root=True),
    *(Case(name=f"attention-{p}", values=20, precision=p) for p in ("tf32", "mixed", "bf16")),
    Case(name="attention-bfloat16", values=20, dtype=torch.bfloat16),
    Case(name="attention-float16", values=20, dtype=torch.float16, labels=3),
]


@pytest.mark.parametrize("case", CASES + LOW + PRECISIONS + ATTENTION, ids=lambda c: c.name)
def test_against_float64(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("triangle", (False, True))
def test_several_blocks(triangle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is one piece at these sizes, cut into several ragged ones."""
    monkeypatch.setattr(backend, "SWEEP_ROWS", 32)
    monkeypatch.setattr(backend, "PARTIAL_BYTES", 16 * 2 * 32 * 5)
    monkeypatch.setattr(backend.gpu, "ROW_BLOCK", 32)
    monkeypatch.setattr(backend.gpu, "MAX_CHUNK", 64)
    more = dict(labels=6, biases=True)
    check(Case(n=53, m=70, cols=not triangle, triangle=triangle, **more))
    if not triangle:
        check(Case(n=41, m=70, values=20, biases=True))


def test_near_zero_loss_keeps_its_digits() -> None:
    """g_value q + g_total where the two all but cancel: 1 - p to 1e-5 of itself."""
    case = Case(n=12, m=12, d=16, scale=24.0, labels=1)
    p, _ = inputs(case)
    x = torch.nn.functional.normalize(
        torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    )
    labels = torch.arange(12, dtype=torch.int32)
    p = p._replace(x=x, y=x.clone(), x_labels=labels, y_labels=labels.clone())

    def loss(p: PairInputs, rows: Tensor) -> Tensor:
        return torch.nn.functional.softplus(rows[VALUE, NEGATIVE] - rows[VALUE, POSITIVE]).sum()

    q, leaves = leaves_of(p, torch.float64)
    want = torch.autograd.grad(loss(q, truth.statistics(q, "lse", False)[0]), leaves[:2])
    rows, columns = backend.statistics(p, "lse", False)
    leaf = rows.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(p, leaf), leaf)
    needs = PairNeeds(True, True, False, False, False)
    got = backend.statistics_backward(
        grad[:2].contiguous(), columns[:2], rows, columns, p, "lse", False, needs
    )
    for g, w in zip(got[:2], want, strict=True):
        assert ((g - w).abs().max() / w.abs().max()) < 2e-5


def test_nan_in_a_row() -> None:
    """Its own statistics and every column's are NaN; the other rows' are not."""
    for extra in ({}, dict(labels=3, windows=True), dict(root=True)):
        case = Case(n=20, m=23, cols=True, **extra)
        p, _ = inputs(case)
        x = p.x.clone()
        x[5, 3] = torch.nan
        rows, columns = backend.statistics(p._replace(x=x), "lse", True)
        clean, _ = backend.statistics(p, "lse", True)
        keep = torch.arange(case.n) != 5
        assert torch.equal(rows[..., keep], clean[..., keep])
        some = clean[COUNT, NEGATIVE, 5] > 0
        assert some and rows[[VALUE, TOTAL, BEST], NEGATIVE, 5].isnan().all()
        if not case.labels:
            assert columns[[VALUE, TOTAL, BEST], NEGATIVE].isnan().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n, m", ((0, 5), (5, 0), (0, 0)))
def test_empty(reduction: str, n: int, m: int) -> None:
    case = Case(n=n, m=m, cols=True, reduction=reduction, labels=2, biases=True)
    p, _ = inputs(case)
    rows, columns = backend.statistics(p, reduction, True)
    nothing = -torch.inf if reduction == "lse" else 0.0
    for out, size in ((rows, n), (columns, m)):
        assert out.shape == (4, 2, size)
        assert (out[VALUE] == nothing).all() and (out[BEST] == -torch.inf).all()
        assert not out[[TOTAL, COUNT]].any()
    grads = torch.ones_like(rows[:2]), torch.ones_like(columns[:2])
    found = backend.statistics_backward(*grads, rows, columns, p, reduction, True, ALL_NEEDS)
    for got, like in zip(found, p[:5], strict=True):
        assert got.shape == like.shape and not got.any()
    values = torch.randn(m, 6)
    out, lse = backend.attention(values, p, False)
    assert out.shape == (n, 6) and not out.any() and (lse == -torch.inf).all()


def test_only_what_is_needed_is_computed() -> None:
    case = Case(n=20, m=23, labels=4, biases=True, cols=True)
    p, _ = inputs(case)
    out = backend.statistics(p, "lse", True)
    grads = [torch.randn(t[:2].shape, dtype=torch.float64) for t in out]
    whole = backend.statistics_backward(*grads, *out, p, "lse", True, ALL_NEEDS)
    for i in range(5):
        needs = PairNeeds(*(k == i for k in range(5)))
        part = backend.statistics_backward(*grads, *out, p, "lse", True, needs)
        assert [t is not None for t in part] == list(needs)
        assert torch.equal(part[i], whole[i])


def test_same_twice() -> None:
    p, _ = inputs(Case(n=33, m=40, labels=4))
    first, second = (backend.statistics(p, "lse", True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_and_transposed() -> None:
    p, _ = inputs(Case(labels=4))
    wide = torch.zeros(37, 30)
    wide[:, 3:27] = p.x
    other = p._replace(x=wide[:, 3:27], y=p.y.T.contiguous().T)
    for a, b in zip(
        backend.statistics(p, "lse", True), backend.statistics(other, "lse", True), strict=True
    ):
        close(a, b, None, 2**-22, "strided")


def test_offsets_past_two_to_the_31() -> None:
    near = torch.randn(3, 16).half()
    far = far_rows(near)
    scale = torch.tensor(2.0, dtype=torch.float64)
    calls = [PairInputs(t, t, scale) for t in (near, far)]
    outs = [backend.statistics(p, "lse", True) for p in calls]
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    grads = [torch.randn(2, 2, 3, dtype=torch.float64) for _ in range(2)]
    needs = PairNeeds(True, True, True, False, False)
    outs = [backend.statistics_backward(*grads, *outs[0], p, "lse", True, needs) for p in calls]
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True) if a is not None)


def test_attention_with_triangle_is_refused() -> None:
    p, _ = inputs(Case(triangle=True))
    with pytest.raises(ValueError, match="triangle"):
        backend.attention(torch.randn(37, 4), p, False)


def test_wired_as_a_backend() -> None:
    assert fused_losses.backends.unavailable("triton") is None
    case = Case(labels=4, biases=True, cols=True)
    p, _ = inputs(case)
    results = []
    for backend_name in ("triton", "bounded"):
        leaves = [t.detach().clone().requires_grad_() for t in p[:5]]
        q = p._replace(**dict(zip(p._fields[:5], leaves, strict=True)))
        rows, columns = pair_statistics(q, cols=True, backend=backend_name)
        total = rows.value[NEGATIVE].sum() + columns.total.sum()
        out, lse = pair_attention(q.y[:, :5], q, backend=backend_name)
        total = total + out.square().sum() + lse.sum()
        results.append(torch.autograd.grad(total, leaves))
    for a, b in zip(*results, strict=True):
        close(a, b, None, 2**-20, "gradient")


@pytest.mark.parametrize("name", ["contrastive", "margin_loss_beta_pair"])
def test_slopes_of_short_distances_in_float16(name: str) -> None:
    """1 / (2 d) is beyond float16, and saturates there."""
    draw = Draw((17, 13, 16), "tiny", "skewed", torch.float16, 5)
    for verdict in judge(LOSSES[name], draw, [Call("triton")]):
        assert verdict.share <= 1, verdict

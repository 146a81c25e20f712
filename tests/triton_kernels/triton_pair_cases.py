"""The kernels over pairs against float64, in Triton's interpreter; run by `test_interpreted.py`.

Truth: `reference_pairs` on float64 copies, gradients by autograd. Bound: the error of the same in
the operands' dtype, plus a few steps of that dtype.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from draws import CASES as LOSSES
from draws import Call, Draw, judge
from far_rows import far_rows
from torch import Tensor
from triton_pair_checks import (
    ALL_NEEDS,
    Case,
    check,
    close,
    inputs,
    leaves_of,
)

import fused_losses.backends
from fused_losses.primitives.pairs import gpu
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


@pytest.mark.parametrize(("n", "m"), ((5, 2100), (1050, 5)))
def test_more_partial_results_than_a_merge_reads_at_once(n: int, m: int) -> None:
    p, _ = inputs(Case(n=n, m=m, d=8, labels=3, scale=16.0))
    # the last are the first one's best: what was summed before is scaled again
    if m > n:
        p = p._replace(y=p.y[(p.y @ p.x[0]).argsort()])
    else:
        p = p._replace(x=p.x[(p.x @ p.y[0]).argsort()])
    got = backend.statistics(p, "lse", True)
    wide = p._replace(x=p.x.double(), y=p.y.double())
    for side, want in zip(got, truth.statistics(wide, "lse", True), strict=True):
        for field in (VALUE, COUNT, BEST):
            error = (side[field].double() - want[field]).abs()
            # a rounding of each of a score's 8 products, of at most 16, and of a few sums
            assert error.nan_to_num(0).max() <= 12 * 16 * 2**-24


def test_weights_of_large_scores_keep_their_digits() -> None:
    """Of integers: the scores are exact, and all error would be that of the rounded logsumexp."""
    g = torch.Generator().manual_seed(0)
    x = 32.0 * torch.randint(1, 4, (20, 4), generator=g)
    y = torch.randint(5, 9, (40, 4), generator=g).float()
    values = torch.randn(40, 16, generator=g)
    p = PairInputs(x, y, torch.ones((), dtype=torch.float64))
    out, lse = backend.attention(values, p, positives=False)
    scores = x.double() @ y.double().T
    assert scores.max() > 2000  # a float32 logsumexp of it is off by up to 6e-5
    want = scores.softmax(1) @ values.double()
    assert (lse.float() - scores.logsumexp(1)).abs().max() > 2**-16
    assert (out.double() - want).abs().max() <= 2**-19 * values.abs().max()


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


@pytest.mark.parametrize("reduction", ("lse", "sum"))
@pytest.mark.parametrize("gain", (1.0, torch.tensor(8.0)))
def test_vectors_of_rows_are_as_the_formulas_have_them(
    reduction: str, gain: Tensor | float
) -> None:
    """With what is no number, and rows without pairs: `gpu.finish`, `vectors` and `packed`."""
    g = torch.Generator().manual_seed(5)
    n = 301
    state = torch.rand(4, 2, n, generator=g, dtype=torch.float64) * 9
    state[COUNT] = torch.randint(0, 4, (2, n), generator=g).double()
    none = state[COUNT] == 0
    state[:2].masked_fill_(none, 0)
    state[BEST].masked_fill_(none, -torch.inf)
    state[TOTAL, 0, 3], state[BEST, 1, 7] = torch.nan, torch.inf
    state[VALUE, 1, 9], state[VALUE, 0, 11] = torch.inf, torch.nan
    want, got = state.clone(), state.clone()
    gpu.finish(want, reduction)
    backend._each(got, "finish_vectors", (got,), reduction)
    assert torch.allclose(got, want, rtol=1e-14, atol=0, equal_nan=True)
    grad = torch.randn(2, 2, n, generator=g, dtype=torch.float64)
    grad[0, 1, 20], grad[1, 0, 30] = torch.nan, torch.inf
    packed = gpu.packed(gpu.vectors(grad, want, reduction), gain)
    found = backend._vectors(grad, want, reduction, gain)
    assert found.dtype == torch.float32
    assert torch.allclose(found, packed, rtol=2.0**-22, atol=0, equal_nan=True)

"""The primitives over pairs: every backend against the materialised formula in float64."""

from __future__ import annotations

import itertools
import random
import re
import warnings
from typing import Any

import pytest
import torch
from conftest import CUDA, require, widest
from places import ROOT
from torch import Tensor

from fused_losses import backends
from fused_losses.backends.cpu import capability as cpu
from fused_losses.primitives.pairs.inputs import PairInputs, Rule
from fused_losses.primitives.pairs.op import (
    PAIR_ATTENTION,
    PAIR_STATISTICS,
    pair_attention,
    pair_statistics,
)

TENSORS = ("x", "y", "scale", "x_bias", "y_bias")
RULES = (Rule(), Rule(-2.0, 0.3), Rule(0.0), Rule(3.0, 0.2, 1.1), Rule(-3.0, 0.5, 1.2))
SIZES = (1, 2, 7, 63, 64, 65, 191, 192, 193, 400)
CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


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


def compare(got: tuple, want: tuple, bound: float) -> None:
    for k, (a, b) in enumerate(zip(got[0], want[0], strict=True)):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite), k
        error = (a.double() - b)[finite].abs().max() if finite.any() else 0
        assert error <= bound * (b[finite].abs().max() if finite.any() else 1) + bound * 1e-2, k
    for name, b in want[1].items():
        a = got[1][name]
        assert (a is None) == (b is None), name
        if b is None:
            continue
        # dscale is a sum that cancels
        loose = 30 if name == "scale" else 1
        assert float((a.double() - b).norm()) <= loose * bound * float(b.norm()) + bound, name


@pytest.mark.float64
@pytest.mark.parametrize("seed", range(60))
def test_statistics_in_float64(seed: int, streamed: str) -> None:
    p, reduction, cols = draw(seed)
    got = statistics(p, reduction, cols, streamed)
    compare(got, statistics(p, reduction, cols, "reference"), BOUNDS[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(100, 115))
def test_statistics_in_other_dtypes(seed: int, dtype: torch.dtype, streamed: str) -> None:
    p, reduction, cols = draw(seed, dtype)
    want = statistics(p, reduction, cols, "reference", double=True)
    compare(statistics(p, reduction, cols, streamed), want, BOUNDS[dtype])


@pytest.mark.float64
@pytest.mark.parametrize("positives", [False, True])
@pytest.mark.parametrize("seed", range(200, 220))
def test_attention_in_float64(seed: int, positives: bool, streamed: str) -> None:
    p, _, _ = draw(seed)
    p = p._replace(triangle=False) if p.triangle and p.y_labels is not None else p
    if p.triangle:
        pytest.skip("attention has no triangle")
    compare(attention(p, positives, streamed), attention(p, positives, "reference"), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [300, 303, 304, 305])
def test_attention_in_other_dtypes(seed: int, dtype: torch.dtype, streamed: str) -> None:
    p = draw(seed, dtype)[0]._replace(triangle=False, y_labels=None, x_labels=None)
    p = p._replace(x_ids=None, y_ids=None, x_groups=None, y_groups=None)
    want = attention(p, False, "reference", double=True)
    # scores near 500 have float32 steps of 3e-5, and weights are their exponentials
    compare(attention(p, False, streamed), want, 10 * BOUNDS[dtype])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("seed", [400, 401, 402, 403])
def test_every_instruction_set(seed: int, capability: str) -> None:
    require("cpu")
    try:
        cpu.extension().force_capability(capability)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        p, reduction, cols = draw(seed)
        want = statistics(p, reduction, cols, "reference")
        compare(statistics(p, reduction, cols, "cpu"), want, 1e-10)
        single, reduction, cols = draw(seed, torch.float32)
        want = statistics(single, reduction, cols, "reference", double=True)
        compare(statistics(single, reduction, cols, "cpu"), want, BOUNDS[torch.float32])
    finally:
        cpu.extension().force_capability(None)


# ---- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
@pytest.mark.parametrize("backend", ["cpu", *CUDA])
def test_lower_precisions(precision: str, backend: str) -> None:
    why = backends.reasons_against(require(backend), torch.device("cpu"), torch.float32, precision)
    if why:
        pytest.skip(why[0])
    x, y = torch.randn(300, 96) * 0.3, torch.randn(410, 96) * 0.3
    labels = torch.arange(410, dtype=torch.int32) % 100
    p = PairInputs(x, y, torch.tensor(2.0).double(), x_labels=labels[:300], y_labels=labels)
    want = statistics(p, "lse", True, "reference", double=True)
    compare(statistics(p._replace(precision=precision), "lse", True, backend), want, 2e-2)
    if precision == "mixed":
        exact = statistics(p._replace(precision=precision), "lse", True, backend)[0]
        assert float((exact[0].double() - want[0][0]).abs().max()) < 1e-5


def test_the_maximum_is_online(backend: str) -> None:
    """At temperature 0.01 rows whose scores lie 150 below the largest keep their digits."""
    x = torch.nn.functional.normalize(torch.randn(200, 8))
    x[::2] *= 0.01
    y = torch.nn.functional.normalize(torch.randn(300, 8))
    y[::3] *= -1.5
    p = PairInputs(x, y, torch.tensor(100.0).double())
    want = statistics(p, "lse", True, "reference", double=True)
    got = statistics(p, "lse", True, backend)
    for k in (0, 4):  # the values of rows and of columns
        a, b = got[0][k][1], want[0][k][1]
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=3e-5)
    for name in ("x", "y"):
        error = (got[1][name].double() - want[1][name]).norm(dim=1)
        assert bool((error <= 1e-4 * want[1][name].norm(dim=1) + 1e-6).all()), name


def test_one_positive_a_row_near_zero_loss(backend: str) -> None:
    """softplus(lse_n - lse_p) + lse_p - mean_p: gradients of 1e-12 with their digits."""
    x = torch.nn.functional.normalize(torch.randn(300, 64))
    labels = torch.arange(300, dtype=torch.int32)

    def gradient(x: Tensor, name: str) -> Tensor:
        x = x.detach().requires_grad_()
        scale = torch.tensor(100.0, dtype=torch.float64)
        p = PairInputs(x, x, scale, x_labels=labels, y_labels=labels)
        rows, _ = pair_statistics(p, backend=name)
        positive, negative = rows.value
        loss = -torch.nn.functional.logsigmoid(positive - negative) + positive - rows.total[0]
        return torch.autograd.grad(loss.sum(), x)[0].double()

    want, got = gradient(x.double(), "reference"), gradient(x, backend)
    assert float(want.norm()) < 1e-4
    if backend == "reference":
        return  # eager float32: what this is better than
    assert float((got - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize("reduction", ["lse", "softplus", "relu"])
@pytest.mark.parametrize("triangle", [False, True])
def test_windows_in_float32(reduction: str, triangle: bool, streamed: str) -> None:
    """Scores that float32 holds exactly: quarters, with windows' ends on them and between."""
    generator = torch.Generator().manual_seed(11)
    whole = lambda *shape: torch.randint(-2, 3, shape, generator=generator).float()
    window = lambda n: torch.stack([whole(n) / 4 + k for k in (-2, 1, -1, 2)])
    n, m = 203, 203 if triangle else 131
    x, y = whole(n, 6), whole(m, 6)
    labels = torch.arange(max(n, m), dtype=torch.int32) % 7
    p = PairInputs(
        x,
        y,
        torch.tensor(0.25).double(),
        x_bias=whole(n) / 8,
        x_labels=labels[:n],
        y_labels=labels[:m],
        x_window=window(n),
        y_window=window(m),
        positive=Rule(-2.0, 0.25),
        negative=Rule(4.0, -0.5, 1.5),
    )
    if triangle:
        p = p._replace(y=x, y_labels=None, y_window=None, triangle=True)
    want = statistics(p, reduction, not triangle, "reference", double=True)
    compare(statistics(p, reduction, not triangle, streamed), want, BOUNDS[torch.float32])


# ---- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_empty(n: int, m: int, backend: str) -> None:
    x, y = torch.randn(n, 4, requires_grad=True), torch.randn(m, 4, requires_grad=True)
    rows, columns = pair_statistics(
        PairInputs(x, y, torch.tensor(1.0).double()), cols=True, backend=backend
    )
    assert rows.value.shape == (2, n) and columns.value.shape == (2, m)
    if n == 0 or m == 0:
        assert bool((rows.value == -torch.inf).all()) and bool((columns.best == -torch.inf).all())
    (rows.total.sum() + columns.total.sum()).backward()
    assert x.grad.shape == x.shape and y.grad.shape == y.shape


def test_nan_stays_in_what_depends_on_it(backend: str) -> None:
    x, y = torch.randn(200, 16), torch.randn(70, 16)
    x[3] = torch.nan
    p = PairInputs(x, y, torch.tensor(1.0).double())
    rows, columns = pair_statistics(p, cols=True, backend=backend)
    assert bool(rows.value[1, 3].isnan()) and bool(rows.value[1].isnan().sum() == 1)
    assert bool(columns.value[1].isnan().all())


def test_the_same_tensor_twice_gets_both_gradients(backend: str) -> None:
    x = torch.randn(50, 8, dtype=widest(backend), requires_grad=True)
    apart = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    scale = torch.tensor(1.0).double()

    def value(a: Tensor, b: Tensor) -> Tensor:
        rows, columns = pair_statistics(PairInputs(a, b, scale), cols=True, backend=backend)
        return rows.value[1].square().sum() + columns.value[1].sin().sum()

    value(x, x).backward()
    value(*apart).backward()
    near = 1e-12 if x.dtype == torch.float64 else 1e-5
    assert torch.allclose(x.grad, apart[0].grad + apart[1].grad, rtol=near, atol=near)


def test_strided_and_transposed_inputs(streamed: str) -> None:
    wide = torch.randn(40, 90)
    x, y = wide[:, ::3], torch.randn(30, 70).T
    p = PairInputs(x, y, torch.tensor(1.0).double())
    want = statistics(p, "lse", True, "reference", double=True)
    compare(statistics(p, "lse", True, streamed), want, 1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(y=torch.randn(7, 4)), ValueError, r"y: expected \[M, 3\]"),
        (dict(y=torch.randn(7, 3)), TypeError, "y: expected the dtype of x"),
        (dict(x=torch.randn(6)), ValueError, "x: expected two dimensions"),
        (dict(score="cube"), ValueError, "score: expected one of linear, root"),
        (dict(y_labels=None), ValueError, "x_labels, y_labels: expected both or neither"),
        (dict(x_labels=torch.zeros(6).long()), TypeError, "x_labels: expected int32"),
        (dict(y_bias=torch.randn(6)), ValueError, r"y_bias: expected shape \(7,\)"),
        (dict(x_window=torch.randn(2, 6)), ValueError, r"x_window: expected shape \(4, 6\)"),
    ],
)
def test_bad_input(change: dict, error: type, words: str, backend: str) -> None:
    with pytest.raises(error, match=words):
        pair_statistics(small()._replace(**change), backend=backend)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        pair_statistics(small(), reduction="max", backend=backend)
    with pytest.raises(ValueError, match="triangle: expected False"):
        pair_attention(torch.randn(6, 2), small()._replace(triangle=True), backend=backend)


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize("triangle", [False, True])
def test_the_same_bits_on_any_number_of_threads(triangle: bool) -> None:
    require("cpu")
    x, y = torch.randn(1000, 40), torch.randn(1300, 40)
    labels = torch.randint(0, 20, (1300,), dtype=torch.int32)
    p = PairInputs(x, y, torch.tensor(3.0).double(), x_labels=labels[:1000], y_labels=labels)
    if triangle:
        p = p._replace(y=x, y_labels=None, triangle=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            got, gradients = statistics(p, "lse", not triangle, "cpu")
            found.append([*got, *gradients.values()])
            if not triangle:
                out, more = attention(p, True, "cpu")
                found[-1] += [*out, *(g for g in more.values() if g is not None)]
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("gpu", CUDA)
@pytest.mark.parametrize(
    ("n", "m", "dtype"),
    # several tiles each way; one with more groups of columns than a processor has blocks
    [(170, 300, torch.float16), (20, 1300, torch.float32)],
)
def test_the_same_bits_in_any_order_of_threads_and_blocks(
    n: int, m: int, dtype: torch.dtype, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(gpu)
    x, y = torch.randn(n, 24).to(dtype), torch.randn(m, 24).to(dtype)
    labels = torch.randint(0, 6, (m,), dtype=torch.int32)
    p = PairInputs(x, y, torch.tensor(3.0).double(), x_labels=labels[:n], y_labels=labels)
    found = []
    for seed, processors in ((0, 3), (1, 1), (2, 40)):
        monkeypatch.setenv("FUSED_LOSSES_CUDA_SEED", str(seed))
        monkeypatch.setenv("FUSED_LOSSES_CUDA_PROCESSORS", str(processors))
        got, gradients = statistics(p, "lse", True, gpu)
        out, more = attention(p, True, gpu)
        found.append([*got, *out, *gradients.values(), *more.values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---- torch's own checks -------------------------------------------------------------------------


def flat(p: PairInputs) -> list:
    return list(p._replace(positive=list(p.positive), negative=list(p.negative)))


def small(requires_grad: bool = True, dtype: torch.dtype = torch.float64) -> PairInputs:
    x, y = torch.randn(6, 3, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0], dtype=torch.int32)
    tensors = x, y, torch.tensor(1.3).double(), x[:, 0].clone(), y[:, 0].clone()
    x, y, scale, x_bias, y_bias = (t.detach().requires_grad_(requires_grad) for t in tensors)
    return PairInputs(
        x, y, scale, x_bias, y_bias, x_labels=labels[:6].contiguous(), y_labels=labels
    )


def test_opcheck_statistics(streamed: str) -> None:
    dtype = widest(streamed)
    arguments = [*flat(small(dtype=dtype)), "lse", True]
    torch.library.opcheck(PAIR_STATISTICS.op(streamed), arguments)
    arguments = [*flat(small(False, dtype)), "softplus", True]
    rows, columns = PAIR_STATISTICS.op(streamed)(*arguments)
    grads = torch.randn_like(rows[:2]), torch.randn_like(columns[:2])
    # what it computes is checked above; its own gradient is not an autograd formula of one call
    torch.library.opcheck(
        PAIR_STATISTICS.op(streamed, "_backward"),
        [*grads, rows, columns, *arguments, *[True] * 5],
        test_utils=("test_schema", "test_faketensor"),
    )


def test_opcheck_attention(streamed: str) -> None:
    dtype = widest(streamed)
    values = torch.randn(7, 4, dtype=dtype, requires_grad=True)
    torch.library.opcheck(PAIR_ATTENTION.op(streamed), [values, *flat(small(dtype=dtype)), False])
    arguments = [values.detach(), *flat(small(False, dtype)), False]
    out, lse = PAIR_ATTENTION.op(streamed)(*arguments)
    torch.library.opcheck(
        PAIR_ATTENTION.op(streamed, "_backward"),
        [torch.randn_like(out), torch.randn_like(lse), out, lse, *arguments, *[True] * 6],
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.float64
@pytest.mark.parametrize(
    ("reduction", "triangle", "root"),
    [*itertools.product(("lse", "softplus"), (False, True), (False,)), ("lse", False, True)],
)
def test_gradcheck_and_gradgradcheck(
    reduction: str, triangle: bool, root: bool, backend: str
) -> None:
    p = small()
    if root:
        p = p._replace(x_bias=(p.x_bias.detach() - 30).requires_grad_(), score="root")
    if triangle:
        p = p._replace(y_bias=None, y_labels=None, triangle=True)
    names = [k for k in TENSORS if getattr(p, k) is not None and not (triangle and k == "y")]

    def f(*leaves: Tensor) -> Tensor:
        q = p._replace(**dict(zip(names, leaves, strict=True)))
        q = q._replace(y=q.x) if triangle else q
        rows, columns = pair_statistics(q, reduction=reduction, cols=not triangle, backend=backend)
        value = rows.value.sin().sum() + (rows.total * rows.value).sum()
        return value if triangle else value + columns.value.cos().sum()

    leaves = [getattr(p, k) for k in names]
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.float64
def test_gradgradcheck_of_attention(backend: str) -> None:
    p = small()
    values = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)

    def f(values: Tensor, x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return pair_attention(values, p._replace(x=x, y=y, scale=scale), backend=backend)

    assert torch.autograd.gradcheck(f, (values, p.x, p.y, p.scale))
    assert torch.autograd.gradgradcheck(f, (values, p.x, p.y, p.scale))


def test_second_derivative_under_func_is_refused(streamed: str) -> None:
    p = small(False, widest(streamed))

    def f(x: Tensor) -> Tensor:
        return pair_statistics(p._replace(x=x), backend=streamed)[0].value.sum()

    first = torch.func.grad(f)(p.x)
    leaf = p.x.clone().requires_grad_()
    assert torch.equal(first, torch.autograd.grad(f(leaf), leaf)[0])
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(p.x)


def test_compiles_whole_with_dynamic_shapes(streamed: str) -> None:
    scale = torch.tensor(2.0).double()

    def f(x: Tensor, y: Tensor) -> Tensor:
        rows, columns = pair_statistics(PairInputs(x, y, scale), cols=True, backend=streamed)
        return rows.value[1].sum() + columns.value[1].sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
        for n, m in ((9, 12), (14, 5)):
            x, y = torch.randn(n, 6, requires_grad=True), torch.randn(m, 6, requires_grad=True)
            got = torch.autograd.grad(compiled(x, y), (x, y))
            want = torch.autograd.grad(f(x, y), (x, y))
            assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))


def test_the_loss_of_the_documentation() -> None:
    text = (ROOT / "docs" / "pairs.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    space: dict[str, Any] = {"torch": torch}
    exec(code, space)
    x, labels = torch.randn(50, 8, dtype=torch.float64), torch.randint(0, 5, (50,))
    unit = torch.nn.functional.normalize(x)
    s, same = unit @ unit.T, labels[:, None] == labels
    positive = torch.logaddexp(-2 * (s - 0.5), s * 0)[same & ~torch.eye(50, dtype=torch.bool)]
    negative = torch.logaddexp(50 * (s - 0.5), s * 0)[~same]
    got = space["binomial_deviance"](x, labels)
    assert torch.allclose(got.double(), positive.mean() + negative.mean(), rtol=1e-6)

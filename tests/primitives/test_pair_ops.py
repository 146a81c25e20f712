"""The op over pairs in torch: its registration, derivatives, threads and refusals."""

from __future__ import annotations

import itertools
import re
import warnings
from typing import Any

import pytest
import torch
from conftest import CUDA, require, widest
from pair_calls import TENSORS, attention, statistics
from places import ROOT
from torch import Tensor

from fused_losses.primitives.pairs.inputs import PairInputs
from fused_losses.primitives.pairs.keeping import KEEPING
from fused_losses.primitives.pairs.op import (
    PAIR_ATTENTION,
    PAIR_STATISTICS,
    pair_attention,
    pair_statistics,
)


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
    everything = KEEPING.get(streamed, lambda *_: 0)
    some = everything(small(dtype=dtype), 1 << 40)
    for kept in (0, some):
        arguments = [*flat(small(dtype=dtype)), "lse", True, kept]
        torch.library.opcheck(PAIR_STATISTICS.op(streamed), arguments)
    *arguments, kept = *flat(small(False, dtype)), "softplus", True, some
    rows, columns, scores = PAIR_STATISTICS.op(streamed)(*arguments, kept)
    grads = torch.randn_like(rows[:2]), torch.randn_like(columns[:2])
    # what it computes is checked above; its own gradient is not an autograd formula of one call
    torch.library.opcheck(
        PAIR_STATISTICS.op(streamed, "_backward"),
        [*grads, rows, columns, scores, *arguments, *[True] * 5],
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

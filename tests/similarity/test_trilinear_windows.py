"""`trilinear_attention` within windows, causal, and of groups of heads; its literal formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import require
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from trilinear_draws import within

import fused_losses
import fused_losses.functional as fl
from fused_losses.similarity import trilinear_windows

PYTHON = ("reference", "bounded")
# queries, first and second keys, D, Dv
SHAPES = {
    "primes": (13, 13, 13, 3, 2),
    "one": (1, 1, 1, 1, 1),
    "few first": (13, 5, 11, 2, 3),
    "few queries": (3, 7, 11, 2, 3),
    "no first": (4, 0, 3, 2, 2),
    "no queries": (0, 3, 3, 2, 2),
    "no D": (3, 3, 3, 0, 2),
    "no values": (3, 3, 3, 2, 0),
}
WINDOWS: dict[str, dict[str, Any]] = {
    "both": dict(window=(4, 3)),
    "own place": dict(window=(1, 1)),
    "first": dict(window=(2, None)),
    "second": dict(window=(None, 2)),
    "causal": dict(causal=True),
    "causal, first": dict(window=(3, None), causal=True),
    "wider than all": dict(window=(100, 100)),
}


def rows(n: int, j: int, l: int, d: int, v: int, heads: int = 1, groups: int = 1) -> list[Tensor]:
    sizes = (heads * groups, n, d), (heads, j, d), (heads, l, d), (heads, j, v), (heads, l, v)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]


def literal(tensors: list[Tensor], groups: int, **options: Any) -> Tensor:
    q, *rest = tensors
    keys = [t.repeat_interleave(groups, dim=0) for t in rest]
    return torch.stack([within(*head, **options) for head in zip(q, *keys, strict=True)])


def check(found: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, want)
    slope = torch.randn_like(want)
    pairs = (torch.autograd.grad((out * slope).sum(), leaves) for out in (found, want))
    for got, right in zip(*pairs, strict=True):
        torch.testing.assert_close(got, right)


@pytest.fixture(params=[64, 600, 2 << 20])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key a block, some, and all."""
    monkeypatch.setattr(trilinear_windows, "BLOCK_BYTES", request.param)
    if request.param < 1000:
        monkeypatch.setattr(trilinear_windows, "COLUMNS", 2)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_its_formula(shape: tuple[int, ...], options: dict[str, Any], groups: int) -> None:
    leaves = rows(*shape, heads=2, groups=groups)
    found = fl.trilinear_attention(*leaves, groups=groups, **options)
    check(found, literal(leaves, groups, **options), leaves)


@pytest.mark.float64
def test_groups_of_heads_without_windows(backend: str) -> None:
    require(backend)
    leaves = rows(5, 4, 7, 3, 2, heads=2, groups=3)
    found = fl.trilinear_attention(*leaves, groups=3, backend=backend)
    assert found.shape == (6, 5, 2)
    check(found, literal(leaves, 3), leaves)


@pytest.mark.parametrize("python", PYTHON)
def test_gradcheck(python: str) -> None:
    leaves = rows(5, 6, 4, 2, 2, groups=2)
    call = lambda *t: fl.trilinear_attention(*t, window=(3, 2), groups=2, backend=python)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_errs_no_more_than_eager(dtype: torch.dtype) -> None:
    exact = [t.detach().to(dtype).double().requires_grad_() for t in rows(31, 31, 31, 16, 8)]
    weights = torch.randn(1, 31, 8, dtype=torch.float64)

    def outcome(f: Callable[..., Tensor], like: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(like).requires_grad_() for t in exact]
        out = f(*leaves)
        found = torch.autograd.grad((out.double() * weights).sum(), leaves)
        return [t.double() for t in (out, *found)]

    eager = lambda *t: literal(list(t), 1, window=(7, 5))
    ours = lambda *t: fl.trilinear_attention(*t, window=(7, 5))
    truth = outcome(eager, torch.float64)
    # of a sum's own rounding once more, where eager happens to be right
    floor = torch.finfo(dtype).eps
    for right, plain, got in zip(truth, outcome(eager, dtype), outcome(ours, dtype), strict=True):
        error, known = (got - right).norm(), (plain - right).norm()
        assert error <= 2 * known + floor * right.norm()


def test_scores_far_from_zero_keep_their_digits() -> None:
    q, k1, k2, v1, v2 = (t.detach() for t in rows(9, 9, 9, 4, 3))
    leaves = [t.requires_grad_() for t in (1e3 * q, k1, k2, v1, v2)]
    found = fl.trilinear_attention(*leaves, window=(5, 4))
    check(found, literal(leaves, 1, window=(5, 4)), leaves)


def test_leading_dimensions() -> None:
    q, k1, k2, v1, v2 = rows(5, 5, 5, 3, 2, heads=2, groups=2)
    many = [torch.stack([t, t.flip(1)]) for t in (q, k1, k2, v1, v2)]
    found = fl.trilinear_attention(*many, window=(3, 3), groups=2)
    for item in range(2):
        torch.testing.assert_close(found[item], literal([t[item] for t in many], 2, window=(3, 3)))
    nothing = [t[:0] for t in many]
    assert fl.trilinear_attention(*nothing, window=(3, 3), groups=2).shape == (0, 4, 5, 2)


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = dict(window=(None, 2), causal=True, groups=2)
    call = lambda *t: fl.trilinear_attention(*t, **options).square().sum()
    one = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 9):
        leaves = rows(n, n, n, 3, 2, groups=2)
        check(one(*leaves), call(*leaves), leaves)


def test_a_second_derivative_is_refused() -> None:
    leaves = rows(3, 3, 3, 2, 2)
    out = fl.trilinear_attention(*leaves, window=(2, 2)).sum()
    grad = torch.autograd.grad(out, leaves[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative.*einsum"):
        grad.sum().backward()


def test_what_lies_outside_of_a_window_costs_nothing() -> None:
    n, d, w1, w2 = 512, 16, 24, 8
    leaves = [t.float() for t in rows(n, n, n, d, d)]
    with FlopCounterMode(display=False) as counter:
        fl.trilinear_attention(*leaves, window=(w1, w2))
    # a product with keys and one with values, of two operations a number
    assert counter.get_total_flops() <= 2 * n * w1 * w2 * (d + d)


def test_what_explain_tells_grows_with_the_rows_alone() -> None:
    def told(n: int) -> int:
        leaves = [torch.empty(n, 16, requires_grad=True) for _ in range(5)]
        return fused_losses.explain(
            fl.trilinear_attention, *leaves, window=(64, 32)
        ).peak_extra_bytes

    few, many = told(10_000), told(20_000)
    # rows in float32 with what stands beside them, not their pairs
    assert many - few <= 10_000 * 16 * 4 * 40


def test_a_kernel_that_knows_no_order_is_refused() -> None:
    x = torch.randn(4, 3)
    for options in (dict(window=(2, None)), dict(causal=True)):
        with pytest.raises(RuntimeError, match="'cpu' cannot run .*windows.*bounded, reference"):
            fl.trilinear_attention(x, x, x, x, x, backend="cpu", **options)
    with pytest.raises(RuntimeError, match="precision='bf16'"):
        fl.trilinear_attention(x, x, x, x, x, window=(2, 2), precision="bf16")


X, HEADS = torch.zeros(4, 3), torch.zeros(2, 4, 3)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a number": (dict(window=3), TypeError, r"window: expected \(w1, w2\), .* got 3"),
    "three": (dict(window=(1, 2, 3)), TypeError, r"window: expected \(w1, w2\)"),
    "nothing": (dict(window=(0, 2)), ValueError, "window: expected a value >= 1, got 0"),
    "a float": (dict(window=(1.5, 2)), TypeError, "window: expected an integer >= 1, got 1.5"),
    "no groups": (dict(groups=0), ValueError, "groups: expected a value >= 1, got 0"),
    "no heads": (dict(groups=2), ValueError, r"q: expected \[..., groups \* H, N, D\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    options, error, message = BAD[case]
    with pytest.raises(error, match=f"^{message}"):
        fl.trilinear_attention(X, X, X, X, X, **options)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^q: expected .*groups=2 .*got shape \(2, 4, 3\)"):
        fl.trilinear_attention(HEADS, *[HEADS] * 4, groups=2)

"""Binary codes: against comparisons of all entries."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_losses.functional as fl

WIDTHS = (1, 2, 63, 64, 65, 127, 130)


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, m", [(0, 3), (3, 0), (1, 1), (7, 11)])
@pytest.mark.parametrize("d", WIDTHS)
def test_products_by_popcount(d: int, n: int, m: int) -> None:
    x, y = rows(n, d, 0), rows(m, d, 1)
    # all bits of a word, its highest included
    x[:1], y[1:2] = 1, 1
    a, b = fl.pack_codes(x), fl.pack_codes(y)
    assert a.words.shape == (n, -(-d // 64))
    signs, bits = ([torch.where(t > 0, 1, low) for t in (x, y)] for low in (-1, 0))
    assert torch.equal(fl.packed_product(a, b), (signs[0] @ signs[1].T).int())
    assert torch.equal(fl.packed_product(a, b, form="bits"), (bits[0] @ bits[1].T).int())
    assert torch.equal(fl.hamming(a, b), (bits[0][:, None] != bits[1]).sum(dim=2).int())
    assert torch.equal(fl.hamming(a), fl.hamming(a, a))


@pytest.mark.parametrize("d", [1, 3, 70])
@pytest.mark.parametrize("m", [1, 5, 9000])
def test_topk_is_that_of_all_distances_lowest_index_first(m: int, d: int) -> None:
    x, y = fl.pack_codes(rows(4, d, 2)), fl.pack_codes(rows(m, d, 3))
    every = fl.hamming(x, y).long()
    for k in {1, min(3, m), m}:
        values, index = fl.hamming_topk(x, y, k)
        want = every.sort(dim=1, stable=True)
        assert torch.equal(values.long(), want.values[:, :k])
        assert torch.equal(index, want.indices[:, :k])


def test_topk_of_no_rows() -> None:
    none = fl.pack_codes(rows(0, 5, 0))
    values, index = fl.hamming_topk(none, fl.pack_codes(rows(3, 5, 1)), 2)
    assert values.shape == index.shape == (0, 2)


@pytest.mark.parametrize("form, window", [("signs", (-1, 1)), ("bits", (0, 1))])
def test_the_gradient_goes_straight_through(form: str, window: tuple[float, float]) -> None:
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, torch.inf, -torch.inf])
    x.requires_grad_()
    off = -1 if form == "signs" else 0
    code = fl.binary_codes(x, form=form)
    assert torch.equal(code.detach(), torch.where(x.detach() > 0, 1, off).float())
    passed = (x.detach() > window[0]) & (x.detach() < window[1])
    weight = torch.arange(9.0)
    (slope,) = torch.autograd.grad(code @ weight, x)
    assert torch.equal(slope, weight * passed)
    along = (x.detach(),), (torch.ones(9),)
    tangent = torch.func.jvp(lambda x: fl.binary_codes(x, form=form), *along)[1]
    assert torch.equal(tangent, passed.float())
    assert fl.binary_codes(torch.tensor([torch.nan]), form=form).isnan().all()


def test_second_derivatives_are_those_of_what_follows() -> None:
    x = rows(3, 4, 5).double().requires_grad_()
    code = fl.binary_codes(x, window=(-9, 9))
    (slope,) = torch.autograd.grad(code.pow(3).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(slope.sum(), x)
    # of c^3, c being x's code with slope 1
    torch.testing.assert_close(again, 6 * code.detach())


def test_compiled_and_autocast() -> None:
    x = rows(3, 4, 6).requires_grad_()
    compiled = torch.compile(fl.binary_codes, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), fl.binary_codes(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fl.binary_codes(x), fl.binary_codes(x.detach()))


def test_linear_attention_of_codes() -> None:
    """ShiftAddViT's: products of codes never meet as N x N."""
    q, k, v = rows(6, 70, 7), rows(5, 70, 8), rows(5, 3, 9)
    a, b = (fl.binary_codes(t, form="bits") for t in (q, k))
    all_pairs = fl.packed_product(fl.pack_codes(q), fl.pack_codes(k), form="bits")
    torch.testing.assert_close(a @ (b.T @ v), all_pairs.float() @ v)


NO_CODES: Any = torch.ones(2, 5)
CODES = fl.pack_codes(torch.ones(2, 5))
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (lambda: fl.binary_codes(torch.ones(2).long()), TypeError, "x: expected a float"),
    "form": (lambda: fl.binary_codes(torch.ones(2), form="x"), ValueError, "form: expected one of"),
    "window": (
        lambda: fl.binary_codes(torch.ones(2), window=(1, 0)),
        ValueError,
        "window: expected low <= high",
    ),
    "a vector": (lambda: fl.pack_codes(torch.ones(2)), ValueError, "codes: expected [N, D]"),
    "no bits": (lambda: fl.pack_codes(torch.ones(2, 0)), ValueError, "codes: expected [N, D]"),
    "no codes": (lambda: fl.hamming(NO_CODES), TypeError, "x: expected PackedCodes"),
    "words": (
        lambda: fl.hamming(CODES._replace(words=CODES.words.int())),
        TypeError,
        "x.words: expected int64",
    ),
    "width": (lambda: fl.hamming(CODES, CODES._replace(width=6)), ValueError, "y: expected codes"),
    "count": (
        lambda: fl.hamming(CODES._replace(width=65)),
        ValueError,
        "x.words: expected [N, 2]",
    ),
    "k": (lambda: fl.hamming_topk(CODES, None, 3), ValueError, "k: expected at most the 2 rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, kind, told = BAD[name]
    with pytest.raises(kind, match=re.escape(told)):
        call()

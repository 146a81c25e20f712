"""Inverse powers of distances as weights: their formula, exact matches, near rows, refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pair_cases import small_blocks
from torch import Tensor

import fused_losses
import fused_losses.functional as fl

PYTHON = ("reference", "bounded")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_blocks(monkeypatch):
        yield


def smoothed(q: Tensor, k: Tensor, v: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """sum v / d^a over sum 1 / d^a, the mean of exact matches where there are some; its lse."""
    square = (q[:, None] - k).square().sum(dim=2)
    exact = square == 0
    logs = -power / 2 * torch.where(exact, 1, square).log()
    some = exact.any(dim=1, keepdim=True)
    z = torch.where(some, torch.where(exact, 0.0, -torch.inf).to(logs), logs)
    return z.softmax(dim=1) @ v, torch.where(some[:, 0], torch.inf, z.logsumexp(dim=1))


def given(n: int, m: int, d: int, tied: bool) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(*s, dtype=torch.float64) for s in ((n, d), (m, d), (m, 2)))
    if tied:
        q[0] = k[m // 2]
        k[-1] = k[m // 2]  # two keys where the row is
        q[-1] = k[0]
    power = torch.tensor(2.5, dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (q, k, v, power))


def finite(lse: Tensor) -> Tensor:
    return torch.where(lse == torch.inf, 0, lse)


@pytest.mark.parametrize("python", PYTHON)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [(19, 23, 3), (1, 1, 1), (5, 2, 1), (2, 13, 7)])
def test_attention_is_its_formula(shape: tuple[int, int, int], tied: bool, python: str) -> None:
    leaves = given(*shape, tied)
    q, k, v, power = leaves
    out, lse = fl.similarity_attention(
        q, k, v, similarity="power", scale=power, return_lse=True, backend=python
    )
    want, total = smoothed(*leaves)
    slope = torch.randn_like(want)
    torch.testing.assert_close(out, want)
    assert torch.equal(lse == torch.inf, total == torch.inf) and lse.isinf().any() == tied
    torch.testing.assert_close(finite(lse), finite(total))
    pairs = [
        torch.autograd.grad((o * slope).sum() + finite(s).sum(), leaves)
        for o, s in ((out, lse), (want, total))
    ]
    for got, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("python", PYTHON)
@pytest.mark.parametrize("tied", [False, True])
def test_sums_are_their_formula(tied: bool, python: str) -> None:
    q, k, v, power = given(19, 23, 3, tied)
    rows, columns = fl.logsumexp_similarity(
        q, k, similarity="power", scale=power, cols=True, backend=python
    )
    for got, want in (
        (rows, smoothed(q, k, v, power)[1]),
        (columns, smoothed(k, q, q.detach(), power)[1]),
    ):
        torch.testing.assert_close(got, want)
        slopes = [
            torch.autograd.grad(finite(s).sum(), (q, k, power), retain_graph=True)
            for s in (got, want)
        ]
        for a, b in zip(*slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("python", PYTHON)
def test_a_batch_leaves_itself_out(python: str) -> None:
    x = torch.randn(13, 3, dtype=torch.float64)
    x[1] = x[2]
    found = fl.logsumexp_similarity(x, similarity="power", skip_self=True, backend=python)
    assert found.isinf().tolist() == [i in (1, 2) for i in range(13)]
    apart = (x[:, None] - x).norm(dim=2).log()
    want = (-apart).masked_fill(torch.eye(13, dtype=torch.bool), -torch.inf).logsumexp(dim=1)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("python", PYTHON)
def test_masks_of_labels(python: str) -> None:
    q, k, v, power = given(11, 13, 3, True)
    labels, others = torch.arange(11) % 3, torch.arange(13) % 4
    found = fl.similarity_attention(
        *(q, k, v),
        similarity="power",
        scale=power,
        query_labels=labels,
        key_labels=others,
        match="different",
        backend=python,
    )
    for i in range(11):
        kept = others != labels[i]
        want, _ = smoothed(q[i : i + 1], k[kept], v[kept], power)
        torch.testing.assert_close(found[i : i + 1], want)


@pytest.mark.parametrize("python", PYTHON)
def test_second_derivatives_and_forward_mode(python: str) -> None:
    q, k, v, power = given(4, 5, 2, False)
    call = lambda *t: fl.similarity_attention(
        *t[:3], similarity="power", scale=t[3], backend=python
    )
    assert torch.autograd.gradgradcheck(call, (q, k, v, power), fast_mode=True)
    q, k, v, power = (t.detach() for t in given(6, 7, 2, True))
    f = lambda q: call(q, k, v, power).square().sum()
    along = torch.randn_like(q)
    moved = torch.func.jvp(f, (q,), (along,))[1]
    torch.testing.assert_close(moved, (torch.func.grad(f)(q) * along).sum())


def test_near_rows_far_from_0_keep_their_digits() -> None:
    step = (torch.randn(6, 3) * 2**6).round() / 2**10
    k = torch.full((1, 3), 1024.0) + (torch.randn(7, 3) * 2**6).round() / 2**10
    q, v = torch.full((1, 3), 1024.0) + step, torch.randn(7, 2)
    want, _ = smoothed(q.double(), k.double(), v.double(), torch.tensor(2.0))
    got = fl.similarity_attention(q, k, v, similarity="power", scale=2.0)
    # exact differences; a square of D + 2 roundings, its logarithm of one of up to 12, a softmax
    assert ((got - want).abs() <= (5 + 2 * 12 + 7) * 2.0**-24 * v.abs().max()).all()


def test_what_is_not_finite_stays_in_its_row() -> None:
    q, k, v = torch.randn(5, 3), torch.randn(6, 3), torch.randn(6, 2)
    q[2, 1] = torch.inf
    found = fl.similarity_attention(q, k, v, similarity="power")
    assert found.isnan().any(dim=1).tolist() == [False, False, True, False, False]


def test_no_kernel_has_it() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run powers of distances"):
        fl.logsumexp_similarity(x, x, similarity="power", backend="cpu")
    with fused_losses.use_backend("cpu"), pytest.raises(RuntimeError, match="no logarithm"):
        fl.similarity_attention(x, x, x, similarity="power")
    with pytest.raises(ValueError, match="zero: expected None with similarity='power'"):
        labels = torch.arange(4)
        fl.logsumexp_similarity(x, x_labels=labels, similarity="power", zero="same")

"""Sparse codes and what they decode to, against the matrix of all scores; the loss on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses import losses, sparse_codes, sparse_decode

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "atoms", "d", "k"), [(1, 1, 1, 1), (9, 70, 5, 4), (13, 31, 17, 31)])
def test_against_all_scores(n, atoms, d, k, dtype: torch.dtype, streamed: str) -> None:
    if streamed == "cuda" and dtype == torch.float64:
        return
    x, w, b = (torch.randn(s).to(dtype) for s in ((n, d), (atoms, d), (atoms,)))
    among = torch.rand(atoms) < 0.7
    among[0] = True
    for bias, some in ((None, None), (b, None), (b, among)):
        values, index = sparse_codes(x, w, k, bias=bias, among=some, backend=streamed)
        scores = x.double() @ w.double().T + (0 if bias is None else bias.double())
        scores = scores if some is None else scores.masked_fill(~some, -torch.inf)
        want = scores.sort(dim=1, descending=True, stable=True)
        real = want.values[:, :k].isfinite()
        assert torch.equal(index, torch.where(real, want.indices[:, :k], -1))
        assert (values[~real] == 0).all()
        torch.testing.assert_close(values[real].double(), want.values[:, :k][real])


@pytest.mark.float64
def test_slopes(backend: str) -> None:
    kinds = dict(dtype=torch.float64, requires_grad=True)
    x, w, b = torch.randn(5, 3, **kinds), torch.randn(12, 3, **kinds), torch.randn(12, **kinds)
    v, c = torch.randn(12, 4, **kinds), torch.randn(4, **kinds)

    def call(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
        values, index = sparse_codes(x, w, 3, bias=b, backend=backend)
        return sparse_decode(values.relu(), index, v, bias=c)

    assert torch.autograd.gradcheck(call, (x, w, b, v, c))


def test_rows_of_nan_stay_alone() -> None:
    x, w = torch.randn(4, 3), torch.randn(9, 3)
    x[1, 2] = torch.nan
    values, index = sparse_codes(x, w, 2)
    out = sparse_decode(values, index, w)
    assert (index[1] == -1).all() and out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


def test_none_is_nothing_and_empty_batches() -> None:
    w = torch.randn(6, 3, requires_grad=True)
    index = torch.tensor([[2, -1], [-1, -1]])
    out = sparse_decode(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), index, w, bias=torch.ones(3))
    torch.testing.assert_close(out, torch.stack([2 * w[2] + 1, torch.ones(3)]))
    empty = sparse_decode(torch.zeros(0, 2), index[:0], w)
    empty.sum().backward()
    assert empty.shape == (0, 3) and torch.equal(w.grad, torch.zeros(6, 3))
    values, index = sparse_codes(torch.zeros(0, 3), w, 2)
    assert values.shape == index.shape == (0, 2)


def test_no_rows_by_atoms() -> None:
    """8,192 x 16,384 scores of float32 are 512 MiB."""
    x, w = torch.randn(8_192, 16, requires_grad=True), torch.randn(16_384, 16, requires_grad=True)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return sparse_decode(*sparse_codes(x, w, 8), w).square().mean()

    assert fused_losses.explain(loss, x, w).peak_extra_bytes < 2**26


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, w: sparse_codes(x, w, 0), ValueError, "k: expected"),
        (lambda x, w: sparse_codes(x, w, 7), ValueError, "k: expected at most the 6 atoms"),
        (lambda x, w: sparse_codes(x, w.double(), 1), TypeError, "dictionary: expected the dtype"),
        (lambda x, w: sparse_codes(x, w[:, :2], 1), ValueError, "dictionary: expected"),
        (lambda x, w: sparse_codes(x, w, 1, bias=w[0]), ValueError, "bias: expected shape"),
        (lambda x, w: sparse_codes(x, w, 1, among=w[:, 0]), TypeError, "among: expected a bool"),
        (
            lambda x, w: sparse_codes(x, w, 1, among=torch.ones(5).bool()),
            ValueError,
            r"among: expected shape \(6,\)",
        ),
        (
            lambda x, w: sparse_decode(x, torch.full((4, 3), 6), w),
            IndexError,
            r"indices: expected columns in \[0, 6\)",
        ),
        (lambda x, w: sparse_decode(x, torch.zeros(4, 2), w), TypeError, "indices: expected an"),
        (
            lambda x, w: sparse_decode(x, torch.zeros(4, 2).long(), w),
            ValueError,
            "indices: expected shape",
        ),
    ],
)
def test_bad_arguments(call, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        call(torch.randn(4, 3), torch.randn(6, 3))


def test_latents_die_and_come_back() -> None:
    loss = losses.TopKSparseAutoencoderLoss(40, 6, 2, aux_k=4, dead_after=25)
    x = torch.randn(10, 6)
    seen = torch.zeros(40).bool()
    for step in range(1, 4):
        loss(x).backward()
        fired = loss.quiet_rows == 0
        seen |= fired
        assert (loss.quiet_rows[~fired] == 10 * step).all() and fired.any()
    # beyond 25 rows those that never fired are dead: their decoder learns from the error alone
    loss.zero_grad()
    loss(x).backward()
    moved = (loss.decoder.grad != 0).any(dim=1)
    assert (moved & ~seen).any()
    kept = loss.quiet_rows.clone()
    loss.eval()(x)
    assert torch.equal(loss.quiet_rows, kept)

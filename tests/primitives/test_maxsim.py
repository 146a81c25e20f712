"""MaxSim: every backend against the formula, padding, ragged documents, ties, and bad input."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import CUDA, require
from maxsim_checks import (  # noqa: F401
    test_empty,
    test_nan_reaches_its_scores_only,
    test_ties_go_to_the_first_token,
)
from torch import Tensor

from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.maxsim.op import MAXSIM, maxsim

BOUNDS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def texts(count: int, length: int, d: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, length, d, dtype=torch.float64).to(dtype)


def formula(queries: Tensor, documents: Tensor, query_mask: Tensor, mask: Tensor) -> Tensor:
    """Every product at once, padding masked. [Q, B]"""
    products = torch.einsum("qid,bjd->qbij", queries, documents)
    products = products.masked_fill(~mask[None, :, None, :], -torch.inf)
    best = products.amax(dim=3) if documents.shape[1] else products.sum(dim=3)
    some = mask.any(dim=1)[None, :, None] & query_mask[:, None, :]
    return torch.where(some, best, 0).sum(dim=2)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize(
    ("q", "lq", "b", "lb", "d"),
    [(1, 1, 1, 1, 1), (3, 5, 4, 7, 16), (8, 33, 9, 130, 65), (2, 300, 33, 3, 129)],
)
def test_against_the_formula(q, lq, b, lb, d, dtype, backend: str) -> None:
    queries, documents = texts(q, lq, d, dtype), texts(b, lb, d, dtype)
    query_mask, lengths = torch.rand(q, lq) < 0.8, torch.randint(0, lb + 1, (b,))
    mask = torch.arange(lb) < lengths[:, None]
    upstream = torch.randn(q, b, dtype=torch.float64)

    def run(function, *inputs: Tensor) -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad((out * upstream).sum(), inputs)]

    want = run(lambda a, c: formula(a, c, query_mask, mask), queries.double(), documents.double())
    given = dict(query_mask=query_mask, backend=backend)
    padded = run(lambda a, c: maxsim(a, c, lengths=lengths, **given), queries, documents)
    masked = run(lambda a, c: maxsim(a, c, document_mask=mask, **given), queries, documents)
    for k, (a, b_, w) in enumerate(zip(padded, masked, want, strict=True)):
        assert torch.equal(a, b_)
        assert float((a.double() - w).norm()) <= BOUNDS[dtype] * float(w.norm()) + 1e-9, k
    flat = documents[mask]
    ragged = run(lambda a, c: maxsim(a, c, lengths=lengths, **given), queries, flat)
    assert torch.equal(ragged[0], padded[0]) and torch.equal(ragged[2], padded[2][mask])


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "fp32"),
        (torch.float32, "bf16"),
        (torch.float64, "fp32"),
        (torch.bfloat16, "bf16"),
    ],
    ids=str,
)
def test_few_queries_have_the_bits_of_many(dtype: torch.dtype, precision: str) -> None:
    """Every width of a panel of query tokens, and documents in runs for threads."""
    require("cpu")
    if precision == "bf16" and not extension().has_bf16():
        return
    lengths = torch.randint(0, 90, (60,))
    documents = torch.randn(int(lengths.sum()), 70).to(dtype)
    run = lambda q: maxsim(q, documents, lengths=lengths, precision=precision, backend="cpu")
    for tokens in (1, 7, 8, 9, 16, 17, 31, 32, 33, 48, 49, 64, 65, 100):
        queries = torch.randn(9, tokens, 70).to(dtype)
        # more queries than a panel holds, and than a thread takes at once
        many = run(torch.cat([queries] * 12))[:9]
        assert torch.equal(many, torch.cat([run(q[None]) for q in queries])), tokens
        want = formula(queries.double(), *_padded(documents.double(), lengths))
        bound = 2e-2 if precision == "bf16" else BOUNDS[torch.float32]
        assert float((many.double() - want).norm()) <= bound * float(want.norm())


def _padded(documents: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged documents as `formula` takes them: padded, every query token, and the mask."""
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = documents.new_zeros(*mask.shape, documents.shape[1])
    padded[mask] = documents
    return padded, torch.ones(1, 1, dtype=torch.bool), mask


@pytest.mark.parametrize("gpu", CUDA)
def test_the_same_bits_in_any_order_of_threads_and_blocks(
    gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(gpu)
    # more tiles of document tokens than blocks, more query tokens than a block looks at together
    queries, documents = torch.randn(14, 37, 24), torch.randn(15, 57, 24)
    upstream, found = torch.randn(14, 15), []
    for seed, processors in ((0, 3), (1, 1), (2, 40)):
        monkeypatch.setenv("FUSED_LOSSES_CUDA_SEED", str(seed))
        monkeypatch.setenv("FUSED_LOSSES_CUDA_PROCESSORS", str(processors))
        leaves = [t.clone().requires_grad_() for t in (queries, documents)]
        scores = maxsim(*leaves, lengths=torch.arange(15) * 4, backend=gpu)
        found.append([scores.detach(), *torch.autograd.grad((scores * upstream).sum(), leaves)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.float64
def test_gradcheck(backend: str) -> None:
    queries = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    documents = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b: maxsim(a, b, backend=backend), (queries, documents)
    )


def test_opcheck(streamed: str) -> None:
    offsets = torch.tensor([0, 3, 5]), torch.tensor([0, 2, 2, 6])
    tokens = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    torch.library.opcheck(MAXSIM.op(streamed), (*tokens, *offsets, "fp32"))
    tokens = tuple(t.detach() for t in tokens)
    scores, index = MAXSIM.op(streamed)(*tokens, *offsets, "fp32")
    torch.library.opcheck(
        MAXSIM.op(streamed, "_backward"),
        (torch.randn_like(scores), index, *tokens, *offsets, True, True),
    )


def test_transforms(streamed: str) -> None:
    queries, documents = torch.randn(2, 3, 4), torch.randn(3, 5, 4)
    f = lambda q: maxsim(q, documents, backend=streamed).square().sum()
    leaf = queries.clone().requires_grad_()
    want = torch.autograd.grad(f(leaf), leaf)[0]
    assert torch.equal(torch.func.grad(f)(queries), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
        leaf = queries.clone().requires_grad_()
        assert torch.equal(torch.autograd.grad(compiled(leaf), leaf)[0], want)
    leaf = queries.clone().requires_grad_()
    first = torch.autograd.grad(f(leaf), leaf, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(queries=torch.randn(2, 4)), ValueError, "queries: expected"),
        (dict(queries=[1.0]), TypeError, "queries: expected a tensor"),
        (dict(queries=torch.ones(2, 3, 4).long()), TypeError, "queries: expected a floating"),
        (dict(documents=torch.randn(3, 5, 6)), ValueError, "documents: expected tokens of size 4"),
        (dict(documents=torch.randn(3, 5, 4).double()), TypeError, "documents: expected the dtype"),
        (dict(documents=torch.randn(15, 4)), ValueError, "lengths: expected the documents"),
        (dict(lengths=torch.tensor([1, 2])), ValueError, r"lengths: expected \[3\]"),
        (dict(lengths=torch.tensor([1, 2, 6])), ValueError, "lengths: expected at most 5"),
        (dict(lengths=torch.tensor([1, -2, 3])), ValueError, "lengths: expected values >= 0"),
        (dict(lengths=torch.rand(3)), TypeError, "lengths: expected integers"),
        (
            dict(documents=torch.randn(15, 4), lengths=torch.tensor([5, 5, 4])),
            ValueError,
            "lengths: expected a sum of 15",
        ),
        (dict(query_mask=torch.ones(2, 3)), TypeError, "query_mask: expected a bool"),
        (dict(query_mask=torch.ones(2, 4).bool()), ValueError, r"query_mask: expected \[2, 3\]"),
        (dict(document_mask=torch.ones(3).bool()), ValueError, "document_mask: expected"),
        (dict(precision="half"), ValueError, "precision: expected one of"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    given = dict(queries=torch.randn(2, 3, 4), documents=torch.randn(3, 5, 4)) | change
    with pytest.raises(error, match=words):
        maxsim(given.pop("queries"), given.pop("documents"), **given)

"""Tests of MaxSim that Triton's interpreter runs, too: modules with a `backend` import them."""

from __future__ import annotations

import pytest
import torch

from fused_losses.primitives.maxsim.op import maxsim


def test_ties_go_to_the_first_token(backend: str) -> None:
    queries = torch.ones(1, 1, 3)
    documents = torch.ones(1, 4, 3, requires_grad=True)
    maxsim(queries, documents, backend=backend).sum().backward()
    assert torch.equal(documents.grad[0].sum(dim=1), torch.tensor([3.0, 0, 0, 0]))


def test_nan_reaches_its_scores_only(backend: str) -> None:
    queries, documents = torch.randn(2, 3, 4), torch.randn(5, 6, 4)
    documents[1, 2] = torch.nan
    scores = maxsim(queries, documents, backend=backend)
    assert bool(scores[:, 1].isnan().all()) and int(scores.isnan().sum()) == 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_marks_its_texts(bad: float, backend: str) -> None:
    queries, documents = torch.randn(4, 3, 5), torch.randn(21, 5)
    queries[2, 1, 4] = documents[9, 0] = bad
    # 9 is in the third; two have no tokens
    lengths = torch.tensor([4, 0, 8, 6, 0, 3])
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[3] = False  # a query without tokens
    given = dict(lengths=lengths, query_mask=mask, backend=backend)
    scores = maxsim(queries, documents, **given)
    want = torch.zeros(4, 6, dtype=torch.bool)
    want[:, 2] = want[2, lengths > 0] = True
    assert torch.equal(scores.isnan(), want)
    assert bool((scores[:, lengths == 0] == 0).all()) and bool((scores[3, ~want[3]] == 0).all())


@pytest.mark.parametrize(("q", "b"), [(0, 3), (3, 0), (0, 0)])
def test_empty(q: int, b: int, backend: str) -> None:
    queries, documents = torch.randn(q, 2, 4, requires_grad=True), torch.randn(b, 2, 4)
    scores = maxsim(queries, documents, backend=backend)
    assert scores.shape == (q, b)
    scores.sum().backward()
    assert queries.grad.shape == queries.shape

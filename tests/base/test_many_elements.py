"""Banks of more than 2^31 elements: values of their last rows, by formulas over what counts.

All rows but a few are zeros, which no memory has to hold: the system gives one page of zeros for
all that is read and never written. A few rows lie at both ends and about element 2^31. In float64
such a bank's formula is that of these rows and of so many scores of 0.
FUSED_LOSSES_ELEMENTS=2200000000 has banks of that many elements, below 6 GiB; without it they have
some thousand rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch
from conftest import require
from torch import Tensor

from fused_losses import functional as f
from fused_losses.pairwise.topk import pairwise_topk

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("many_elements")]

WIDTH = 512
ELEMENTS = int(os.environ.get("FUSED_LOSSES_ELEMENTS", 3000 * WIDTH))
ROWS = -(-ELEMENTS // (32 * WIDTH)) * 32  # whole documents of 32 tokens
HALF = 2**31 // WIDTH  # the row at which an int32 of elements ends
AT = sorted({0, 1, *(j for j in (HALF - 1, HALF, HALF + 1) if j < ROWS - 8), ROWS - 2, ROWS - 1})
SCALE, SIZE = 0.5, 8.0
QUERIES = 3
MOST = 6 << 30  # bytes that a call ever holds
WIDENED = {"nested": 1 << 30}  # and blocks that PyTorch's own operators widen, beside a copy
PROCESS = Path("/proc/self")


@pytest.fixture(autouse=True)
def _peak_of_its_own() -> None:
    (PROCESS / "clear_refs").write_text("5")  # the peak is what is held now


def peak() -> int:
    """The most bytes that this process held since the test began."""
    told = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert told
    return int(told[1]) << 10


def bank(dtype: torch.dtype) -> Tensor:
    """[ROWS, WIDTH], of which the row AT[k] is SIZE in its coordinate k."""
    y = torch.from_numpy(numpy.zeros((ROWS, WIDTH), dtype=numpy.int16)).view(dtype)
    for k, j in enumerate(AT):
        y[j, k] = SIZE
    return y


class Rows(NamedTuple):
    """Queries, and what the rows that count are to them, in float64."""

    x: Tensor  # [N, D] of the bank's dtype
    wide: Tensor  # [N, D] float64, which may need a gradient
    products: Tensor  # [N, K] with the rows AT


def queries(dtype: torch.dtype) -> Rows:
    drawn = torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(0))
    x = drawn.to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    return Rows(x, wide, SIZE * wide[:, : len(AT)])


def lse(products: Tensor) -> Tensor:
    """log sum exp over a row's products and the zeros."""
    zeros = products.new_full((len(products), 1), 0.0) + torch.tensor(float(ROWS - len(AT))).log()
    return torch.cat([products, zeros], dim=1).logsumexp(1)


Found = tuple[Tensor, Tensor]  # what a function gave, and the formula


def logsumexp(r: Rows, y: Tensor, backend: str) -> Found:
    got = f.logsumexp_similarity(r.x, y, scale=SCALE, backend=backend)
    assert isinstance(got, Tensor)
    return got, lse(SCALE * r.products)


def rbf(r: Rows, y: Tensor, backend: str) -> Found:
    got = f.logsumexp_similarity(r.x, y, similarity="rbf", scale=0.01, backend=backend)
    assert isinstance(got, Tensor)
    own = r.wide.square().sum(1)
    return got, lse(0.01 * (2 * r.products - SIZE**2)) - 0.01 * own


def attention(r: Rows, y: Tensor, backend: str) -> Found:
    got = f.similarity_attention(r.x, y, y, scale=SCALE, backend=backend)
    assert isinstance(got, Tensor)
    weights = (SCALE * r.products - lse(SCALE * r.products)[:, None]).exp()
    return got[:, : len(AT)], SIZE * weights


def info_nce(r: Rows, y: Tensor, backend: str) -> Found:
    # the last rows are the queries' positives
    got = f.info_nce(r.x, y, temperature=2.0, offset=ROWS - QUERIES, backend=backend)
    last = torch.cat([torch.zeros(1, dtype=torch.float64), r.products[1:, -2:].diagonal()])
    return got, (lse(r.products / 2) - last / 2).mean()


def nested(r: Rows, y: Tensor, backend: str) -> Found:
    got = f.nested_info_nce(
        r.x, y, [WIDTH], temperature=2.0, offset=ROWS - QUERIES, normalize=False, backend=backend
    )
    return got, info_nce(r, y, "bounded")[1]


def cross_entropy(r: Rows, y: Tensor, backend: str) -> Found:
    labels = torch.tensor(AT[-QUERIES:])
    got = f.linear_cross_entropy(r.x, y, labels, backend=backend)
    own = r.products[:, -QUERIES:].diagonal()
    return got, (lse(r.products) - own).mean()


def margin_softmax(r: Rows, y: Tensor, backend: str) -> Found:
    labels = torch.tensor(AT[-QUERIES:])
    got = f.margin_softmax(r.x, y, labels, margin=None, scale=SIZE, backend=backend)
    cosines = r.wide[:, : len(AT)] / r.wide.norm(dim=1, keepdim=True)
    own = cosines[:, -QUERIES:].diagonal()
    return got, (lse(SIZE * cosines) - SIZE * own).mean()


def distillation(r: Rows, y: Tensor, backend: str) -> Found:
    # a teacher that is the student, turned: the same classes, other scores
    got = f.distillation(r.x, y, r.x.detach().flip(0), y, temperature=1.0, backend=backend)
    own, other = r.products, r.products.detach().flip(0)
    log_q, log_p = lse(own)[:, None], lse(other)[:, None]
    zeros = torch.zeros(QUERIES, 1, dtype=torch.float64)
    many = float(ROWS - len(AT))
    p = (torch.cat([other, zeros], 1) - log_p).exp()
    apart = (torch.cat([other, zeros], 1) - log_p) - (torch.cat([own, zeros], 1) - log_q)
    counts = torch.cat([torch.ones(len(AT), dtype=torch.float64), torch.tensor([many])])
    return got, (p * apart * counts).sum(1).mean()


def maxsim(r: Rows, y: Tensor, backend: str) -> Found:
    got = f.maxsim(r.x[None], y.view(-1, 32, WIDTH), backend=backend)[0, -1]
    # the last document's two rows that count, and zeros
    return got, r.products[:, -2:].amax(1).clamp_min(0).sum()


def distances(r: Rows, y: Tensor, backend: str) -> Found:
    got = f.pairwise_distance(r.x, y, metric="sqeuclidean", backend=backend)
    own = r.wide.square().sum(1, keepdim=True)
    return got[:, AT], own - 2 * r.products + SIZE**2


def cityblock(r: Rows, y: Tensor, backend: str) -> Found:
    got = f.pairwise_distance(r.x, y, metric="cityblock", backend=backend)
    own = r.wide.abs().sum(1, keepdim=True)
    first = r.wide[:, : len(AT)]
    return got[:, AT], own - first.abs() + (first - SIZE).abs()


FUNCTIONS: dict[str, Callable[[Rows, Tensor, str], Found]] = {
    one.__name__: one
    for one in (
        logsumexp,
        rbf,
        attention,
        info_nce,
        nested,
        cross_entropy,
        margin_softmax,
        distillation,
        maxsim,
        distances,
        cityblock,
    )
}
IN_PYTHON = ("nested",)


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    # sums of float32 over so many terms, by blocks; what is returned may be of the rows' dtype
    stored = torch.finfo(got.dtype).eps
    apart = (got.double() - want).abs().max()
    return bool(apart <= (1e-5 + stored) * want.abs().max().clamp_min(1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_last_rows_of_a_bank(name: str, dtype: torch.dtype) -> None:
    backend = "bounded" if name in IN_PYTHON else require("cpu")
    y, r = bank(dtype), queries(dtype)
    got, want = FUNCTIONS[name](r, y, backend)
    assert near(got.detach(), want.detach(), dtype)
    got.sum().backward()
    want.sum().backward()
    assert r.x.grad is not None and r.wide.grad is not None
    assert near(r.x.grad, r.wide.grad, dtype)
    assert peak() < MOST + WIDENED.get(name, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_nearest_rows_of_a_bank(dtype: torch.dtype) -> None:
    y, r = bank(dtype), queries(dtype)
    values, indices = pairwise_topk(
        r.x.detach(), y, len(AT), metric="dot", largest=True, backend=require("cpu")
    )
    of_all = torch.zeros(QUERIES, len(AT), dtype=torch.float64)
    want, places = torch.cat([r.products.detach(), of_all], 1).topk(len(AT), dim=1)
    assert torch.allclose(values.double(), want, rtol=1e-6)
    # where a row that counts beats the zeros, it is the one that is found
    some = want > 0
    known = torch.tensor(AT)[places.clamp_max(len(AT) - 1)]
    assert torch.equal(indices[some], known[some])
    assert peak() < MOST

"""The kernels of MaxSim against float64, in Triton's interpreter; run by `test_interpreted.py`.

Truth: every product at once, on float64 copies; gradients of the tokens that the kernel chose, and
that it chose rightly is checked of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from far_rows import far_rows
from maxsim_checks import (  # noqa: F401
    test_empty,
    test_nan_reaches_its_scores_only,
    test_ties_go_to_the_first_token,
)
from torch import Tensor

import fused_losses.backends
from fused_losses.primitives.maxsim import triton as backend
from fused_losses.primitives.maxsim.inputs import MaxsimInputs, MaxsimNeeds
from fused_losses.primitives.maxsim.op import maxsim

STEPS = 8  # a few: sums of a few dozen rounded terms
# exact products of 16-bit tokens: what a float32 sum rounds is all of the forward's error
FORWARD = {"fp32": 2**-22, "mixed": 2**-22, "tf32": 2**-11, "bf16": 2**-8}
BACKWARD = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass
class Case:
    """One call of the op."""

    queries: tuple[int, ...] = (3, 0, 15)  # their tokens
    documents: tuple[int, ...] = (5, 0, 19, 16)
    d: int = 24
    dtype: torch.dtype = torch.float32
    precision: str = "fp32"
    name: str = field(default="", compare=False)


@pytest.fixture(name="backend")
def _backend() -> str:
    """For the tests that come from `maxsim_checks`: all but the large ones."""
    return "triton"


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    texts = [
        torch.randn(sum(lengths), case.d, generator=g).to(case.dtype)
        for lengths in (case.queries, case.documents)
    ]
    return *texts, offsets_of(case.queries), offsets_of(case.documents)


def forward_truth(case: Case, queries: Tensor, documents: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Scores, and each document's products, in float64."""
    products = (queries.double() @ documents.double().T).split(case.documents, dim=1)
    best = [p.amax(1) if p.shape[1] else p.sum(1) for p in products]
    best = torch.stack(best, 1) if best else queries.new_zeros(len(queries), 0).double()
    return torch.stack([b.sum(0) for b in best.split(case.queries)]), list(products)


def backward_truth(
    case: Case, grad: Tensor, index: Tensor, queries: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the chosen tokens, in float64."""
    x, y = queries.double(), documents.double()
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    owners = torch.repeat_interleave(torch.tensor(case.queries))
    for b, start in enumerate(offsets_of(case.documents)[:-1].tolist()):
        if case.documents[b]:
            at, g = index[:, b].long() + start, grad.double()[owners, b, None]
            dx += g * y[at]
            dy.index_add_(0, at, g * x)
    return dx, dy


def close(got: Tensor, want: Tensor, step: float, what: str) -> None:
    """Error against the largest value."""
    assert got.shape == want.shape, what
    if want.numel():
        error = float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-3))
        assert error <= STEPS * step, f"{what}: error {error:.3g}, allowed {STEPS * step:.3g}"


def check_forward(case: Case, scores: Tensor, index: Tensor, *texts: Tensor) -> None:
    want, products = forward_truth(case, *texts[:2])
    assert scores.dtype == torch.float32 and index.dtype == torch.int32
    close(scores, want, FORWARD[case.precision], "scores")
    norms = [t.double().norm() for t in texts[:2]]
    for b, p in enumerate(products):
        at = index[:, b].long()
        if p.shape[1] == 0:
            assert (at == -1).all()
            continue
        assert (0 <= at).all() and (at < p.shape[1]).all()
        missed = p.amax(1) - p.gather(1, at[:, None])[:, 0]
        assert missed.max() <= STEPS * FORWARD[case.precision] * norms[0] * norms[1]


def check(case: Case, seed: int = 0) -> None:
    texts = inputs(case, seed)
    scores, index = backend.forward(MaxsimInputs(*texts, case.precision))
    check_forward(case, scores, index, *texts)
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed + 1))
    found = backend.backward(grad, index, MaxsimInputs(*texts), MaxsimNeeds(True, True))
    want = backward_truth(case, grad, index, *texts[:2])
    for name, a, b in zip(("queries", "documents"), found, want, strict=True):
        assert a.dtype == case.dtype
        close(a, b, BACKWARD[case.dtype], f"gradient of {name}")


CASES = [
    Case(name="ragged"),
    Case(name="one", queries=(1,), documents=(1,), d=1),
    Case(name="many-tokens", queries=(66, 2), documents=(17, 16)),
    Case(name="wide", d=130, queries=(20,), documents=(0, 19)),
    Case(name="empty-documents", documents=(0, 0)),
    *(
        Case(name=f"{p}-{d}", d=d, precision=p)
        for p, d in (("tf32", 32), ("mixed", 9), ("bf16", 130))
    ),
    *(
        Case(name=f"{str(t).split('.')[1]}-{d}", d=d, dtype=t)
        for t, d in (
            (torch.bfloat16, 32),
            (torch.bfloat16, 130),
            (torch.float16, 31),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_float64(case: Case) -> None:
    check(case)


def test_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same to the last bit where the documents come in several ragged chunks."""
    case = Case()
    texts = inputs(case)
    want = backend.forward(MaxsimInputs(*texts, "fp32"))
    monkeypatch.setattr(backend, "BEST_BYTES", 4 * sum(case.queries) * 2)
    got = backend.forward(MaxsimInputs(*texts, "fp32"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_small_float16_gradients_are_kept() -> None:
    """Down to what the result can hold: float16 ends at 6e-8."""
    case = Case(dtype=torch.float16)
    texts = inputs(case)
    scores, index = backend.forward(MaxsimInputs(*texts, "fp32"))
    grad = torch.full_like(scores, 3e-8)
    want = backward_truth(case, grad, index, *texts[:2])[1]
    got = backend.backward(grad, index, MaxsimInputs(*texts), MaxsimNeeds(False, True))[1]
    assert (got.double() - want).abs().max() <= 2**-24


def test_nan_and_infinities_are_chosen() -> None:
    """The NaN's own token; the first where every product is -inf."""
    queries = torch.ones(1, 3)
    documents = torch.ones(40, 3)
    documents[18] = torch.nan
    documents[36, 0] = torch.inf
    infinite = torch.full((20, 3), -torch.inf)
    texts = queries, torch.cat((documents, infinite)), offsets_of((1,)), offsets_of((40, 20))
    scores, index = backend.forward(MaxsimInputs(*texts, "fp32"))
    assert index.tolist() == [[18, 0]]
    assert scores[0, 0].isnan() and scores[0, 1] == -torch.inf


def test_no_width_and_no_tokens() -> None:
    for case in (Case(d=0), Case(queries=(0, 0)), Case(documents=())):
        texts = inputs(case)
        scores, index = backend.forward(MaxsimInputs(*texts, "fp32"))
        assert scores.shape == (len(case.queries), len(case.documents)) and not scores.any()
        assert index.shape == (sum(case.queries), len(case.documents))
        found = backend.backward(
            torch.ones_like(scores), index, MaxsimInputs(*texts), MaxsimNeeds(True, True)
        )
        for a, b in zip(found, texts[:2], strict=True):
            assert a.shape == b.shape and not a.any()


def test_only_what_is_needed_is_computed() -> None:
    texts = inputs(Case())
    scores, index = backend.forward(MaxsimInputs(*texts, "fp32"))
    both = backend.backward(scores, index, MaxsimInputs(*texts), MaxsimNeeds(True, True))
    for k in range(2):
        found = backend.backward(scores, index, MaxsimInputs(*texts), MaxsimNeeds(k == 0, k == 1))
        assert torch.equal(found[k], both[k]) and found[1 - k].shape == (0,)


def test_strided_and_transposed() -> None:
    case = Case()
    queries, documents, *offsets = inputs(case)
    wide = torch.zeros(len(queries), 30)
    wide[:, 3:27] = queries
    other = wide[:, 3:27], documents.T.contiguous().T, *offsets
    scores, index = backend.forward(MaxsimInputs(queries, documents, *offsets, "fp32"))
    again = backend.forward(MaxsimInputs(*other, "fp32"))
    assert torch.equal(index, again[1])
    close(again[0], scores.double(), 2**-22, "scores")
    grads = [
        backend.backward(scores, index, MaxsimInputs(*t), MaxsimNeeds(True, True))
        for t in (other, inputs(case))
    ]
    for a, b in zip(*grads, strict=True):
        close(a, b.double(), 2**-22, "gradient")


def test_offsets_past_two_to_the_31() -> None:
    near = torch.randn(3, 16).half()
    far = far_rows(near)
    offsets = offsets_of((1, 2))
    outs = [backend.forward(MaxsimInputs(t, t, offsets, offsets, "fp32")) for t in (near, far)]
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    scores, index = outs[0]
    grads = [
        backend.backward(
            scores, index, MaxsimInputs(t, t, offsets, offsets), MaxsimNeeds(True, True)
        )
        for t in (near, far)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_wired_as_a_backend() -> None:
    assert fused_losses.backends.unavailable("triton") is None
    mask = torch.rand(3, 5) < 0.7
    lengths = torch.tensor([4, 0, 7, 2])
    results = []
    for name in ("triton", "bounded"):
        g = torch.Generator().manual_seed(0)
        leaves = [torch.randn(n, m, 8, generator=g).requires_grad_() for n, m in ((3, 5), (4, 7))]
        scores = maxsim(*leaves, query_mask=mask, lengths=lengths, backend=name)
        results.append([scores.detach(), *torch.autograd.grad(scores.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        close(a, b.double(), 2**-20, "wired")


def test_same_twice() -> None:
    case = replace(CASES[0], dtype=torch.bfloat16)
    texts = inputs(case)
    first, second = (backend.forward(MaxsimInputs(*texts, "fp32")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    grads = [
        backend.backward(first[0], first[1], MaxsimInputs(*texts), MaxsimNeeds(True, True))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

"""The table of ALDR's lambdas: the authors' numbers, and where it goes with its module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from head_goldens import INDEX, exactness, golden

from fused_losses import ClassCenters, margin_softmax
from fused_losses.class_losses import (
    ALDR,
)


def test_the_authors_adaptive_lambdas(backend: str) -> None:
    dtype, within = exactness(backend)
    data = golden("ldr_ALDR", dtype)
    x = data["logits"].requires_grad_()
    table = ALDR(40, threshold=1.0, lam=1.0, alpha=2.0)
    samples = torch.randperm(40)[: len(x)]
    weight = torch.eye(x.shape[1], dtype=dtype)
    got = table(x, weight, data["labels"], samples, normalize=False, backend=backend)
    (grad,) = torch.autograd.grad(got, x)
    assert float(got.detach()) == pytest.approx(INDEX["ldr_ALDR"]["loss"], rel=within)
    torch.testing.assert_close(grad.double(), data["grad_logits"], rtol=within, atol=within)
    after = data["Lambda_after"][:, 0]
    torch.testing.assert_close(table.lams[samples], after, rtol=within, atol=within)
    others = torch.ones(40, dtype=torch.bool).index_fill(0, samples, False)
    assert (table.lams[others] == 1).all()


def some_steps(table: ALDR, steps: range) -> list[float]:
    found = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
        w = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (6,), generator=generator)
        samples = torch.randperm(20, generator=generator)[:6]
        loss = table(x, w, y, samples)
        loss.backward()
        found.append(float(loss.detach()))
    return found


def by_state(table: ALDR) -> ALDR:
    again = ALDR(20, lam=0.7)
    stored = io.BytesIO()
    torch.save(table.state_dict(), stored)
    stored.seek(0)
    again.load_state_dict(torch.load(stored))
    return again


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), by_state, lambda t: t.float()]
)
def test_the_table_goes_where_the_module_goes(way: Callable[[ALDR], ALDR]) -> None:
    table = ALDR(20, lam=0.7)
    whole = some_steps(table, range(6))
    half = ALDR(20, lam=0.7)
    assert some_steps(half, range(3)) == whole[:3]
    again = way(half)
    assert some_steps(again, range(3, 6)) == whole[3:]
    assert torch.equal(again.lams, table.lams) and again.lams.dtype == torch.float64
    assert "lam=0.7" in repr(again)


def test_it_is_no_margin() -> None:
    """Refused before a step is made, with what to write."""
    x, w, y = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])
    for call in (
        lambda: ClassCenters(4, 3, margin=ALDR(8)),
        lambda: margin_softmax(x, w, y, margin=ALDR(8)),
    ):
        with pytest.raises(TypeError, match=r"got ALDR, which is called with samples' ids, loss\("):
            call()


def test_what_changes_the_table() -> None:
    table = ALDR(8)
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    y, samples = torch.tensor([0, 1, -100, 2]), torch.tensor([5, 5, 6, 7])
    with torch.no_grad():
        table(x, w, y, samples)
    table.eval()(x, w, y, samples)
    assert (table.lams == 1).all()
    table.train()(x, w, y, samples).backward()
    each = [ALDR(1) for _ in range(2)]
    for i, one in enumerate(each):
        one(x[i : i + 1], w, y[i : i + 1], torch.tensor([0]))
    mean = torch.stack([one.lams[0] for one in each]).mean()
    torch.testing.assert_close(table.lams[5], mean, rtol=1e-6, atol=0)
    assert table.lams[6] == 1 and table.lams[7] < 1 and (table.lams[:5] == 1).all()
    before = table.lams.clone()
    table(x, w, y, samples, row_weight=torch.tensor([0.0, 0, 1, 0]))
    assert torch.equal(table.lams, before)
    assert table(x, w[:1], torch.zeros(4, dtype=torch.int64), samples).item() == pytest.approx(0)

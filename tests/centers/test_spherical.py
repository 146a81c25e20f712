"""SphericalHead: loss, gradients and table of the dense computation, whatever the classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from counted import COUNTER, told_by_child
from places import GOLDEN
from spherical_cases import ALL, RATES, C, D, N, batch, dense, head_of
from torch.utils.flop_counter import FlopCounterMode

from fused_losses import SphericalHead

LOSSES = ("z", "mse", "taylor")


@pytest.mark.parametrize("conditioned", [100.0, 1.0001])  # the latter: into the rows each step
@pytest.mark.parametrize("loss", LOSSES)
def test_walks_with_the_dense_head(loss: str, conditioned: float) -> None:
    head = head_of(loss, weight_decay=1e-2, max_condition=conditioned)
    table = torch.nn.Parameter(head.rows(ALL))
    sgd = torch.optim.SGD([table], lr=RATES[loss], weight_decay=1e-2)
    for step in range(30):
        sgd.zero_grad()
        head.optimizer.zero_grad()
        for part in range(1 + step % 2):  # two add up
            h, labels = batch(N - part, 1 + step % 3)
            labels[1], labels[2] = labels[3], -1  # the same class twice; a row without any
            got, own = head(h, torch.where(labels < 0, -100, labels)), h.detach().requires_grad_()
            want = dense(loss, table, own, labels)
            got.backward()
            want.backward()
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(h.grad, own.grad, rtol=1e-10, atol=1e-11)
        if step % 4 == 3:
            factor = float(torch.nn.utils.clip_grad_norm_([table], 0.1).clamp_min(0.1))
            assert head.grad_norm() == pytest.approx(factor, rel=1e-9)
            head.scale_grad(0.1 / (factor + 1e-6))
        head.optimizer.step()
        sgd.step()
        torch.testing.assert_close(head.rows(ALL), table.detach(), rtol=1e-9, atol=1e-10)
    assert head.drift() < 1e-12
    assert (head.table.refactored > 20) == (conditioned == 1.0001)
    assert head.condition() >= 1


def test_the_authors_numbers() -> None:
    with np.load(GOLDEN / "heads" / "spherical_z_loss.npz") as stored:
        data = {key: torch.from_numpy(stored[key]) for key in stored.files}
    classes, dim = data["W"].shape
    head = SphericalHead(classes, dim, lr=0.1, reduction="sum", dtype=torch.float64)
    h = data["H"].requires_grad_()
    loss = head.fill_(data["W"])(h, data["idx"])
    loss.backward()
    head.optimizer.step()
    torch.testing.assert_close(loss, data["loss"], rtol=1e-9, atol=0)
    torch.testing.assert_close(h.grad, data["grad_H"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        head.rows(torch.arange(classes)), data["W_new"], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(loss: str, reduction: str) -> None:
    head = SphericalHead(C, D, loss, lr=0.1, reduction=reduction, dtype=torch.float64, a=2.0, b=0.5)
    h, labels = batch(4, 2)
    assert torch.autograd.gradcheck(lambda h: head(h, labels), h)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad = torch.autograd.grad(head(h, labels), h, create_graph=True)[0]
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_storing_rows_rounds_is_known(dtype: torch.dtype) -> None:
    """gram is that of the rows as stored; the table is off by their roundings, a step each."""
    head = head_of("z", dtype, max_condition=4.0)
    table = torch.nn.Parameter(head.table.of(ALL))
    sgd = torch.optim.SGD([table], lr=RATES["z"])
    steps, largest = 100, 0.0
    for _ in range(steps):
        h, labels = batch()
        sgd.zero_grad()
        head(h.to(torch.float32), labels).backward()
        dense("z", table, h.detach().float().double(), labels).backward()
        head.optimizer.step()
        sgd.step()
        largest = max(largest, float(head.table.rows.double().norm(dim=1).max()))
    assert head.drift() < 1e-13
    off = (head.table.of(ALL) - table).norm(dim=1).max()
    # a row is written at most once a step: half a unit of its length, times mixing (its condition
    # stays below 4), which a different table's gradients then carry on
    unit = torch.finfo(dtype).eps / 2
    assert 0 < off < 4 * 4 * unit * largest * steps


def test_more_classes_cost_nothing() -> None:
    flops = []
    for classes in (100, 40_000):
        head = SphericalHead(classes, D, lr=0.1)
        h, labels = batch()
        with FlopCounterMode(display=False) as counted:
            head(h, labels).backward()
            head.optimizer.step()
        flops.append(counted.get_total_flops())
        assert head.table.refactored == 0
    assert flops[0] == flops[1] > 0


CHILD = (
    COUNTER
    + """
found = {}
for classes in (10_000, 200_000):
    head = fused_losses.SphericalHead(classes, 32, lr=0.1)
    h, labels = torch.randn(64, 32, requires_grad=True), torch.randint(0, classes, (64,))
    def step():
        head(h, labels).backward()
        head.optimizer.step()
    step()
    found[classes] = extra(step)
print(json.dumps(found))
"""
)


@pytest.mark.processes
def test_nothing_of_the_tables_height_is_allocated() -> None:
    small, large = told_by_child(CHILD, None).values()
    assert large < small + 20_000 < 2_000_000  # the table has 25.6 MB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_best_classes_and_rows(dtype: torch.dtype) -> None:
    head = head_of("z", dtype)
    for _ in range(5):
        head(*batch()).backward()
        head.optimizer.step()
    x = torch.randn(7, D)
    scores = x.double() @ head.table.of(ALL).T
    best = scores.topk(3, dim=1)
    found = head.top_classes(x, 3)
    assert torch.equal(found.classes, best.indices)
    torch.testing.assert_close(found.scores.double(), best.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        head.rows(ALL[3:5]).double(), head.table.of(ALL)[3:5].to(dtype).double()
    )

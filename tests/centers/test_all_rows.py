"""Every rank's rows on each rank, and the gradient of all ranks' losses."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.centers import all_rows
from fused_losses.functional import info_nce

N, D = 6, 8


def drawn(rank: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * seed + rank)
    return (torch.randn(*shape, generator=generator).double() / D**0.5).requires_grad_()


def gathered(rank: int) -> list[Tensor]:
    """Uneven batches: this rank's sum of losses against all keys, and its gradients."""
    n = 5 - 2 * rank
    x, y = drawn(rank, n, D), drawn(rank, n, D, seed=1)
    keys, first = all_rows(y)
    assert first == 5 * rank and keys.shape == (8, D)
    loss = info_nce(x, keys, offset=first, temperature=0.2, reduction="sum")
    twice = all_rows(y, gradient_scale="ddp_mean").rows
    assert twice.equal(keys)
    (doubled,) = torch.autograd.grad(twice.sum(), y)
    assert doubled.equal(torch.full_like(y, 4.0))  # of two ranks' sums, times two
    assert all_rows(x[:0]).rows.shape == (0, D)
    return [loss.detach(), *torch.autograd.grad(loss, (x, y))]


@pytest.mark.processes
def test_rows_of_all_ranks_carry_the_gradient_of_all_losses() -> None:
    found = processes.run(2, gathered)
    x = [drawn(rank, 5 - 2 * rank, D) for rank in range(2)]
    y = [drawn(rank, 5 - 2 * rank, D, seed=1) for rank in range(2)]
    scores = torch.cat(x) @ torch.cat(y).T / 0.2
    each = F.cross_entropy(scores, torch.arange(8), reduction="none")
    gradients = torch.autograd.grad(each.sum(), (*x, *y))
    for rank, (value, dx, dy) in enumerate(found):
        torch.testing.assert_close(value, each[5 * rank :][: 5 - 2 * rank].sum().detach())
        torch.testing.assert_close((dx, dy), (gradients[rank], gradients[2 + rank]))


def test_alone_the_rows_are_the_rows() -> None:
    x = drawn(0, N, D)
    rows, first = all_rows(x, gradient_scale="ddp_mean")
    assert rows.equal(x) and first == 0
    assert torch.autograd.grad(rows.sum(), x)[0].equal(torch.ones_like(x))


@pytest.mark.parametrize(
    "rows,options,why",
    [
        ([1.0], {}, "rows: expected a tensor"),
        (torch.tensor(1.0), {}, "rows: expected a tensor"),
        (torch.ones(2), dict(gradient_scale="mean"), "gradient_scale: expected one of"),
    ],
)
def test_bad_rows(rows: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises((TypeError, ValueError), match=why):
        all_rows(rows, **options)

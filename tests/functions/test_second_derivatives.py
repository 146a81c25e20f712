"""Second derivatives in float32 where exponentials of pairs that take no part would overflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fused_losses

LABELS = torch.arange(16) // 4


class Case(NamedTuple):
    loss: Callable[[Tensor, Tensor, str], Tensor]
    largest: float  # of the arguments of its exponentials, in size


CASES = {
    "circle": Case(
        lambda x, y, b: fused_losses.circle(x, LABELS, normalize=True, backend=b), 80 * 1.4 * 1.4
    ),
    "supervised_contrastive": Case(
        lambda x, y, b: fused_losses.supervised_contrastive(
            x, LABELS, temperature=0.01, normalize=True, backend=b
        ),
        100,
    ),
    "nt_xent": Case(
        lambda x, y, b: fused_losses.nt_xent(
            x, torch.arange(16) // 2, temperature=0.01, normalize=True, backend=b
        ),
        100,
    ),
    "info_nce": Case(
        lambda x, y, b: fused_losses.info_nce(x, y, temperature=0.01, normalize=True, backend=b),
        100,
    ),
    "generalized_lifted_structure": Case(
        lambda x, y, b: fused_losses.generalized_lifted_structure(50 * x, LABELS, backend=b), 400
    ),
    "lifted_structure": Case(
        lambda x, y, b: fused_losses.lifted_structure(50 * x, LABELS, backend=b), 400
    ),
    "kernel_mean": Case(
        lambda x, y, b: fused_losses.kernel_mean(20 * x, bandwidth=0.5, backend=b), 1e4
    ),
    "similarity_attention": Case(
        lambda x, y, b: (
            fused_losses.similarity_attention(x, y, y, similarity="cosine", scale=100.0, backend=b)
            .square()
            .sum()
        ),
        100,
    ),
    "sigmoid_contrastive": Case(
        lambda x, y, b: fused_losses.sigmoid_contrastive(
            x, y, normalize=True, scale=200.0, backend=b
        ),
        210,
    ),
}


def curvature(case: Case, x: Tensor, y: Tensor, along: Tensor, backend: str) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(case.loss(x, y, backend), x, create_graph=True)
    return torch.autograd.grad((slope * along).sum(), x)[0]


@pytest.mark.parametrize("name", CASES)
def test_float32_has_the_second_derivative_of_float64(name: str, backend: str) -> None:
    case = CASES[name]
    x, y, along = (torch.randn(16, 8) for _ in range(3))
    got = curvature(case, x, y, along, backend)
    want = curvature(case, x.double(), y.double(), along.double(), "reference")
    # an argument z is rounded to eps |z| by its product, its scale and its lse, and the second
    # derivative is a sum of products of two exponentials of it
    room = 2 * 3 * torch.finfo(torch.float32).eps * (1 + case.largest)
    assert (got - want).norm() <= room * want.norm()

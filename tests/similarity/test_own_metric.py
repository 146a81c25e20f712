"""A metric of one's own: a function of two sets of rows, in matrices and in searches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import require
from torch import Tensor, nn

import fused_losses
from fused_losses import pairwise_distance, pairwise_topk
from fused_losses.functional import radius_search
from fused_losses.pairwise.own_metric import BLOCK_ELEMENTS, BLOCK_ROWS


def chi_square(x: Tensor, y: Tensor) -> Tensor:
    """sum (x - y)^2 / (x + y + 1) of rows >= 0."""
    x, y = x[:, None], y[None]
    return ((x - y).square() / (x + y + 1)).sum(-1)


def by_hand(x: Tensor, y: Tensor) -> Tensor:
    """The same by loops over numbers."""
    lines = [
        [
            math.fsum((a - b) ** 2 / (a + b + 1) for a, b in zip(r, q, strict=True))
            for q in y.tolist()
        ]
        for r in x.tolist()
    ]
    return torch.tensor(lines, dtype=torch.float64)


class Learned(nn.Module):
    """sum_k w_k |x_k - y_k|"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, width, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((x[:, None] - y[None]).abs() * self.weight.to(x.dtype)).sum(-1)


def sides(n: int = 9, m: int = 30, d: int = 5, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(k, d, generator=generator, dtype=torch.float64).to(dtype) for k in (n, m))


BACKENDS = pytest.mark.parametrize("backend", [None, "bounded", "reference", "cpu"])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matrices(backend: str | None, dtype: torch.dtype) -> None:
    require(backend or "bounded")
    x, y = sides(dtype=dtype)
    found, right = pairwise_distance(x, y, chi_square, backend=backend), by_hand(x, y)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # a difference, a square, a sum of three, a ratio, and a sum over the coordinates
    bound = (5 + 5) * torch.finfo(found.dtype).eps * right
    assert bool(((found.double() - right).abs() <= bound).all())


def test_blocks_and_what_the_function_holds() -> None:
    """More rows and columns than a block has; gradients of a parameter."""
    d = BLOCK_ELEMENTS // BLOCK_ROWS // 40
    x, y = (t.requires_grad_() for t in sides(BLOCK_ROWS + 3, 50, d))
    learned, calls = Learned(d), []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append((len(a), len(b)))
        return learned(a, b)

    factor = torch.linspace(-1, 1, 50, dtype=torch.float64)
    given = (x, y, learned.weight)
    found = pairwise_distance(x, y, counted)
    slopes = torch.autograd.grad((found * factor).sum(), given)
    assert len(calls) == 8 and max(calls) == (BLOCK_ROWS, 40)
    apart = x.detach()[:, None] - y.detach()[None]
    sign = apart.sign() * factor[None, :, None]
    w = learned.weight.detach()
    right = (sign.sum(1) * w, -sign.sum(0) * w, (apart.abs() * factor[None, :, None]).sum((0, 1)))
    for slope, wanted in zip(slopes, right, strict=True):
        assert torch.allclose(slope, wanted, rtol=1e-12, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("largest", [None, True])
def test_searches(backend: str | None, largest: bool | None) -> None:
    require(backend or "bounded")
    x, y = sides()
    y[7] = y[3]  # equal scores go by the lowest index
    learned = Learned(5)
    options: dict[str, Any] = dict(largest=largest, backend=backend)
    values, index = pairwise_topk(x, y, 6, learned, **options)
    d = (learned.weight.detach() * (x[:, None] - y[None]).abs()).sum(-1)
    order = d.sort(dim=1, descending=bool(largest), stable=True)
    assert torch.equal(index, order.indices[:, :6])
    assert torch.allclose(values, order.values[:, :6], rtol=1e-14)
    values.sum().backward()
    assert learned.weight.grad is not None
    rows = torch.arange(9)[:, None].expand(9, 6)
    wanted = (x[rows] - y[index]).abs().sum((0, 1))
    assert torch.allclose(learned.weight.grad, wanted, rtol=1e-12)


def test_labels_ids_batches_and_a_radius() -> None:
    x, y = sides()
    labels, of_y = torch.arange(9) % 3, torch.arange(30) % 3
    d = by_hand(x, y)
    _, index = pairwise_topk(x, y, 1, chi_square, x_labels=labels, y_labels=of_y, match="different")
    assert torch.equal(index[:, 0], (d + 1e9 * (labels[:, None] == of_y)).argmin(1))
    both = torch.stack([x, x.flip(0)])
    values, _ = pairwise_topk(both, torch.stack([y, y]), 2, chi_square)
    assert torch.equal(values[0], values[1].flip(0))
    assert torch.equal(
        pairwise_distance(both, y, chi_square)[1], pairwise_distance(x, y, chi_square).flip(0)
    )
    edge = float(d.median())
    found = radius_search(x, y, edge * (1 + 1e-9), chi_square)
    assert torch.equal(found.offsets.diff(), (d <= edge * (1 + 1e-9)).sum(1))


def test_a_row_of_nan() -> None:
    x, y = sides()
    x[2, 1] = y[4, 0] = math.nan
    values, index = pairwise_topk(x, y, 30, chi_square)
    assert bool((index[2] == -1).all()) and bool(values[2].isnan().all())
    assert not bool((index == 4).any()) and bool((index[0, :29] >= 0).all())


@pytest.mark.parametrize("n, m", [(0, 4), (4, 0), (0, 0)])
def test_nothing(n: int, m: int) -> None:
    x, y = (torch.zeros(k, 3, requires_grad=True) for k in (n, m))
    found = pairwise_distance(x, y, chi_square)
    assert found.shape == (n, m)
    found.sum().backward()
    assert x.grad is not None and y.grad is not None


def test_bits() -> None:
    x, y = (t > 0.5 for t in sides())
    found = pairwise_distance(x, y, lambda a, b: (a[:, None] != b[None]).sum(-1))
    assert torch.equal(found, (x[:, None] != y[None]).sum(-1).float())


def test_derivatives_of_all_orders() -> None:
    x, y = sides(3, 4, 2)
    given = [t.requires_grad_() for t in (x + 0.1, y)]
    assert torch.autograd.gradcheck(lambda a, b: pairwise_distance(a, b, chi_square), given)
    assert torch.autograd.gradgradcheck(lambda a, b: pairwise_distance(a, b, chi_square), given)
    _, tangent = torch.func.jvp(lambda a: pairwise_distance(a, y, chi_square), (x,), (x,))
    _, wanted = torch.func.jvp(lambda a: chi_square(a, y), (x,), (x,))
    assert torch.equal(tangent, wanted)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[Tensor, Tensor], Any]]] = {
    "weights": (
        ValueError,
        "w: expected no value",
        lambda x, y: pairwise_distance(x, y, chi_square, w=torch.ones(5)),
    ),
    "p": (
        ValueError,
        "p: expected no value",
        lambda x, y: pairwise_topk(x, y, 1, chi_square, p=3.0),
    ),
    "shape": (
        ValueError,
        r"metric: .*\(9, 30\)",
        lambda x, y: pairwise_distance(x, y, lambda a, b: a),
    ),
    "number": (
        TypeError,
        "metric: .*float",
        lambda x, y: pairwise_distance(x, y, lambda a, b: 1.0),
    ),
    "triton": (
        RuntimeError,
        "metric of your own",
        lambda x, y: pairwise_distance(x, y, chi_square, backend="triton"),
    ),
    "cuda": (
        RuntimeError,
        "metric of your own",
        lambda x, y: pairwise_topk(x, y, 1, chi_square, backend="cuda"),
    ),
    "codes": (
        ValueError,
        "y: expected float rows",
        lambda x, y: pairwise_topk(x, fused_losses.quantize_rows(y), 1, chi_square),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    error, said, call = REFUSED[name]
    with pytest.raises(error, match=said):
        call(*sides(dtype=torch.float32))


def test_explain_of_what_holds_tensors() -> None:
    """And a search's memory does not grow with the bank."""
    learned = Learned(64).float()
    peaks = []
    for m in (20_000, 80_000):
        x, y = torch.rand(50, 64), torch.rand(m, 64)
        peaks.append(fused_losses.explain(pairwise_topk, x, y, 3, learned).peak_extra_bytes)
    assert peaks[1] - peaks[0] < 50 * 20_000 * 4

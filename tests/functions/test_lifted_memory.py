"""`lifted_structure` runs its passes one by one: what its backward and second derivative say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fused_losses.functional as fl
from fused_losses.functions import lifted


def literal(x: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The paper's formula, with every distance."""
    n = len(x)
    square = (x[:, None] - x).square().sum(-1)
    d = torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
    same = labels[:, None] == labels
    repel = torch.where(same, 0, (margin - d).exp()).sum(1)
    terms = (repel[:, None] + repel).log() + d
    pairs = same & (torch.arange(n)[:, None] < torch.arange(n))
    return torch.where(pairs, terms.relu().square() / 2, 0).sum() / pairs.sum()


@pytest.mark.float64
@pytest.mark.parametrize("classes", [2, 5])
def test_derivatives_of_passes_that_are_run_again(classes: int, streamed: str) -> None:
    x = torch.randn(23, 4, dtype=torch.float64, requires_grad=True)
    labels, direction = torch.arange(23) % classes, torch.randn(23, 4).double()
    found = []
    for loss in (
        fl.lifted_structure(x, labels, margin=0.7, backend=streamed),
        literal(x, labels, 0.7),
    ):
        plain = torch.autograd.grad(loss, x, retain_graph=True)[0]
        slope = torch.autograd.grad(loss, x, create_graph=True)[0]
        bend = torch.autograd.grad((slope * direction).sum(), x)[0]
        found.append((loss, slope, bend, plain))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_no_pass_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd saves of a call does not grow with the largest class."""
    saved = []
    for classes in (2, 32):
        x = torch.randn(64, 4, requires_grad=True)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t.nbytes), t)[1],  # noqa: B023
            lambda t: t,
        ):
            fl.lifted_structure(x, torch.arange(64) % classes, backend="bounded")
        saved.append(sum(kept))
    assert saved[0] == saved[1]
    runs: list[int] = []
    pairs = lifted._lifted_pairs

    def counted(*given: Tensor) -> Tensor:
        runs.append(1)
        return pairs(*given)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(lifted, "_lifted_pairs", counted)
    x = torch.randn(64, 4, requires_grad=True)
    fl.lifted_structure(x, torch.arange(64) % 2, backend="bounded").backward()
    assert len(runs) == 2 * 31

"""What autograd asks of every example of the table, so that a new loss is among them.

Finite differences, a graph that is walked twice, a checkpoint, and what lives on after the loss.
What no example says is in test_autograd.py and its like.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import MEASURED, require, widest
from example_values import DIFFERENTIABLE, fields, total
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_losses.base.examples import TABLE

SHAPE = (7, 11, 4)
# not the value's derivative, by definition: weights of pairs, a plan or one side's rows are held
HOLDING = ("SFace", "circle", "distances, scaled", "harmonic_triplet", "sinkhorn,")
HELD = [name for name in DIFFERENTIABLE if name.startswith(HOLDING)]
FIELDS = {dtype: fields(SHAPE, dtype) for dtype in (torch.float32, torch.float64)}


def leaves_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: FIELDS[dtype][k].clone().requires_grad_() for k in TABLE[name].leaves}


def value(name: str, backend: str, leaves: dict[str, Tensor]) -> Tensor:
    given = FIELDS[next(iter(leaves.values())).dtype] | leaves
    torch.manual_seed(0)  # of margins that are drawn
    return total(name, backend, SHAPE, given)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name not in HELD])
@pytest.mark.parametrize("exact", ("reference", *MEASURED))
def test_gradcheck(exact: str, name: str) -> None:
    leaves = leaves_of(name, torch.float64)

    def loss(*moved: Tensor) -> Tensor:
        return value(name, require(exact), dict(zip(leaves, moved, strict=True)))

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("name", HELD)
def test_what_is_held_has_no_part_in_the_gradient(name: str) -> None:
    leaves, step = leaves_of(name, torch.float64), 1e-6
    along = {k: torch.randn_like(leaf) for k, leaf in leaves.items()}
    ahead, behind = (
        value(name, "reference", {k: t + sign * step * along[k] for k, t in leaves.items()})
        for sign in (1, -1)
    )
    loss = value(name, "reference", leaves)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    slope = sum((g * along[k]).sum() for k, g in zip(leaves, found, strict=True) if g is not None)
    # were they equal, a difference would be off by its rounding, 1e-16 of the value over the step
    assert abs((ahead - behind) / (2 * step) - slope) > 1e-3 * abs(slope)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_graph_that_is_walked_twice_gives_the_same(name: str, backend: str) -> None:
    leaves = leaves_of(name, widest(backend))
    wanted = list(leaves.values())
    loss = value(name, backend, leaves)
    first = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, wanted, allow_unused=True)
    again = checkpoint(lambda: value(name, backend, leaves), use_reentrant=False)
    assert torch.equal(again, loss)
    third = torch.autograd.grad(again, wanted, allow_unused=True)
    for a, b, c in zip(first, second, third, strict=True):
        assert (a is None) == (b is None) == (c is None)
        assert a is None or (torch.equal(a, b) and torch.equal(a, c))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_graph_dies_with_the_loss(name: str, streamed: str) -> None:
    # a cycle through a context would keep every batch's embeddings until the collector runs
    leaves = leaves_of(name, widest(streamed))
    first = next(iter(leaves))
    moved = leaves[first] * 1
    alive = weakref.ref(moved)
    gc.disable()
    try:
        loss = value(name, streamed, leaves | {first: moved})
        loss.backward()
        del moved, loss
        assert alive() is None
    finally:
        gc.enable()

"""Forward mode: every public function's tangents, and what cannot have them says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from example_values import fields, floats, on_backend
from torch import Tensor

import fused_losses
from fused_losses.base.examples import EXACT, TABLE, UNJUDGED, Example, ExampleInputs
from fused_losses.margins import MVSoftmax

# `lifted_structure` has exponentials of both signs, whose slopes cancel to the eighth digit
ROOM = 1e-8  # of float64 sums of a few hundred terms, relative
SHAPE = (12, 17, 8)


DRAWN = fields(SHAPE, torch.float64)


def called(example: Example, leaves: dict[str, Tensor], backend: str) -> list[Tensor]:
    inputs: Any = ExampleInputs(*SHAPE, torch.float64)
    inputs.__dict__.update(DRAWN)
    for name, leaf in leaves.items():
        setattr(inputs, name, leaf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(floats(example(inputs, **on_backend(example, backend))))


DIFFERENTIABLE = [
    name
    for name, example in TABLE.items()
    if example.bound not in (EXACT, UNJUDGED) or name.startswith("topk")
]


@pytest.mark.float64
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_tangent_is_the_gradient_along_the_direction(name: str, backend: str) -> None:
    example = TABLE[name]
    given = ExampleInputs(*SHAPE, torch.float64)
    leaves = {k: getattr(given, k).detach().clone().requires_grad_() for k in example.leaves}
    along = {k: torch.randn_like(leaf) for k, leaf in leaves.items()}
    out = called(example, leaves, backend)
    weights = [torch.randn_like(o) for o in out]
    total = sum((o * w).sum() for o, w in zip(out, weights, strict=True) if o.requires_grad)
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    terms = [(g * along[k]).sum() for g, k in zip(found, leaves, strict=True) if g is not None]
    with forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(leaf.detach(), along[k]) for k, leaf in leaves.items()}
        moved = [forward_ad.unpack_dual(o).tangent for o in called(example, duals, backend)]
        parts = [(t * w).sum() for t, w in zip(moved, weights, strict=True) if t is not None]
    want, got = torch.stack(terms).sum(), torch.stack(parts).sum()
    size = torch.stack([*(t.abs() for t in terms), *(p.abs() for p in parts)]).sum()
    assert (got - want).abs() <= ROOM * size


@pytest.mark.float64
def test_the_tangent_of_info_nce_with_negatives_is_the_difference(backend: str) -> None:
    """Of the formula, which shares no code: once 0.038 where 3.155 was right."""
    x, y, far = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4), (6, 4), (6, 3, 4)))
    moves = [torch.randn_like(t) for t in (x, y, far)]

    def formula(x: Tensor, y: Tensor, far: Tensor) -> Tensor:
        a, b, c = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y, far))
        logits = torch.cat([a @ b.T, (a[:, None] * c).sum(-1)], 1) / 0.1
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(x)))

    step = 1e-6
    ahead, behind = (
        formula(*(t + sign * step * v for t, v in zip((x, y, far), moves, strict=True)))
        for sign in (1, -1)
    )
    want = (ahead - behind) / (2 * step)
    with forward_ad.dual_level():
        a, b, c = (forward_ad.make_dual(t, v) for t, v in zip((x, y, far), moves, strict=True))
        loss = fused_losses.info_nce(
            a, b, negatives=c, temperature=0.1, normalize=True, backend=backend
        )
        got = forward_ad.unpack_dual(loss).tangent
    # the difference's own error: step^2 / 6 of a third derivative near 1e3, and 1e-16 / step
    assert got is not None and (got - want).abs() <= 1e-7


@pytest.mark.float64
def test_a_loss_of_no_pairs_has_the_tangent_0(backend: str) -> None:
    """What no argument reaches moves by 0; torch ends in an internal assertion on None."""
    x = torch.randn(6, 4, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.randn_like(x))
        loss = fused_losses.all_triplets(dual, torch.arange(6), backend=backend)
        moved = forward_ad.unpack_dual(loss).tangent
    assert moved is not None and moved == 0


TRANSFORMED = [
    "info_nce, banks and negatives",
    "supervised_contrastive",
    "margin_softmax",
    "margin_softmax, sub-centres",
    "similarity_attention",
    "all_triplets",
    "pairwise_distance",
    "pairwise_distance, cityblock",
    "topk, euclidean",
    "maxsim",
    "shared_negatives",
]


def rows_only(name: str, backend: str) -> tuple[Any, Tensor]:
    """The example as a function of x alone, and x."""
    example = TABLE[name]

    def run(x: Tensor) -> Tensor:
        return called(example, {"x": x}, backend)[0].double()

    return run, ExampleInputs(*SHAPE, torch.float64).x.detach()


@pytest.mark.float64
@pytest.mark.parametrize("name", TRANSFORMED)
def test_torch_func_sees_the_same(name: str, streamed: str) -> None:
    run, x = rows_only(name, streamed)
    along = torch.randn_like(x)
    out, moved = torch.func.jvp(run, (x,), (along,))
    jacobian = torch.func.jacfwd(run)(x)
    want = torch.autograd.functional.jacobian(run, x)
    size = want.abs().max()
    assert (jacobian - want).abs().max() <= ROOM * size
    assert (
        moved - (want * along).flatten(out.dim()).sum(-1)
    ).abs().max() <= ROOM * x.numel() * size


@pytest.mark.float64
@pytest.mark.parametrize("name", TRANSFORMED[:6])
def test_forward_over_reverse_is_the_curvature(name: str, streamed: str) -> None:
    run, x = rows_only(name, streamed)
    exact, _ = rows_only(name, "reference")
    along = torch.randn_like(x)
    _, got = torch.func.jvp(torch.func.grad(lambda x: run(x).sum()), (x,), (along,))
    _, want = torch.autograd.functional.vhp(lambda x: exact(x).sum(), x, along)
    assert (got - want).abs().max() <= ROOM * want.abs().max()


@pytest.mark.float64
@pytest.mark.parametrize("name", ["info_nce", "margin_softmax", "pairwise_distance"])
def test_reverse_over_forward_is_refused(name: str, streamed: str) -> None:
    run, x = rows_only(name, streamed)
    along = torch.randn_like(x)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(run, (x,), (along,))[1].sum()

    with pytest.raises(NotImplementedError, match="second derivative.*backend='reference'"):
        torch.func.grad(tangent)(x)


@pytest.mark.float64
def test_vmap_over_rows_says_what_to_do(streamed: str) -> None:
    x, y = torch.randn(2, 5, 4), torch.randn(5, 4)
    with pytest.raises(NotImplementedError, match="vmap.*call it in a loop"):
        torch.func.vmap(lambda x: fused_losses.info_nce(x, y, backend=streamed))(x)


@pytest.mark.float64
def test_a_scale_that_bends_depend_on_is_refused(streamed: str) -> None:
    x, w, labels = torch.randn(5, 4), torch.randn(7, 4), torch.arange(5)
    with forward_ad.dual_level():
        scale = forward_ad.make_dual(torch.tensor(4.0), torch.tensor(1.0))
        with pytest.raises(NotImplementedError, match="scale.*backend='reference'"):
            fused_losses.margin_softmax(
                x, w, labels, margin=MVSoftmax(), scale=scale, backend=streamed
            )


def test_forward_mode_through_the_head_is_refused() -> None:
    head = fused_losses.ClassCenters(7, 4)
    x = torch.randn(5, 4)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="ClassCenters.*reverse mode"):
            head(x, torch.arange(5))

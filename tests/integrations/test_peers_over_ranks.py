"""Peers' losses over two ranks on our ops: each rank's value and gradients are the peer's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import copied_peers as copied
import processes
import pytest
import torch
from torch import Tensor

from fused_losses import integrations

pytestmark = [pytest.mark.processes]

N, D, C = 6, 8, 23  # rows a rank; shards of 12 and 11 classes


def drawn(rank: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * seed + rank)
    return (torch.randn(*shape, generator=generator).double() / D**0.5).requires_grad_()


Outcome = Callable[[], list[Tensor]]


def given(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def pairs_of(rank: int, build: Callable[..., Any], **further: Any) -> Outcome:
    """A loss of open_clip's, and what it is called with beside features and scale."""

    def outcome() -> list[Tensor]:
        image, text = drawn(rank, N, D), drawn(rank, N, D, seed=1)
        scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
        loss = build(rank=rank, world_size=2)
        found = loss(image, text, logit_scale=scale, **further)
        value = sum(found) if isinstance(found, tuple) else found
        return given(value, image, text, scale)

    return outcome


def clip(rank: int) -> Iterator[tuple[str, Any, Outcome]]:
    loss = pytest.importorskip("open_clip.loss", reason="the peer", exc_type=ImportError)
    teacher = dict(
        dist_image_features=drawn(rank, N, 5, seed=2).detach(),
        dist_text_features=drawn(rank, N, 5, seed=3).detach(),
        dist_logit_scale=8.0,
    )

    for local, grad in itertools.product((False, True), repeat=2):
        options = dict(local_loss=local, gather_with_grad=grad)
        told = f"local_loss={local}, gather_with_grad={grad}"
        yield f"clip, {told}", "open_clip", pairs_of(rank, partial(loss.ClipLoss, **options))
    for way in ("bidir", "shift", "reduce", "gather"):
        made = partial(loss.SigLipLoss, dist_impl=way)
        yield f"siglip, {way}", "open_clip", pairs_of(rank, made, logit_bias=-6.0)
    for local in (False, True):
        made = partial(loss.DistillClipLoss, local_loss=local, gather_with_grad=True)
        yield f"distilled, local_loss={local}", "open_clip", pairs_of(rank, made, **teacher)


def copies(rank: int) -> Iterator[tuple[str, Any, Outcome]]:
    def head(margin: Any, rate: float) -> Outcome:
        def outcome() -> list[Tensor]:
            module = copied.PartialFC_V2(margin, D, C, rate).double()
            x = drawn(rank, N, D)
            torch.manual_seed(rank)
            labels = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(rank))
            return given(module(x, labels), x, module.weight)

        return outcome

    def contrastive() -> list[Tensor]:
        x, y = drawn(rank, N, D), drawn(rank, 2 * N, D, seed=1)
        return given(copied.DistributedContrastiveLoss(1)(x, y), x, y)

    for name, margin, rate in (
        ("head", copied.CombinedMarginLoss(16.0, 1.0, 0.5, 0.0), 1.0),
        ("head, filtered", copied.CombinedMarginLoss(8.0, 1.0, 0.0, 0.3, 0.2), 1.0),
        ("head, sampled", copied.CosFace(16.0), 0.6),
    ):
        yield name, copied.PartialFC_V2, head(margin, rate)
    yield "GradCache", copied.DistributedContrastiveLoss, contrastive


def compare(rank: int, cases: Callable[[int], Iterator[tuple[str, Any, Outcome]]]) -> list[str]:
    told = []
    for name, peer, outcome in cases(rank):
        want = outcome()
        with integrations.accelerate(peer, strict=True) as acceleration:
            got = outcome()
            (ran,) = acceleration.report()
        assert ran.accelerated and not ran.left, name
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )
        told.append(name)
    return told


def test_copied_peers_on_two_ranks() -> None:
    first, second = processes.run(2, compare, copies)
    assert first == second and len(first) == 4


def test_open_clip_on_two_ranks() -> None:
    pytest.importorskip("open_clip.loss", reason="the peer", exc_type=ImportError)
    first, second = processes.run(2, compare, clip)
    assert first == second and len(first) == 10

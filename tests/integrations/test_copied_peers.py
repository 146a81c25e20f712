"""Peers whose files people copy, on our ops: by their module or class, with their results."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import copied_peers as copied
import pytest
import torch
from peer_values import Largest, check_as_the_peer
from torch import Tensor, nn

from fused_losses import integrations

P, D, C = 18, 8, 23
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).double() / D**0.5


# ---- insightface --------------------------------------------------------------------------------

COMBINED = copied.CombinedMarginLoss
HEADS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "arcface": (lambda: COMBINED(64.0, 1.0, 0.5, 0.0), 1.0),
    "cosface": (lambda: COMBINED(64.0, 1.0, 0.0, 0.4), 1.0),
    "arcface of its own class, beyond pi": (lambda: copied.ArcFace(32.0, 2.5), 1.0),
    "cosface of its own class": (lambda: copied.CosFace(16.0, 0.3), 1.0),
    "filtered": (lambda: COMBINED(8.0, 1.0, 0.5, 0.0, 0.2), 1.0),
    "sampled": (lambda: COMBINED(16.0, 1.0, 0.0, 0.4), 0.7),
    "sampled, fewer than the batch has": (lambda: copied.ArcFace(16.0, 0.3), 0.1),
}


def head_outcome(margin: nn.Module, rate: float, dtype: torch.dtype) -> list[Tensor]:
    head = copied.PartialFC_V2(margin, D, C, rate).to(dtype)
    x = drawn(P, D).to(dtype).requires_grad_()
    labels = torch.randint(0, C, (P, 1), generator=torch.Generator().manual_seed(1))
    labels[3] = -1  # of no class: pushes all of them
    torch.manual_seed(2)
    value = head(x, labels)
    assert labels.shape == (P,)
    return [value.detach(), *torch.autograd.grad(value, (x, head.weight))]


@DTYPES
@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_the_peers(name: str, dtype: torch.dtype) -> None:
    build, rate = HEADS[name]
    each = lambda dtype: head_outcome(build(), rate, dtype)
    check_as_the_peer(copied.PartialFC_V2, "PartialFC_V2", each, dtype, D)


class Scaled(nn.Module):
    def forward(self, logits: Tensor, _: Tensor) -> Tensor:
        return 8 * logits


@pytest.mark.parametrize(
    "margin,fp16,why",
    [
        (copied.ChangedMargin(), False, "computes something else here"),
        (Scaled(), False, "Scaled, a margin that is not known"),
        (copied.ArcFace(), True, "fp16=True"),
    ],
)
def test_another_margin_is_the_peers_own(margin: nn.Module, fp16: bool, why: str) -> None:
    head = copied.PartialFC_V2(margin, D, C, fp16=fp16)
    given = drawn(P, D).float(), torch.arange(P)
    want = head(*given)
    with integrations.accelerate(copied) as acceleration:
        assert head(*given).equal(want)
        (ran,) = acceleration.report()
    assert ran.accelerated == 0 and why in next(iter(ran.left))


def test_no_logits_of_all_classes() -> None:
    n, c = 256, 4096
    head = copied.PartialFC_V2(copied.ArcFace(), D, c)
    x = drawn(n, D).float().requires_grad_()
    with integrations.accelerate(copied.PartialFC_V2, strict=True), Largest() as largest:
        head(x, torch.arange(n)).backward()
    assert c * D <= largest.most < n * c // 8


# ---- GradCache ----------------------------------------------------------------------------------

TARGET = torch.tensor([3, 0, 3, 17, 5, 5])
CALLS: dict[str, tuple[int, dict[str, Any]]] = {
    "pairs": (0, {}),
    "hard negatives": (2, {}),
    "targets": (2, dict(target=TARGET)),
    "sum": (0, dict(reduction="sum")),
    "each": (1, dict(reduction="none", target=TARGET)),
}


@DTYPES
@pytest.mark.parametrize("name", CALLS)
def test_contrastive_losses_are_the_peers(name: str, dtype: torch.dtype) -> None:
    hard, options = CALLS[name]

    def each(dtype: torch.dtype) -> list[Tensor]:
        x, y = (
            4 * drawn(n, D, seed=n).to(dtype) for n in (6, 6 * (hard + 1) + ("target" in options))
        )
        x, y = x.requires_grad_(), y.requires_grad_()
        if "target" in options:
            y = torch.cat([y] * 3)
        value = copied.SimpleContrastiveLoss(hard)(x, y, **options)
        return [value.detach(), *torch.autograd.grad(value.sum(), (x, y))]

    check_as_the_peer(copied.SimpleContrastiveLoss, "SimpleContrastiveLoss", each, dtype, D)


def test_a_closure_makes_its_rows_once() -> None:
    cls, calls = copied.ContrastiveLossWithQueryClosure, []

    def each(dtype: torch.dtype) -> list[Tensor]:
        x, y = (drawn(6, D, seed=k).to(dtype).requires_grad_() for k in range(2))
        values = [cls()(y, query_closure=lambda: calls.append(1) or x), cls()(x, y)]
        return [*(v.detach() for v in values), *torch.autograd.grad(sum(values), (x, y))]

    check_as_the_peer(cls, cls.__name__, each, torch.float64, D, calls=2)
    x, y, before = drawn(6, D), drawn(6, D), len(calls)
    target = torch.full((6,), -100).index_fill(0, torch.tensor([2]), 1)
    with integrations.accelerate(cls) as acceleration:
        found = cls()(y, query_closure=lambda: calls.append(1) or x, target=target)
        (ran,) = acceleration.report()
    assert ran.left == {"targets that are ignored or out of range": 1} and len(calls) == before + 1
    assert found.equal(cls()(x, y, target=target))


def test_ignored_targets_are_the_peers_own() -> None:
    x, y = drawn(6, D), drawn(6, D, seed=1)
    target = torch.tensor([0, -100, 2, 3, 4, 5])
    want = copied.SimpleContrastiveLoss()(x, y, target)
    with integrations.accelerate(copied.SimpleContrastiveLoss) as acceleration:
        assert copied.SimpleContrastiveLoss()(x, y, target).equal(want)
        assert acceleration.report()[0].left == {"targets that are ignored or out of range": 1}


# ---- PyLate -------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("masks", ["none", "documents", "both", "numbers"])
def test_scores_are_the_peers(masks: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)

    def mask(*shape: int) -> Tensor:
        shown = torch.rand(shape, generator=generator) < 0.6
        return torch.rand(shape, generator=generator).double() if masks == "numbers" else shown

    hidden = None if masks in ("none", "documents") else mask(5, 4)
    of_documents = None if masks == "none" else mask(6, 2, 7)

    def each(dtype: torch.dtype) -> list[Tensor]:
        q = drawn(5, 4, D, seed=4).to(dtype).requires_grad_()
        d = drawn(6, 2, 7, D, seed=5).to(dtype).requires_grad_()
        told = (
            t if t is None or t.dtype == torch.bool else t.to(dtype) for t in (hidden, of_documents)
        )
        value = copied.ColBERTScores()(q, d, *told)
        slopes = drawn(5, 12, seed=6).to(dtype)
        return [value.detach(), *torch.autograd.grad(value, (q, d), slopes)]

    check_as_the_peer(copied.ColBERTScores, "ColBERTScores", each, dtype, D)


# ---- by module or class -------------------------------------------------------------------------


def test_a_module_or_a_class_is_accelerated_and_restored() -> None:
    own = vars(copied.ColBERTScores)["__call__"]
    q, d = drawn(2, 3, D), drawn(2, 1, 3, D, seed=1)
    # two files of one name are two peers
    other = types.ModuleType(copied.ColBERTScores.__module__)
    other.ColBERTScores = type("ColBERTScores", (copied.ColBERTScores,), {"__call__": own})
    with integrations.accelerate(copied.ColBERTScores) as first:
        with integrations.accelerate(other) as second:
            copied.ColBERTScores()(q, d)
            other.ColBERTScores()(q, d)
            assert [ran.accelerated for ran in second.report()] == [1]
        assert vars(other.ColBERTScores)["__call__"] is own
        assert [ran.accelerated for ran in first.report()] == [1]
    assert vars(copied.ColBERTScores)["__call__"] is own
    assert repr(second) == "<Acceleration of copied_peers, undone>"


def test_what_is_no_peer_is_named() -> None:
    for given in (nn.TripletMarginLoss, types.ModuleType("mine")):
        with pytest.raises(
            ValueError, match="a module or class with one of PartialFC_V2, .*mine|T"
        ):
            integrations.accelerate(given)
    with pytest.raises(TypeError, match="peer: expected a name, module or class, got int"):
        integrations.accelerate(3)  # pyright: ignore[reportArgumentType]

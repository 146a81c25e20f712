"""Losses of sentence-transformers on our ops: values and gradients are its own."""

from __future__ import annotations

import math
from typing import Any

import hard_data
import pytest
import torch
from peer_values import check_as_the_peer
from torch import Tensor, nn

from fused_losses import integrations

PEER = "sentence_transformers"
N, D, CLASSES = 18, 8, 6

losses = pytest.importorskip(
    "sentence_transformers.sentence_transformer.losses", reason="the peer is not installed"
)
util = pytest.importorskip("sentence_transformers.util")

KINDS = ("plain", "near duplicates", "large", "outlier")
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
DISTANCE = losses.BatchHardTripletLossDistanceFunction
COSINE = dict(distance_metric=DISTANCE.cosine_distance)
RANKING = "MultipleNegativesRankingLoss"

CALLS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ranking": (RANKING, {}, 2),
    "ranking, hard negatives": (RANKING, {}, 4),
    "ranking, products": (RANKING, dict(similarity_fct=util.dot_score, scale=1.0), 3),
    "ranking, all directions": (RANKING, dict(directions=ALL), 3),
    "ranking, per direction": (
        RANKING,
        dict(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"),
        2,
    ),
    "hardest": ("BatchHardTripletLoss", {}, 1),
    "hardest, cosine": ("BatchHardTripletLoss", dict(margin=0.2, **COSINE), 1),
    "hardest, soft": ("BatchHardSoftMarginTripletLoss", {}, 1),
    "hardest, soft, cosine": ("BatchHardSoftMarginTripletLoss", COSINE, 1),
    "semihard": ("BatchSemiHardTripletLoss", {}, 1),
    "semihard, cosine": ("BatchSemiHardTripletLoss", dict(margin=0.3, **COSINE), 1),
    "every": ("BatchAllTripletLoss", {}, 1),
    "every, cosine": ("BatchAllTripletLoss", dict(margin=0.2, **COSINE), 1),
}


def rows(kind: str, columns: int) -> list[Tensor]:
    """Columns of rows in float64, of float32's values."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(columns)]
    near = [(drawn[0] + 0.7 * each) / D**0.5 for each in drawn]
    return [hard_data.KINDS[kind](each, generator).float().double() for each in near]


def outcome(name: str, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """The loss, then the gradient of each column."""
    cls, options, columns = CALLS[name]
    given = [each.to(dtype).requires_grad_() for each in rows(kind, columns)]
    loss = getattr(losses, cls)(nn.Identity(), **options)
    value = loss.compute_loss_from_embeddings(given, torch.arange(N) % CLASSES)
    return [value.detach(), *torch.autograd.grad(value, given)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_the_peers(name: str, kind: str, dtype: torch.dtype) -> None:
    # torch's softplus is linear beyond 20, and a row's slope is that of two distances
    left_out = 2 * math.exp(-20) if "soft" in name else 0.0
    each = lambda dtype: outcome(name, kind, dtype)
    check_as_the_peer(PEER, CALLS[name][0], each, dtype, D, left_out=left_out)


def test_every_row_has_its_calls() -> None:
    assert {cls for cls, _, _ in CALLS.values()} == {
        row.name for row in integrations.table(PEER).rows
    }


@pytest.mark.parametrize(
    "cls,options,why",
    [
        (RANKING, dict(similarity_fct=lambda a, b: a @ b.T), "a function that is not known"),
        (RANKING, dict(hardness_mode="all_negatives", hardness_strength=2.0), "hardness_mode"),
        ("BatchHardTripletLoss", dict(margin=-1.0), "margin=-1.0"),
    ],
)
def test_what_is_not_covered_is_the_peers_own(cls: str, options: dict, why: str) -> None:
    given = rows("plain", 2 if cls == RANKING else 1)
    labels = torch.arange(N) % CLASSES
    loss = getattr(losses, cls)(nn.Identity(), **options)
    want = loss.compute_loss_from_embeddings(given, labels)
    with integrations.accelerate(PEER) as acceleration:
        assert loss.compute_loss_from_embeddings(given, labels).equal(want)
        (ran,) = acceleration.report()
    assert ran.accelerated == 0 and why in next(iter(ran.left))

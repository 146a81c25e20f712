"""Triplets of a batch's labels, mined and summed without the matrix of distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.sides import batch_sides
from fused_losses.functions.chosen_triplets import batch_hard_triplet
from fused_losses.functions.scored_rows import class_sizes
from fused_losses.functions.semihard import semihard_triplet
from fused_losses.functions.triplets import all_triplets
from fused_losses.integrations.acceleration import NotCovered, PeerCall, PeerRow
from fused_losses.integrations.sentence_transformers.calls import LOSSES, as_peer, named


def _batch(loss: Any, embeddings: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, dict]:
    """Rows, their labels and the distance; every row has a positive and a negative."""
    distance = named(loss.distance_metric, euclidean_distance="euclidean", cosine_distance="cosine")
    rows = embeddings[0]
    if labels.numel() != len(rows) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise NotCovered("labels that are not an integer a row")
    if rows.dtype in (torch.float16, torch.bfloat16):
        raise NotCovered("rows of 16 bits, whose distances the peer has in float32")
    labels = labels.view(-1)
    sizes = class_sizes(batch_sides(rows, labels, "mean", "fp32"))
    if bool((torch.stack(sizes) == 0).any()):
        raise NotCovered("a row without a positive or without a negative")
    return rows, labels, dict(distance=distance, normalize=distance == "cosine")


def _margin(value: Any) -> float:
    if isinstance(value, Tensor) or not value >= 0:
        raise NotCovered(f"margin={value}")
    return float(value)


def hardest(call: PeerCall, loss: Any, embeddings: list[Tensor], labels: Tensor) -> Tensor:
    rows, labels, how = _batch(loss, embeddings, labels)
    # the soft margin's class has this one's methods, and no margin
    soft = type(loss).__name__ == "BatchHardSoftMarginTripletLoss"
    margin = None if soft else _margin(loss.triplet_margin)
    value = batch_hard_triplet(rows, labels, margin=margin, backend=call.backend, **how)
    return as_peer(value, rows)


def semihard(call: PeerCall, loss: Any, embeddings: list[Tensor], labels: Tensor) -> Tensor:
    rows, labels, how = _batch(loss, embeddings, labels)
    margin = _margin(loss.margin)
    value = semihard_triplet(rows, labels, margin=margin, backend=call.backend, **how)
    return as_peer(value, rows)


def every(call: PeerCall, loss: Any, embeddings: list[Tensor], labels: Tensor) -> Tensor:
    rows, labels, how = _batch(loss, embeddings, labels)
    margin = _margin(loss.triplet_margin)
    value = all_triplets(rows, labels, margin=margin, backend=call.backend, **how)
    return as_peer(value, rows)


METHOD = "compute_loss_from_embeddings"
LEAVES = (
    "a distance of one's own; rows of 16 bits; batches with a row without a positive or without a "
    "negative"
)
TRIPLETS = (
    PeerRow(f"{LOSSES}.BatchHardTripletLoss", METHOD, hardest, "batch_hard_triplet", LEAVES),
    PeerRow(
        f"{LOSSES}.BatchHardSoftMarginTripletLoss",
        METHOD,
        hardest,
        "batch_hard_triplet(margin=None)",
        LEAVES,
    ),
    PeerRow(f"{LOSSES}.BatchSemiHardTripletLoss", METHOD, semihard, "semihard_triplet", LEAVES),
    PeerRow(f"{LOSSES}.BatchAllTripletLoss", METHOD, every, "all_triplets", LEAVES),
)

"""sentence-transformers: what computes in the place of its losses over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.sides import batch_sides
from fused_losses.functions.chosen_triplets import batch_hard_triplet
from fused_losses.functions.multiple_negatives import multiple_negatives
from fused_losses.functions.scored_rows import class_sizes
from fused_losses.functions.semihard import semihard_triplet
from fused_losses.functions.triplets import all_triplets
from fused_losses.integrations.acceleration import NotCovered, Peer, PeerCall, PeerRow

PACKAGE = "sentence_transformers"


def _named(function: Any, **names: Any) -> Any:
    """What stands for a function of the peer's own."""
    name, module = getattr(function, "__name__", ""), getattr(function, "__module__", "")
    if name not in names or module.split(".")[0] != PACKAGE:
        raise NotCovered(f"{name or type(function).__name__}, a function that is not known")
    return names[name]


def _as_peer(loss: Tensor, rows: Tensor) -> Tensor:
    return loss if torch.is_autocast_enabled(rows.device.type) else loss.to(rows.dtype)


def ranking(call: PeerCall, loss: Any, embeddings: list[Tensor], labels: Any) -> Tensor:  # noqa: ARG001
    normalize = _named(loss.similarity_fct, cos_sim=True, pytorch_cos_sim=True, dot_score=False)
    if loss.gather_across_devices:
        raise NotCovered("gather_across_devices")
    if loss.hardness_mode is not None and loss.hardness_strength > 0:
        raise NotCovered(f"hardness_mode={loss.hardness_mode}")
    if len(embeddings) < 2 or len({rows.shape for rows in embeddings}) > 1:
        raise NotCovered("columns of other shapes")
    if len(embeddings[0]) < 2:
        raise NotCovered("a row alone")
    anchor, positive, *far = embeddings
    value = multiple_negatives(
        anchor,
        positive,
        torch.stack(far, dim=1) if far else None,
        scale=loss.scale,
        directions=loss.directions,
        partition=loss.partition_mode,
        normalize=normalize,
        backend=call.backend,
    )
    return _as_peer(value, anchor)


def _batch(loss: Any, embeddings: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, dict]:
    """Rows, their labels and the distance; every row has a positive and a negative."""
    distance = _named(
        loss.distance_metric, euclidean_distance="euclidean", cosine_distance="cosine"
    )
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
    return _as_peer(value, rows)


def semihard(call: PeerCall, loss: Any, embeddings: list[Tensor], labels: Tensor) -> Tensor:
    rows, labels, how = _batch(loss, embeddings, labels)
    margin = _margin(loss.margin)
    value = semihard_triplet(rows, labels, margin=margin, backend=call.backend, **how)
    return _as_peer(value, rows)


def every(call: PeerCall, loss: Any, embeddings: list[Tensor], labels: Tensor) -> Tensor:
    rows, labels, how = _batch(loss, embeddings, labels)
    margin = _margin(loss.triplet_margin)
    value = all_triplets(rows, labels, margin=margin, backend=call.backend, **how)
    return _as_peer(value, rows)


METHOD = "compute_loss_from_embeddings"
LOSSES = "sentence_transformer.losses"
TRIPLETS = (
    "a distance of one's own; rows of 16 bits; batches with a row without a positive or without a "
    "negative"
)
PEER = Peer(
    package=PACKAGE,
    distribution="sentence-transformers",
    versions=("6.2",),
    rows=(
        PeerRow(
            f"{LOSSES}.MultipleNegativesRankingLoss",
            METHOD,
            ranking,
            "multiple_negatives",
            "a similarity of one's own; gather_across_devices; hardness_mode",
        ),
        PeerRow(f"{LOSSES}.BatchHardTripletLoss", METHOD, hardest, "batch_hard_triplet", TRIPLETS),
        PeerRow(
            f"{LOSSES}.BatchHardSoftMarginTripletLoss",
            METHOD,
            hardest,
            "batch_hard_triplet(margin=None)",
            TRIPLETS,
        ),
        PeerRow(
            f"{LOSSES}.BatchSemiHardTripletLoss", METHOD, semihard, "semihard_triplet", TRIPLETS
        ),
        PeerRow(f"{LOSSES}.BatchAllTripletLoss", METHOD, every, "all_triplets", TRIPLETS),
    ),
    left={
        "CachedMultipleNegativesRankingLoss": "computes its scores in mini-batches of rows already",
        "CoSENTLoss": "sorts the batch's scores: no matrix of pairs",
        "GISTEmbedLoss": "not yet: `info_nce(guide=...)` has the rule",
        "CachedGISTEmbedLoss": "not yet, as GISTEmbedLoss",
        "other losses": "of a row or a pair each, or of the model's layers",
    },
)

"""Losses of pairs whose negatives are the batch's other rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.integers import count_up
from fused_losses.base.numerics import no_autocast
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import number
from fused_losses.functions.info_nce import info_nce
from fused_losses.functions.multiple_negatives import (
    RankedBatch,
    RankedWay,
    multiple_negatives,
    ranked,
)
from fused_losses.integrations.acceleration import NotCovered, PeerCall, PeerRow
from fused_losses.integrations.sentence_transformers.calls import LOSSES, as_peer, finished, named
from fused_losses.integrations.sentence_transformers.gathered import agreed, everyones, over_ranks
from fused_losses.pairwise.topk import pairwise_topk


def _similarity(loss: Any) -> bool:
    """Whether rows are normalised."""
    return named(loss.similarity_fct, cos_sim=True, pytorch_cos_sim=True, dot_score=False)


def _check(loss: Any, embeddings: list[Tensor]) -> None:
    _similarity(loss)
    if loss.hardness_mode is not None and loss.hardness_strength > 0:
        raise NotCovered(f"hardness_mode={loss.hardness_mode}")
    if len(embeddings) < 2 or len({rows.shape for rows in embeddings}) > 1:
        raise NotCovered("columns of other shapes")
    if any(rows.layout != torch.strided for rows in embeddings):
        raise NotCovered("sparse rows")
    if len(embeddings[0]) < 2:
        raise NotCovered("a row alone")


def _ranked(call: PeerCall, loss: Any, embeddings: list[Tensor]) -> Tensor:
    agreed(loss, lambda: _check(loss, embeddings), embeddings[0])
    if over_ranks(loss):
        return _over_ranks(call, loss, embeddings)
    anchor, positive, *far = embeddings
    value = multiple_negatives(
        anchor,
        positive,
        torch.stack(far, dim=1) if far else None,
        scale=loss.scale,
        directions=loss.directions,
        partition=loss.partition_mode,
        normalize=_similarity(loss),
        backend=call.backend,
    )
    return as_peer(value, anchor)


def _over_ranks(call: PeerCall, loss: Any, embeddings: list[Tensor]) -> Tensor:
    """The mean over this rank's anchors, beside every rank's rows."""
    with no_autocast(embeddings[0].device):
        own = [unit(rows) if _similarity(loss) else rows for rows in embeddings]
        (anchor, first), *others = (everyones(rows) for rows in own)
        every = [anchor, *(rows for rows, _ in others)]
        local, all_ = (
            RankedBatch(x, y, torch.stack(far, dim=1) if far else None)
            for x, y, *far in (own, every)
        )
        scale = number("scale", loss.scale, anchor)
        how = RankedWay(scale, loss.directions, loss.partition_mode, "fp32", None, call.backend)
        value = ranked(local, all_, first, how).mean()
    return as_peer(value, embeddings[0])


def ranking(call: PeerCall, loss: Any, embeddings: list[Tensor], labels: Any) -> Tensor:  # noqa: ARG001
    return _ranked(call, loss, embeddings)


def cached_ranking(
    call: PeerCall,
    loss: Any,
    reps: list[list[Tensor]],
    labels: Any = None,  # noqa: ARG001
    *,
    with_backward: bool = False,
) -> Tensor:
    """All mini-batches' rows in one sweep; their gradients are left where the peer leaves them."""
    return finished(_ranked(call, loss, [torch.cat(rows) for rows in reps]), with_backward)


def contrastive_tension(call: PeerCall, loss: Any, sentence_features: Any, labels: Any) -> Tensor:  # noqa: ARG001
    """Two models' rows of one column of sentences; the scale is learned as its logarithm."""
    normalize = _similarity(loss)
    features = sentence_features[0]
    first = loss.model1(features)["sentence_embedding"]
    second = loss.model2(features)["sentence_embedding"]
    value = info_nce(
        first,
        second,
        temperature=(-loss.logit_scale).exp(),
        symmetric=True,
        normalize=normalize,
        backend=call.backend,
    )
    return as_peer(value, first)


def mega_batch(
    call: PeerCall,
    loss: Any,
    reps: list[list[Tensor]],
    labels: Any = None,  # noqa: ARG001
    *,
    with_backward: bool = False,
) -> Tensor:
    """Each anchor's nearest other positive, found without the matrix."""
    rows, columns = (torch.cat(each) for each in reps)
    if rows.shape != columns.shape or rows.dtype != columns.dtype:
        raise NotCovered("columns of other shapes or dtypes")
    with no_autocast(rows.device):
        x, y, ids = unit(rows), unit(columns), count_up(len(rows), rows)
        near, _ = pairwise_topk(x, y, 1, "dot", x_ids=ids, y_ids=ids, backend=call.backend)
        own = (x * y).sum(dim=1)
        pull = torch.relu(loss.positive_margin - own)
        value = (pull + torch.relu(near[:, 0] - loss.negative_margin)).mean()
    return finished(as_peer(value, rows), with_backward)


METHOD, CACHED = "compute_loss_from_embeddings", "calculate_loss"
LEAVES = "a similarity of one's own; hardness_mode"
SPARSE = "sparse_encoder.losses"
RANKINGS = (
    PeerRow(
        f"{LOSSES}.MultipleNegativesRankingLoss", METHOD, ranking, "multiple_negatives", LEAVES
    ),
    PeerRow(
        f"{LOSSES}.MultipleNegativesSymmetricRankingLoss",
        METHOD,
        ranking,
        'multiple_negatives(partition="per_direction")',
        LEAVES,
    ),
    PeerRow(
        f"{LOSSES}.CachedMultipleNegativesRankingLoss",
        CACHED,
        cached_ranking,
        "multiple_negatives, all mini-batches at once",
        LEAVES,
    ),
    PeerRow(
        f"{LOSSES}.CachedMultipleNegativesSymmetricRankingLoss",
        CACHED,
        cached_ranking,
        'multiple_negatives(partition="per_direction"), all mini-batches at once',
        LEAVES,
    ),
    PeerRow(
        f"{SPARSE}.SparseMultipleNegativesRankingLoss",
        METHOD,
        ranking,
        "multiple_negatives(normalize=False)",
        f"{LEAVES}; sparse tensors",
    ),
    PeerRow(
        f"{LOSSES}.ContrastiveTensionLossInBatchNegatives",
        "forward",
        contrastive_tension,
        "info_nce(symmetric=True)",
        "a similarity of one's own",
    ),
    PeerRow(
        f"{LOSSES}.MegaBatchMarginLoss",
        CACHED,
        mega_batch,
        "pairwise_topk(k=1)",
        "columns of two dtypes",
    ),
)

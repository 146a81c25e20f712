"""The cross-batch memory, without the lists of all pairs of the batch and the memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.numerics import no_autocast
from fused_losses.integrations.acceleration import Left, NotCovered, PeerCall, PeerRow
from fused_losses.integrations.pytorch_metric_learning import pairs
from fused_losses.integrations.pytorch_metric_learning.calls import (
    batch_of,
    is_peer,
    refuse_single,
)

# whose sums can leave out a column of each row
COMPUTES = {
    "CircleLoss": pairs.circle,
    "ContrastiveLoss": pairs.contrastive,
    "GeneralizedLiftedStructureLoss": pairs.generalized_lifted_structure,
    "MultiSimilarityLoss": pairs.multi_similarity,
    "NTXentLoss": pairs.nt_xent,
    "SupConLoss": pairs.supervised_contrastive,
}


def forward(
    call: PeerCall,
    memory: Any,
    embeddings: Tensor,
    labels: Tensor,
    indices_tuple: Any = None,
    enqueue_mask: Tensor | None = None,
) -> Tensor | Left:
    """The memory moves on as the peer's does; its batch meets all of it but its own copies."""
    loss = memory.loss
    if memory.miner or indices_tuple is not None or enqueue_mask is not None:
        raise NotCovered("a miner, indices_tuple or enqueue_mask, whose lists the loss is given")
    if not is_peer(loss, *COMPUTES):
        raise NotCovered(f"{type(loss).__name__}, which is given the lists of its pairs")
    if loss.collect_stats or memory.collect_stats:
        raise NotCovered("collect_stats, which reads the matrix")
    # of more rows than the memory holds some have no copy, and of one the peer keeps it
    if not 1 < len(embeddings) <= memory.memory_size or embeddings.shape[0] != labels.shape[0]:
        raise NotCovered("a batch that the memory does not hold")
    labels = labels.to(embeddings.device)
    memory.reset_stats()
    stored = memory.embedding_memory.to(embeddings.device)
    memory.embedding_memory = stored if _autocast(embeddings) else stored.to(embeddings.dtype)
    memory.label_memory = memory.label_memory.to(embeddings.device, labels.dtype)
    memory.add_to_memory(embeddings, labels, len(embeddings))
    filled = memory.memory_size if memory.has_been_filled else memory.queue_idx
    rows, told = memory.embedding_memory[:filled], memory.label_memory[:filled]
    loss.reset_stats()
    try:
        with no_autocast(embeddings.device):
            batch = batch_of(call, embeddings, labels, None, rows, told)
            refuse_single(batch)
            batch = batch._replace(exclude=memory.curr_batch_idx)
            parts = COMPUTES[type(loss).__name__](loss, batch)
    except NotCovered as why:
        # the memory has moved on: the loss alone is the peer's, of all pairs' lists
        lists = memory.create_indices_tuple(embeddings, labels, rows, told, None, True)
        return Left(loss(embeddings, labels, lists, rows, told), str(why))
    loss.add_embedding_regularization_to_loss_dict(parts, embeddings)
    return loss.reducer(parts, embeddings, labels)


def _autocast(rows: Tensor) -> bool:
    return torch.is_autocast_enabled(rows.device.type)


MEMORY = PeerRow(
    "losses.CrossBatchMemory",
    "forward",
    forward,
    "its loss, each row without its own copy",
    "a miner, indices_tuple or enqueue_mask; losses other than "
    f"{', '.join(sorted(COMPUTES))} (their own rows take the lists)",
)

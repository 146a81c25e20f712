"""PyLate: the scores of its contrastive losses, without those of all pairs of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.integrations.acceleration import NotCovered, Peer, PeerCall, PeerRow
from fused_losses.primitives.maxsim.op import maxsim


def _shown(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The peer multiplies scores by its masks, so that a hidden token's score is 0 and may win."""
    return tokens if mask is None else tokens * mask.to(tokens.dtype)[..., None]


def scores(
    call: PeerCall,
    score: Any,  # noqa: ARG001 (it has no numbers)
    queries_embeddings: Any,  # [Q, Lq, D]
    documents_embeddings: Any,  # [B, N, Ld, D]
    queries_mask: Tensor | None = None,  # [Q, Lq]
    documents_mask: Tensor | None = None,  # [B, N, Ld]
) -> Tensor:  # [Q, B N]
    """The mask of a query and of a document, any numbers, each multiply their tokens' products."""
    queries, documents = queries_embeddings, documents_embeddings
    if not (isinstance(queries, Tensor) and isinstance(documents, Tensor)):
        raise NotCovered("lists or arrays")
    if queries.dim() != 3 or documents.dim() != 4 or queries.dtype != documents.dtype:
        raise NotCovered("tokens of other shapes or dtypes")
    if 0 in (*queries.shape, *documents.shape):
        raise NotCovered("no tokens")
    found = maxsim(
        _shown(queries, queries_mask),
        _shown(documents, documents_mask).flatten(0, 1),
        backend=call.backend,
    )
    autocast = torch.is_autocast_enabled(queries.device.type)
    return found if autocast else found.to(queries.dtype)


_FUNCTION = "a function, which others hold by its name; of a query and its own documents"
PEER = Peer(
    package="pylate",
    distribution="pylate",
    versions=("1.4",),
    rows=(PeerRow("scores.ColBERTScores", "__call__", scores, "maxsim", "lists and arrays"),),
    left={
        "Contrastive": "calls its scores, which are accelerated",
        "CachedContrastive": "calls its scores, which are accelerated",
        "Distillation": "of a query and its own documents: no matrix of pairs",
        "colbert_scores": "a function, which others hold by its name; ColBERTScores is the class",
        "colbert_scores_pairwise": _FUNCTION,
        "colbert_kd_scores": _FUNCTION,
        "XTRScores": "takes the best tokens of all documents together, not of each",
    },
)

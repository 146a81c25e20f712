"""Late interaction: the scores of texts of many vectors, without those of their tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fused_losses.integrations.acceleration import Left, PeerCall, PeerRow
from fused_losses.integrations.sentence_transformers.calls import named
from fused_losses.primitives.maxsim.op import maxsim


class Scores:
    """In the place of the peer's function; why is what it was asked and did not compute itself."""

    def __init__(self, call: PeerCall, similarity: Any) -> None:
        self.call, self.similarity = call, similarity
        self.mean = named(similarity, colbert_scores=False, mean_colbert_scores=True)
        self.why: str | None = None

    def __call__(
        self,
        queries: Tensor,  # [Q, Lq, D]
        documents: Tensor,  # [B, N, Ld, D]
        *,
        queries_mask: Tensor,  # [Q, Lq]
        documents_mask: Tensor,  # [B, N, Ld]
    ) -> Tensor:  # [Q, B N]
        masks = dict(queries_mask=queries_mask, documents_mask=documents_mask)
        if any(mask.dtype != torch.bool for mask in masks.values()):
            self.why = "masks that are not bool"
        elif queries.dtype != documents.dtype:
            self.why = "tokens of two dtypes"
        elif not bool(documents_mask.any(dim=-1).all()):
            self.why = "a document without tokens"
        if self.why is not None:
            return self.similarity(queries, documents, **masks)
        found = maxsim(
            queries,
            documents.flatten(0, 1),
            query_mask=queries_mask,
            document_mask=documents_mask.flatten(0, 1),
            backend=self.call.backend,
        ).float()
        if self.mean:
            found = found / queries_mask.sum(dim=1, keepdim=True).clamp_min(1)
        return found


def interaction(call: PeerCall, loss: Any, *args: Any, **kwargs: Any) -> Tensor | Left:
    """The peer's own method, whose scores are ours."""
    scores = Scores(call, loss.similarity_fct)
    same = copy.copy(loss)
    same.similarity_fct = scores
    value = call.original(same, *args, **kwargs)
    return value if scores.why is None else Left(value, scores.why)


PATH = "multi_vector_encoder.losses"
LEAVES = "scores other than colbert_scores and mean_colbert_scores; documents without tokens"
INTERACTIONS = (
    PeerRow(
        f"{PATH}.MultiVectorMultipleNegativesRankingLoss", "forward", interaction, "maxsim", LEAVES
    ),
    PeerRow(
        f"{PATH}.CachedMultiVectorMultipleNegativesRankingLoss",
        "calculate_loss",
        interaction,
        "maxsim, a mini-batch of scores at a time",
        LEAVES,
    ),
)

"""What encoders of texts run on a CPU: sentence-transformers' losses, maxsim-cpu's scores.

A loss of sentence-transformers is given the rows that a model would make: what is measured is the
loss. The cached ones leave gradients in mini-batches of rows, which are put together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.bench.measure import Provider
from fused_losses.bench.micro.peers import peer

LOSSES = "sentence_transformers.sentence_transformer.losses"
ROWS, GUIDE = "rows", "guide"


class FeaturesGiven(nn.Module):
    """Stands for an encoder: its embeddings are in the features."""

    max_seq_length = 8

    def __init__(self, name: str, tokenizer: Any = None) -> None:
        super().__init__()
        self.name, self.tokenizer = name, tokenizer

    def __getitem__(self, _: int) -> None:
        """A first module, which a loss asks for."""

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.name]}


def multiple_negatives(x: Tensor, y: Tensor, scale: float) -> dict[str, Provider]:
    """MultipleNegativesRankingLoss, and its cached form in its usual mini-batches."""
    losses = peer(LOSSES)
    if losses is None:
        return {}
    model = FeaturesGiven(ROWS)
    plain = losses.MultipleNegativesRankingLoss(model, scale=scale)
    cached = losses.CachedMultipleNegativesRankingLoss(model, scale=scale)

    def at_once() -> Tensor:
        loss = plain.compute_loss_from_embeddings([x, y], None)
        loss.backward()
        return loss.detach()

    return {
        "sentence-transformers": at_once,
        "sentence-transformers, cached": _cached(cached, [x, y]),
    }


def guided(
    x: Tensor, y: Tensor, x_guide: Tensor, y_guide: Tensor, temperature: float
) -> dict[str, Provider]:
    """GISTEmbedLoss, and its cached form."""
    losses, transformers, tokenizers = map(peer, (LOSSES, "transformers", "tokenizers"))
    if losses is None or transformers is None or tokenizers is None:
        return {}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    models = [FeaturesGiven(name, tokenizer) for name in (ROWS, GUIDE)]
    plain, cached = (
        kind(*models, temperature=temperature)
        for kind in (losses.GISTEmbedLoss, losses.CachedGISTEmbedLoss)
    )
    told = [{ROWS: rows, GUIDE: guide} for rows, guide in ((x, x_guide), (y, y_guide))]

    def at_once() -> Tensor:
        loss = plain(told, None)
        loss.backward()
        return loss.detach()

    return {
        "sentence-transformers": at_once,
        "sentence-transformers, cached": _cached(cached, [x, y], [x_guide, y_guide]),
    }


def _cached(loss: Any, columns: Sequence[Tensor], *further: Sequence[Tensor]) -> Provider:
    size = loss.mini_batch_size

    def run() -> Tensor:
        parts = [[p.detach().requires_grad_() for p in rows.split(size)] for rows in columns]
        given = [[list(rows.split(size)) for rows in each] for each in further]
        value = loss.calculate_loss(parts, *given, with_backward=True)
        for rows, found in zip(columns, parts, strict=True):
            rows.grad = torch.cat([part.grad for part in found if part.grad is not None])
        return value.detach()

    return run


def maxsim_scores(queries: Tensor, documents: Tensor) -> dict[str, Provider]:
    """maxsim-cpu's, which takes a query at a time: [Q, Lq, D], [B, Ld, D] -> [Q, B]."""
    found = peer("maxsim_cpu") if queries.device.type == "cpu" else None
    if found is None:
        return {}
    scores = found.maxsim_scores

    def run() -> Tensor:
        held = documents.numpy()
        return torch.stack([torch.from_numpy(scores(q.numpy(), held)) for q in queries])

    return {"maxsim-cpu": run}

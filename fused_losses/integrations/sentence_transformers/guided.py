"""GISTEmbed: negatives that a guide finds no nearer than the positive, without the two matrices."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.functions.joint_pairs import guided_contrastive
from fused_losses.integrations.acceleration import Left, NotCovered, PeerCall, PeerRow
from fused_losses.integrations.sentence_transformers.calls import LOSSES, as_peer, finished
from fused_losses.integrations.sentence_transformers.gathered import agreed, over_ranks, own_first


class Given(nn.Module):
    """Stands for a model whose rows are there already, a column a call."""

    def __init__(self, columns: Sequence[Tensor]) -> None:
        super().__init__()
        self.columns = iter(columns)

    def forward(self, _: Any) -> dict[str, Tensor]:
        return {"sentence_embedding": next(self.columns)}


def _check(loss: Any, rows: Sequence[Tensor], guides: Sequence[Tensor]) -> None:
    if type(loss.similarity_fct) is not nn.CosineSimilarity:
        raise NotCovered(f"{type(loss.similarity_fct).__name__}, a function that is not known")
    if len({each.shape for each in rows}) > 1 or len({each.shape for each in guides}) > 1:
        raise NotCovered("columns of other shapes")
    if len({each.dtype for each in (*rows, *guides)}) > 1:
        raise NotCovered("a guide of another dtype")
    if rows[0].dtype not in (torch.float32, torch.float64):
        raise NotCovered("rows of 16 bits, whose masks the peer takes of rounded cosines")
    own = torch.cosine_similarity(guides[0], guides[1])
    relative = loss.margin_strategy == "relative"
    limit = own - loss.margin * (own.abs() if relative else 1)
    # the cosine of a row and itself is 1 within its sum's rounding; the peer keeps such a pair
    spare = (guides[0].shape[1] + 8) * torch.finfo(own.dtype).eps
    if loss.contrast_anchors or loss.contrast_positives:
        within = limit > 1 - spare
        short = torch.stack([each.norm(dim=1) for each in guides]).amin(dim=0) < 1e-6
        if bool((within | short).any()):
            raise NotCovered("a row that its guide lets meet itself")


def guided(call: PeerCall, loss: Any, rows: Sequence[Tensor], guides: Sequence[Tensor]) -> Tensor:
    """The loss of an anchor, a positive and any further columns of negatives, [N, D] each."""
    agreed(loss, lambda: _check(loss, rows, guides), rows[0])
    anchor, positive, *far = rows
    anchor_guide, positive_guide, *far_guide = guides
    if over_ranks(loss):
        positive, *far = (own_first(each) for each in (positive, *far))
        positive_guide, *far_guide = (own_first(each) for each in (positive_guide, *far_guide))
    value = guided_contrastive(
        anchor,
        positive,
        anchor_guide,
        positive_guide,
        negatives=torch.cat(far) if far else None,
        negatives_guide=torch.cat(far_guide) if far else None,
        temperature=loss.temperature,
        margin=loss.margin,
        strategy=loss.margin_strategy,
        anchors=loss.contrast_anchors,
        positives=loss.contrast_positives,
        backend=call.backend,
    )
    return as_peer(value, anchor)


def gist(call: PeerCall, loss: Any, sentence_features: Any, labels: Any) -> Tensor | Left:
    """Both models embed as the peer lets them; what is not covered then is the peer's, on these."""
    if not isinstance(sentence_features, list | tuple):
        raise NotCovered("features that can be read once")
    if len(sentence_features) not in (2, 3):
        raise NotCovered(f"{len(sentence_features)} columns")
    if loss.must_retokenize and any("cu_seq_lens_q" in each for each in sentence_features):
        raise NotCovered("flattened columns and a guide with another tokenizer")
    from sentence_transformers.base.losses.merged_forward import (
        column_merging_disabled,
        embed_columns,
    )

    # the guide writes into what it is given
    told = [dict(features) for features in sentence_features]
    rows = embed_columns(loss.model, sentence_features)
    with torch.no_grad():
        if loss.must_retokenize:
            told = [_retokenized(loss, features) for features in sentence_features]
        guides = embed_columns(loss.guide, told)
    try:
        return guided(call, loss, rows, guides)
    except NotCovered as left:
        same = copy.copy(loss)
        models = dict(model=Given(rows), guide=Given(guides))
        same.__dict__["_modules"] = {**loss._modules, **models}
        same.must_retokenize = False
        with column_merging_disabled():
            return Left(call.original(same, sentence_features, labels), str(left))


def _retokenized(loss: Any, features: dict[str, Any]) -> dict[str, Any]:
    """A column's texts again, as the guide's own tokenizer has them."""
    from sentence_transformers.util import batch_to_device

    texts = loss.tokenizer.batch_decode(features["input_ids"], skip_special_tokens=True)
    return batch_to_device(loss.guide.preprocess(texts), loss.guide.device)


def cached_gist(
    call: PeerCall,
    loss: Any,
    reps: list[list[Tensor]],
    reps_guided: list[list[Tensor]],
    *,
    with_backward: bool = False,
) -> Tensor:
    rows, guides = ([torch.cat(each) for each in columns] for columns in (reps, reps_guided))
    if not 1 < len(rows) == len(guides):
        raise NotCovered("columns of rows and guides that do not meet")
    return finished(guided(call, loss, rows, guides), with_backward)


LEAVES = (
    "rows of 16 bits; a guide of another dtype; rows that a guide lets meet themselves (equal "
    "texts, a margin below 0)"
)
GUIDED = (
    PeerRow(f"{LOSSES}.GISTEmbedLoss", "forward", gist, "guided_contrastive", LEAVES),
    PeerRow(
        f"{LOSSES}.CachedGISTEmbedLoss",
        "calculate_loss",
        cached_gist,
        "guided_contrastive, all mini-batches at once",
        LEAVES,
    ),
)

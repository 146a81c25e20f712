"""Classes of the peers' interfaces, whose files people copy: their formulas, literally.

Each has the names that the peer's has, so that it is accelerated by them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def _as_of_slope_one(before: Tensor, after: Tensor) -> Tensor:
    return before + (after - before).detach()


class CombinedMarginLoss(nn.Module):
    """[P, c] cosines and [P, 1] labels, -1: of no class here -> scores."""

    def __init__(
        self, s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0
    ) -> None:
        super().__init__()
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        own = torch.arange(logits.shape[1]) == labels
        threshold = self.interclass_filtering_threshold
        if threshold > 0:
            logits = torch.where(~own & (logits > threshold), 0, logits)
        if self.m1 == 1 and self.m3 == 0:
            moved = _as_of_slope_one(logits, torch.cos(torch.arccos(logits.detach()) + self.m2))
        elif self.m3 > 0:
            moved = logits - self.m3
        else:
            raise RuntimeError
        return self.s * torch.where(own, moved, logits)


class ArcFace(CombinedMarginLoss):
    def __init__(self, s: float = 64.0, margin: float = 0.5) -> None:
        super().__init__(s, 1, margin, 0)
        self.margin = margin


class CosFace(CombinedMarginLoss):
    def __init__(self, s: float = 64.0, m: float = 0.4) -> None:
        super().__init__(s, 1, 0, m)
        self.m = m


class ChangedMargin(ArcFace):
    """Somebody's own: the margin is twice."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().forward(super().forward(logits, labels) / self.s, labels)


ChangedMargin.__name__ = "ArcFace"


class DistCrossEntropy(nn.Module):
    """Rows of scores and labels -> the mean, whose rows stop at a share of 1e-30."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        each = F.cross_entropy(logits, labels.clamp_min(0), reduction="none")
        each = torch.where(labels < 0, logits.logsumexp(dim=1), each)
        stopped = each.detach().exp().reciprocal().clamp_min(1e-30).log().neg()
        stopped = torch.where(labels < 0, -torch.tensor(1e-30, dtype=each.dtype).log(), stopped)
        return _as_of_slope_one(each, stopped).mean()


class PartialFC_V2(nn.Module):
    """Classes over ranks; here each rank has the others' rows of the batch and of the table, too.

    What a rank's own rows and classes get is then the whole gradient.
    """

    def __init__(
        self,
        margin_loss: nn.Module,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
    ) -> None:
        super().__init__()
        there = dist.is_initialized()
        self.rank = dist.get_rank() if there else 0
        self.world_size = dist.get_world_size() if there else 1
        each, rest = divmod(num_classes, self.world_size)
        self.num_local = each + (self.rank < rest)
        self.class_start = each * self.rank + min(self.rank, rest)
        self.sample_rate, self.fp16, self.last_batch_size = sample_rate, fp16, 0
        self.num_sample = int(sample_rate * self.num_local)
        self.embedding_size, self.dist_cross_entropy = embedding_size, DistCrossEntropy()
        drawn = torch.randn(num_classes, embedding_size, generator=torch.Generator().manual_seed(9))
        self.weight = nn.Parameter(drawn[self.class_start :][: self.num_local])
        self.margin_softmax = margin_loss

    def sample(self, labels: Tensor, index_positive: Tensor) -> Tensor:
        """The positives and random others; labels become places among them."""
        own = labels[index_positive].unique()
        chance = torch.rand(self.num_local)
        chance[own] = 2.0
        count = max(self.num_sample, len(own))
        self.weight_index = chance.topk(count).indices.sort().values
        labels[index_positive] = torch.searchsorted(self.weight_index, labels[index_positive])
        return self.weight[self.weight_index]

    def _everyones(self, own: Tensor) -> list[Tensor]:
        """Of each rank, this one's with its gradient."""
        if self.world_size == 1:
            return [own]
        told: list[Any] = [None] * self.world_size
        dist.all_gather_object(told, own.detach())
        told[self.rank] = own
        return told

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        assert self.last_batch_size in (0, len(local_embeddings))
        self.last_batch_size = len(local_embeddings)
        labels = torch.cat(self._everyones(local_labels.squeeze_().long()))[:, None]
        here = (labels >= self.class_start) & (labels < self.class_start + self.num_local)
        within = torch.where(here, labels - self.class_start, -1)
        weight = self.weight
        if self.sample_rate < 1:
            weight = self.sample(within, here)
        shards = self._everyones(weight)
        first = sum(len(shard) for shard in shards[: self.rank])
        places = torch.where(within >= 0, within + first, -1)
        places = torch.stack(self._everyones(places)).amax(dim=0)
        world = self.world_size
        sent = local_embeddings * world - local_embeddings.detach() * (world - 1)
        x = F.normalize(torch.cat(self._everyones(sent)))
        w = F.normalize(torch.cat(shards))
        cosines = (x @ w.T).clamp(-1, 1)
        return self.dist_cross_entropy(self.margin_softmax(cosines, places), places[:, 0])


class SimpleContrastiveLoss:
    def __init__(self, n_hard_negatives: int = 0) -> None:
        self.target_per_qry = n_hard_negatives + 1

    def __call__(
        self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        if target is None:
            target = torch.arange(len(x)) * self.target_per_qry
        return F.cross_entropy(x @ y.T, target, reduction=reduction)


class DistributedContrastiveLoss(SimpleContrastiveLoss):
    def gather_tensor(self, t: Tensor) -> Tensor:
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, t.detach())
        told[dist.get_rank()] = t
        return torch.cat(told)

    def __call__(self, x: Tensor, y: Tensor, **given: Any) -> Tensor:
        return super().__call__(self.gather_tensor(x), self.gather_tensor(y), **given)


class ContrastiveLossWithQueryClosure(SimpleContrastiveLoss):
    def __call__(self, *reps: Tensor, query_closure: Any = None, **given: Any) -> Tensor:
        made = () if query_closure is None else (query_closure(),)
        return super().__call__(*made, *reps, **given)


class ColBERTScores:
    """[Q, Lq, D] and [B, N, Ld, D] -> [Q, B N]; a hidden token's products are 0."""

    def __call__(
        self,
        queries_embeddings: Any,
        documents_embeddings: Any,
        queries_mask: Tensor | None = None,
        documents_mask: Tensor | None = None,
    ) -> Tensor:
        queries, documents = torch.as_tensor(queries_embeddings), documents_embeddings
        products = torch.einsum("qsd,bntd->qbnst", queries, torch.as_tensor(documents))
        if queries_mask is not None:
            products = products * queries_mask[:, None, None, :, None]
        if documents_mask is not None:
            products = products * documents_mask[None, :, :, None]
        return products.amax(dim=-1).sum(dim=-1).flatten(1)

"""Miners as modules, with the names, arguments and results of pytorch-metric-learning.

A miner gives indices: (anchor, positive, negative), or two lists of pairs, (anchor, positive,
anchor, negative). Rows are normalised first (`normalize`), as there. `mining` has the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.base import validation
from fused_losses.base.indices import Indices
from fused_losses.mining.lists import Pairs, Triplets
from fused_losses.mining.pairs import mine_pairs
from fused_losses.mining.triplets import mine_triplets

STRATEGIES = {"hard": "hardest", "easy": "easiest", "semihard": "semihard", "all": "all"}


class Miner(nn.Module):
    """What the miners share.

    Args:
        metric: as in `mine_triplets`: a distance or a similarity; None: the miner's own.
        normalize: divide the rows by their norms first. p: the exponent of "minkowski".

    miner(embeddings [N, D], labels [N], ref_emb [M, D], ref_labels [M], *, ids [N], ref_ids [M])
    returns int64 indices; without ref_emb positives and negatives are of the batch itself.
    `left_out`: how many anchors the last call found nothing for. Errors and cost as in `mining`.
    """

    default_metric = "euclidean"

    def __init__(
        self,
        *,
        metric: str | None = None,
        normalize: bool = True,
        p: float = 2.0,
        precision: str = "fp32",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = dict(
            metric=self.default_metric if metric is None else metric,
            normalize=normalize,
            p=p,
            precision=precision,
            backend=backend,
        )
        self.left_out = 0

    def mine(self, *batch: Any, **ids: Tensor | None) -> Triplets | Pairs:
        """The function of `mining` with this miner's arguments."""
        raise NotImplementedError

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
    ) -> Indices:
        found = self.mine(embeddings, labels, ref_emb, ref_labels, ids=ids, ref_ids=ref_ids)
        self.left_out = found.left_out
        return tuple(found[: 3 if isinstance(found, Triplets) else 4])

    def extra_repr(self) -> str:
        skipped = ("training", "options", "left_out", "generator")
        own = {k: v for k, v in vars(self).items() if k[0] != "_" and k not in skipped}
        own["metric"] = self.options["metric"]
        return ", ".join(f"{k}={v!r}" for k, v in own.items())


class BatchHardMiner(Miner):
    """(a, p, n): each anchor's farthest positive and nearest negative. Hermans et al., 2017."""

    def mine(self, *batch: Any, **ids: Tensor | None) -> Triplets:
        return mine_triplets(*batch, **ids, **self.options)


class BatchEasyHardMiner(Miner):
    """(a, p, a, n), or with "all" positive pairs and negative pairs apart. Xuan et al., 2020.

    Args:
        pos_strategy, neg_strategy: "hard", "semihard", "easy" or "all" (`mine_triplets`: hardest,
            ...); "semihard" goes neither with "semihard" nor with "all".
        allowed_pos_range, allowed_neg_range: (low, high) of the distances that take part; of a side
            that is "all" every pair does.
    """

    def __init__(
        self,
        pos_strategy: str = "easy",
        neg_strategy: str = "semihard",
        allowed_pos_range: tuple[float, float] | None = None,
        allowed_neg_range: tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        validation.check_choice("pos_strategy", pos_strategy, tuple(STRATEGIES))
        validation.check_choice("neg_strategy", neg_strategy, tuple(STRATEGIES))
        both = {pos_strategy, neg_strategy}
        if both in ({"semihard"}, {"semihard", "all"}):
            raise ValueError(
                "neg_strategy: expected 'hard' or 'easy' where a side is 'semihard', got "
                f"pos_strategy={pos_strategy!r}, neg_strategy={neg_strategy!r}"
            )
        validation.check_range("allowed_pos_range", allowed_pos_range)
        validation.check_range("allowed_neg_range", allowed_neg_range)
        self.pos_strategy, self.neg_strategy = pos_strategy, neg_strategy
        self.allowed_pos_range, self.allowed_neg_range = allowed_pos_range, allowed_neg_range

    def mine(self, *batch: Any, **ids: Tensor | None) -> Pairs:
        sides = {
            "positive": STRATEGIES[self.pos_strategy],
            "negative": STRATEGIES[self.neg_strategy],
        }
        ranges = {
            "positive_range": None if self.pos_strategy == "all" else self.allowed_pos_range,
            "negative_range": None if self.neg_strategy == "all" else self.allowed_neg_range,
        }
        given = {**ids, **sides, **ranges, **self.options}
        if "all" in sides.values():
            return mine_pairs(*batch, strategy="ranked", **given)
        found = mine_triplets(*batch, **given)
        a, p, n, near, far = found
        pairs = Pairs(a, p, a, n, near, far)
        pairs.left_out = found.left_out
        return pairs


class TripletMarginMiner(Miner):
    """(a, p, n): every triplet that violates the margin; g = d(a, n) - d(a, p).

    type_of_triplets: "all" with g <= margin, "hard" those with g <= 0, "semihard" those with g > 0,
    "easy" with g > margin. Schroff et al., FaceNet, 2015.
    """

    def __init__(self, margin: float = 0.2, type_of_triplets: str = "all", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        validation.check_choice(
            "type_of_triplets", type_of_triplets, ("all", "hard", "semihard", "easy")
        )
        self.margin, self.type_of_triplets = margin, type_of_triplets

    def mine(self, *batch: Any, **ids: Tensor | None) -> Triplets:
        rule: dict[str, Any] = dict(triplets=self.type_of_triplets, margin=self.margin)
        return mine_triplets(*batch, positive="all", negative="all", **rule, **ids, **self.options)


class _PairMiner(Miner):
    """A miner that is one strategy of `mine_pairs`."""

    def _pairs(self, *batch: Any, **given: Any) -> Pairs:
        return mine_pairs(*batch, **given, **self.options)


class MultiSimilarityMiner(_PairMiner):
    """(a, p, a2, n): the pairs that their row's hardest of the other kind comes within epsilon of.

    The cosine by default. Wang et al., 2019.
    """

    default_metric = "cosine"

    def __init__(self, epsilon: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def mine(self, *batch: Any, **ids: Tensor | None) -> Pairs:
        return self._pairs(*batch, strategy="multi_similarity", epsilon=self.epsilon, **ids)


class PairMarginMiner(_PairMiner):
    """(a, p, a2, n): positives farther than pos_margin, negatives nearer than neg_margin.

    Of a similarity: positives below pos_margin, negatives above neg_margin.
    """

    def __init__(self, pos_margin: float = 0.2, neg_margin: float = 0.8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pos_margin, self.neg_margin = pos_margin, neg_margin

    def mine(self, *batch: Any, **ids: Tensor | None) -> Pairs:
        margins = dict(positive_margin=self.pos_margin, negative_margin=self.neg_margin)
        return self._pairs(*batch, strategy="pair_margin", **margins, **ids)


class _Aligned(_PairMiner):
    """A strategy whose pairs are triplets."""

    def _triplets(self, *batch: Any, **given: Any) -> Triplets:
        pairs = self._pairs(*batch, **given)
        a, p, _, n, near, far = pairs
        found = Triplets(a, p, n, near, far)
        found.left_out = pairs.left_out
        return found


class DistanceWeightedMiner(_Aligned):
    """(a, p, n): for each positive pair a negative drawn so that distances come out even.

    Rows are always normalised; generator seeds the draws. Wu et al., 2017.
    """

    def __init__(
        self,
        cutoff: float = 0.5,
        nonzero_loss_cutoff: float = 1.4,
        *,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.cutoff, self.nonzero_loss_cutoff = cutoff, nonzero_loss_cutoff
        self.generator = generator

    def mine(self, *batch: Any, **ids: Tensor | None) -> Triplets:
        shape = dict(cutoff=self.cutoff, nonzero_loss_cutoff=self.nonzero_loss_cutoff)
        given = dict(strategy="distance_weighted", generator=self.generator, **shape)
        return self._triplets(*batch, **given, **ids)


class AngularMiner(_Aligned):
    """(a, p, n): triplets whose angle at the negative is wider than `angle` degrees.

    The rows are used as they come (as in pytorch-metric-learning) unless normalize=True. Wang et
    al., 2017.
    """

    def __init__(self, angle: float = 20.0, *, normalize: bool = False, **kwargs: Any) -> None:
        super().__init__(normalize=normalize, **kwargs)
        self.angle = angle

    def mine(self, *batch: Any, **ids: Tensor | None) -> Triplets:
        return self._triplets(*batch, strategy="angular", angle=self.angle, **ids)


class HardNegativeMiner(_PairMiner):
    """(a, p, a2, n): every positive pair, and of each anchor the k nearest negatives."""

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k

    def mine(self, *batch: Any, **ids: Tensor | None) -> Pairs:
        chosen = dict(strategy="ranked", positive="all", negative="hardest", k=self.k)
        return self._pairs(*batch, **chosen, **ids)


class CrossBatchMemory(nn.Module):
    """The last `size` embeddings of training with their labels: a bank to mine against.

    Args:
        size: how many rows. embedding_size: D. dtype: what they are stored in.

    `ids = memory.enqueue(embeddings, labels)` stores a batch; every row that ever comes gets the
    next number as its id. `memory.mine(miner, embeddings, labels, ids)` mines with anchors from the
    batch, positives and negatives from the memory; pairs with equal ids, a row and its own copy,
    are left out. The indices of positives and negatives are rows of `memory.embeddings`, and
    `memory.ids[index]` are their ids; `memory.loss(loss, embeddings, labels, ids, miner)` is a loss
    over them. Everything is a buffer: state_dict keeps the memory and goes
    on where it stopped. No gradient flows into the memory.
    Memory O(size D). Paper: Wang et al., Cross-Batch Memory, 2020.
    """

    embedding_memory: Tensor  # [size, D]
    label_memory: Tensor  # [size] int64
    id_memory: Tensor  # [size] int64

    def __init__(
        self,
        size: int,
        embedding_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("embedding_size", embedding_size)):
            validation.check_count(name, value)
        if dtype not in validation.FLOATS:
            raise TypeError(f"dtype: expected one of {validation.FLOATS}, got {dtype}")
        self.size, self.embedding_size = size, embedding_size
        rows = torch.zeros(size, embedding_size, dtype=dtype, device=device)
        self.register_buffer("embedding_memory", rows)
        self.register_buffer("label_memory", torch.zeros(size, dtype=torch.int64, device=device))
        # -1: nothing there yet
        self.register_buffer("id_memory", torch.full_like(self.label_memory, -1))
        self._count = 0  # rows that ever came; the ids say it, too
        self.register_load_state_dict_post_hook(_recount)

    def __len__(self) -> int:
        """How many rows it holds."""
        return min(self._count, self.size)

    @property
    def embeddings(self) -> Tensor:
        """[len, D], a view; the rows do not stand in the order in which they came."""
        return self.embedding_memory[: len(self)]

    @property
    def labels(self) -> Tensor:
        """[len] int64, a view."""
        return self.label_memory[: len(self)]

    @property
    def ids(self) -> Tensor:
        """[len] int64, a view: the number that each row came with."""
        return self.id_memory[: len(self)]

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Stores a batch [N, D], [N] in the place of the oldest rows; its ids [N] int64.

        Of a batch larger than the memory the last rows stay. Embeddings are stored in the memory's
        dtype. Raises ValueError, TypeError for tensors that do not fit. Time O(N D).
        """
        validation.check_matrix("embeddings", embeddings, f"[N, {self.embedding_size}]")
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings: expected [N, {self.embedding_size}], got "
                f"{validation.describe(embeddings)}"
            )
        validation.check_device("the memory", self.embedding_memory, "embeddings", embeddings)
        validation.check_index_vector("labels", labels, embeddings.shape[0], embeddings)
        n = embeddings.shape[0]
        ids = torch.arange(self._count, self._count + n, device=embeddings.device)
        kept = slice(max(0, n - self.size), n)
        at = ids[kept] % self.size
        self.embedding_memory[at] = embeddings[kept].to(self.embedding_memory.dtype)
        self.label_memory[at] = labels[kept].long()
        self.id_memory[at] = ids[kept]
        self._count += n
        return ids

    def mine(
        self,
        miner: Callable[..., Any],
        embeddings: Tensor,
        labels: Tensor,
        ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """miner(embeddings, labels, memory's embeddings and labels, ids=, ref_ids=, **options).

        miner: a module of this file, `mine_triplets` or `mine_pairs`. ids: what `enqueue` gave for
        this batch; None: it is not in the memory. Embeddings are taken in the memory's dtype.
        """
        validation.check_matrix("embeddings", embeddings, f"[N, {self.embedding_size}]")
        rows = embeddings.detach().to(self.embedding_memory.dtype)
        both = {} if ids is None else dict(ids=ids, ref_ids=self.ids)
        return miner(rows, labels, self.embeddings, self.labels, **both, **options)

    def loss(
        self,
        loss: Callable[..., Tensor],
        embeddings: Tensor,
        labels: Tensor,
        ids: Tensor | None = None,
        miner: Callable[..., Any] | None = None,
    ) -> Tensor:
        """A module of `losses` with anchors from the batch, positives and negatives from here.

        ids: what `enqueue` gave for this batch, whose rows then do not meet their own copies; None:
        it is not in the memory. miner: as in `mine`; None: every pair takes part. With ids and
        without a miner every pair is listed: O(N len) integers.
        """
        if miner is None and ids is not None:
            miner = partial(mine_pairs, strategy="all")
        indices = None if miner is None else self.mine(miner, embeddings, labels, ids)
        rows = self.embeddings.to(embeddings.dtype)
        return loss(embeddings, labels, indices, rows, self.labels)

    def reset(self) -> None:
        """Forgets everything; ids begin at 0 again."""
        self.embedding_memory.zero_()
        self.label_memory.zero_()
        self.id_memory.fill_(-1)
        self._count = 0

    def extra_repr(self) -> str:
        return f"size={self.size}, embedding_size={self.embedding_size}, held={len(self)}"


def _recount(memory: CrossBatchMemory, _: Any) -> None:
    memory._count = int(memory.id_memory.max()) + 1

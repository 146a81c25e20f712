"""A call of a pytorch-metric-learning loss, read once: its batch, its distance, its reducer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import no_autocast
from fused_losses.base.sides import Sides, batch_sides, same_rows
from fused_losses.functions.listed_rankings import miner_weights
from fused_losses.functions.scored_pairs import BatchPairs, batch_pairs
from fused_losses.functions.scored_rows import class_sizes
from fused_losses.integrations.acceleration import NotCovered, PeerCall, PeerRow

PACKAGE = "pytorch_metric_learning"


def is_peer(value: object, *names: str) -> bool:
    """Whether it is of one of these classes of the peer itself."""
    kind = type(value)
    return kind.__name__ in names and kind.__module__.split(".")[0] == PACKAGE


class Distance(NamedTuple):
    """A distance as a score u that is larger for nearer rows: s, -d or -d^2."""

    score: str  # "dot", "euclidean", "rbf" or "snr"
    normalize: bool

    def center(self, margin: float) -> float:
        """Where u stands at this distance, or similarity."""
        return float(margin) if self.score == "dot" else -float(margin)

    @property
    def name(self) -> str:
        """What functions that take a distance call it."""
        return {"dot": "cosine", "rbf": "sqeuclidean"}.get(self.score, self.score)


def distance_of(module: Any, *scores: str) -> Distance:
    """The loss's distance; one of these scores."""
    distance = module.distance
    told = f"distance={type(distance).__name__}"
    if getattr(distance, "collect_stats", False):
        raise NotCovered("distance.collect_stats, which reads the matrix")
    if distance.p != 2 or not is_peer(
        distance, "CosineSimilarity", "DotProductSimilarity", "LpDistance", "SNRDistance"
    ):
        raise NotCovered(f"{told}, p={distance.p}")
    power = distance.power
    if is_peer(distance, "LpDistance"):
        score = {1: "euclidean", 2: "rbf"}.get(power)
    elif is_peer(distance, "SNRDistance"):
        score = "snr" if power == 1 else None
    else:
        score = "dot" if power == 1 else None
    if score not in scores:
        raise NotCovered(f"{told}, power={power}")
    return Distance(str(score), bool(distance.normalize_embeddings))


class PeerBatch(NamedTuple):
    """Rows, labels and pairs of a call."""

    embeddings: Tensor  # [N, D]
    labels: Tensor | None  # [N]
    indices: tuple[Tensor, ...] | None
    ref: tuple[Tensor, Tensor | None] | None  # rows [M, D] and labels [M], None: the batch itself
    exclude: Tensor | None = None  # [N] a column that each row leaves out
    backend: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Keywords of a function over a batch."""
        if self.exclude is not None:
            raise NotCovered("a memory without the rows' own copies, of this loss")
        given: dict[str, Any] = dict(indices=self.indices, backend=self.backend)
        if self.ref is not None:
            given |= dict(ref_embeddings=self.ref[0], ref_labels=self.ref[1])
        return given

    @property
    def alone(self) -> bool:
        return self.ref is None

    def sides(self) -> Sides:
        ref = self.ref or (None, None)
        both = batch_sides(self.embeddings, self.labels, "none", "fp32", *ref, self.indices)
        if self.exclude is None:
            return both
        column = self.exclude[:, None].int()
        return both._replace(numbers=both.numbers._replace(exclude=column))

    def pairs(self, distance: Distance, scale: float = 1.0, *, once: bool = True) -> BatchPairs:
        """once: a pair that is listed twice counts once."""
        both = self.sides()
        number = torch.tensor(float(scale), dtype=torch.float64, device=self.embeddings.device)
        return batch_pairs(both, distance.score, distance.normalize, "fp32", number, once=once)

    def sizes(self) -> tuple[Tensor, Tensor]:
        """How many positives and negatives each row has, [N] each, by label."""
        positives, negatives = class_sizes(self.sides())
        if self.exclude is not None:
            positives = positives - 1
        return positives, negatives

    def numbers(self) -> tuple[int, int]:
        """How many positive and negative pairs there are."""
        if self.indices is not None:
            return len(self.indices[1]), len(self.indices[-1])
        positives, negatives = torch.stack(self.sizes()).sum(dim=1).tolist()
        return positives, negatives

    def weights(self) -> Tensor | None:
        """What a miner's lists make a row count for, [N]."""
        if self.indices is None:
            return None
        anchors = (self.indices[0], self.indices[0], self.indices[-2], self.indices[-2])
        given = self.indices if self.alone else anchors[: len(self.indices)]
        n = len(self.embeddings)
        return miner_weights(given, n, n, self.embeddings, self.alone)

    def as_peer(self, values: Tensor) -> Tensor:
        """In the dtype that the peer computes in, which under autocast is wider than the rows'."""
        if torch.is_autocast_enabled(values.device.type):
            return values.to(torch.promote_types(self.embeddings.dtype, torch.float32))
        return values.to(self.embeddings.dtype)

    def elements(self, losses: Tensor, rows: Tensor | None = None) -> dict[str, Any]:
        """A loss a row, for any reducer."""
        if rows is None:
            rows = torch.arange(len(losses), device=losses.device)
        return {"losses": self.as_peer(losses), "indices": rows, "reduction_type": "element"}

    def number(self, loss: Tensor) -> dict[str, Any]:
        """A loss that has its reduction behind it."""
        return {
            "losses": self.as_peer(loss),
            "indices": None,
            "reduction_type": "already_reduced",
        }

    def own_rows(self) -> Tensor:
        """Labels of a loss that takes no second batch and no lists."""
        if self.ref is not None:
            raise NotCovered("ref_emb")
        if self.labels is None:
            raise NotCovered("no labels")
        return self.labels


def batch_of(
    call: PeerCall,
    embeddings: Tensor,
    labels: Tensor | None,
    indices: Any,
    ref_emb: Tensor,
    ref_labels: Tensor | None,
) -> PeerBatch:
    """The batch, where ours and the peer mean the same pairs by it."""
    if indices is not None:
        indices = _lists(indices, embeddings)
    for rows, told in ((embeddings, labels), (ref_emb, ref_labels)):
        if rows.dim() != 2 or not rows.is_floating_point():
            raise NotCovered("rows of another shape or dtype")
        if told is None and indices is None:
            raise NotCovered("no labels")
        if told is not None and (told.is_floating_point() or told.dtype == torch.bool):
            raise NotCovered("labels that are no integers")
    if ref_emb.dtype != embeddings.dtype or ref_emb.shape[1] != embeddings.shape[1]:
        raise NotCovered("ref_emb of another dtype or size")
    same = same_rows(embeddings, ref_emb)
    if indices is None and same != (ref_labels is labels):
        raise NotCovered("ref_labels that are the batch's own of other rows, or the reverse")
    ref = None if same else (ref_emb, ref_labels)
    return PeerBatch(embeddings, labels, indices, ref, None, call.backend)


def _lists(indices: Any, embeddings: Tensor) -> tuple[Tensor, ...]:
    if not isinstance(indices, tuple | list) or len(indices) not in (3, 4):
        raise NotCovered("an indices_tuple of another length")
    lists = tuple(t.to(embeddings.device, torch.int64) for t in indices)
    if any(t.dim() != 1 for t in lists):
        raise NotCovered("an indices_tuple of another shape")
    # one tensor twice would make line t a triplet: every pair of an anchor meets every other
    return lists if len(lists) == 3 else (*lists[:2], lists[2].view(-1), lists[3])


def refuse_both_kinds(batch: PeerBatch) -> None:
    """A pair that is listed as positive and as negative: the peer refuses it where it has masks."""
    if batch.indices is None:
        return
    a, p, *rest = batch.indices
    b, n = rest if len(rest) == 2 else (a, rest[0])
    m = len(batch.embeddings if batch.ref is None else batch.ref[0])
    if bool(torch.isin(a * m + p, b * m + n).any()):
        raise NotCovered("a pair that is listed as positive and as negative")


def reducer_of(loss: Any, name: str = "loss", *covered: str) -> str:
    """The class of the reducer of a loss's part; one of these."""
    reducer = loss.reducer
    if is_peer(reducer, "MultipleReducers"):
        parts = reducer.reducers
        # a ModuleDict has no get
        reducer = parts[name] if name in parts else reducer.default_reducer  # noqa: SIM401
    if not is_peer(reducer, *covered):
        raise NotCovered(f"reducer={type(reducer).__name__}, which reads each pair's loss")
    if getattr(reducer, "collect_stats", False):
        raise NotCovered("reducer.collect_stats, which counts pairs")
    return type(reducer).__name__


def numbers_of(loss: Any, *names: str, above: float = -math.inf) -> list[float]:
    """Hyper-parameters that are plain finite numbers above a bound."""
    values = [getattr(loss, name) for name in names]
    for name, value in zip(names, values, strict=True):
        if isinstance(value, Tensor) or not math.isfinite(value) or not value > above:
            raise NotCovered(f"{name}={value}")
    return [float(value) for value in values]


def pairs_of_both(batch: PeerBatch) -> tuple[int, int] | None:
    """The numbers of pairs; None where a kind has none, whose loss the peer makes 0."""
    positives, negatives = batch.numbers()
    return (positives, negatives) if positives and negatives else None


Computes = Callable[[Any, PeerBatch], dict[str, Any]]


def computing(computes: Computes, of_pairs: bool) -> Callable[..., dict[str, Any]]:
    """`compute_loss` of the peer by a function of the loss and the batch."""

    @functools.wraps(computes)
    def compute_loss(
        call: PeerCall,
        loss: Any,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, Any]:
        if loss.collect_stats:
            raise NotCovered("collect_stats, which reads the matrix")
        batch = batch_of(call, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if of_pairs:
            refuse_single(batch)
        with no_autocast(embeddings.device):
            return computes(loss, batch)

    return compute_loss


def refuse_single(batch: PeerBatch) -> None:
    """The peer makes nothing of one pair of either kind, and returns before it looks further."""
    if batch.indices is None:
        n = len(batch.embeddings)
        if n * (n if batch.ref is None else len(batch.ref[0])) <= 4:
            raise NotCovered("four pairs or fewer")
    elif max(map(len, batch.indices)) <= 1:
        raise NotCovered("lists of one pair or of none")


def loss_row(
    name: str, computes: Computes, runs_on: str, leaves: str = "", *, of_pairs: bool = True
) -> PeerRow:
    """The row of a loss; of_pairs: its pairs are those of a miner, which otherwise weigh rows."""
    replacement = computing(computes, of_pairs)
    return PeerRow(f"losses.{name}", "compute_loss", replacement, runs_on, leaves)

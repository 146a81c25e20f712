"""Multiple negatives ranking: each anchor finds its positive among all documents of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.integers import count_up
from fused_losses.base.memory_budget import MemoryBudget, Room, room_of
from fused_losses.base.numerics import accumulate_dtype, merged, no_autocast, reduced, softplus
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import number
from fused_losses.functions.banks import own_negatives
from fused_losses.functions.scored_pairs import scored, triangle
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, PairInputs
from fused_losses.primitives.pairs.op import pair_statistics

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITIONS = ("joint", "per_direction")


def multiple_negatives(
    anchor: Tensor,  # [N, D]
    positive: Tensor,  # [N, D]
    negatives: Tensor | None = None,  # [N, K, D]
    *,
    scale: float | Tensor = 20.0,
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    normalize: bool = True,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of anchors and documents, in any of four directions, z = scale s.

        joint          loss_i = log sum over all directions' pairs of e^z - z(a_i, p_i)
        per_direction  loss_i = mean over the directions of (log sum e^z) - z(a_i, p_i)

    The documents are all positives and all negatives, each anchor's hard ones among the others'.

    Args:
        anchor, positive: [N, D]. negatives: [N, K, D], hard negatives of each anchor.
        scale: > 0; a float or a scalar tensor, which may need a gradient.
        directions: query_to_doc (a_i, every document), which must be there; query_to_query (a_i,
            a_j), j != i; doc_to_query (p_i, every anchor); doc_to_doc (p_i, every document of
            another anchor). In joint, doc_to_query has the positive pair once more.
        normalize: divide rows by their norms. reduction: "mean", "sum" or "none" [N].
        memory_budget: see `info_nce`; one direction after the other.

    A direction without pairs adds nothing. Returns float32 (float64 for float64 inputs). Raises
    ValueError, TypeError for bad arguments. Time O(N^2 (1 + K) D) a direction; memory O(N K D).
    Papers: Henderson et al., 2017; Li et al. (GTE), 2023 (all directions).
    """
    anchor = validation.check_both("anchor", anchor, "positive", positive, precision)
    if anchor.shape != positive.shape:
        raise ValueError(
            f"positive: expected shape {tuple(anchor.shape)} as anchor has, got "
            f"{validation.describe(positive)}"
        )
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    validation.check_choice("partition", partition, PARTITIONS)
    for direction in directions:
        validation.check_choice("directions", direction, DIRECTIONS)
    if "query_to_doc" not in directions or len(set(directions)) != len(directions):
        raise ValueError(
            f"directions: expected query_to_doc and each at most once, got {tuple(directions)}"
        )
    room = room_of(memory_budget, anchor)
    factor = number("scale", scale, anchor)
    far = None if negatives is None else own_negatives(negatives, anchor)
    with no_autocast(anchor.device):
        if normalize:
            anchor, positive = unit(anchor), unit(positive)
            far = None if far is None else unit(far)
        batch = RankedBatch(anchor, positive, far)
        how = RankedWay(factor, tuple(directions), partition, precision, room, backend)
        loss = ranked(batch, batch, 0, how)
        every = torch.ones_like(loss, dtype=torch.bool)
        return reduced(loss, every, reduction, accumulate_dtype(anchor.dtype))


class RankedBatch(NamedTuple):
    """Rows as they are compared, of this rank or of all."""

    anchor: Tensor  # [N, D]
    positive: Tensor  # [N, D]
    far: Tensor | None  # [N, K, D]


class RankedWay(NamedTuple):
    """How they are."""

    scale: Tensor
    directions: tuple[str, ...]
    partition: str
    precision: str
    room: Room | None
    backend: str | None


def ranked(own: RankedBatch, every: RankedBatch, first: int, how: RankedWay) -> Tensor:
    """The losses of own's anchors, [N], beside every rank's rows, of which own's begin at first."""
    x, y = own.anchor, own.positive
    columns = count_up(len(every.anchor), x)
    ids = columns[first : first + len(x)]
    documents, document_ids, document_labels = every.positive, columns, columns
    if every.far is not None:
        of_far = columns[:, None].expand(every.far.shape[:2]).flatten()
        documents = torch.cat([documents, every.far.flatten(0, 1)])
        document_ids = torch.cat([columns, of_far])
        document_labels = torch.cat([columns, torch.full_like(of_far, -1)])

    def pairs(rows: Tensor, columns: Tensor | None) -> PairInputs:
        return scored(rows, columns, how.scale, precision=how.precision)

    def of_queries() -> PairInputs:
        if own is every:
            return triangle(pairs(x, None))
        return pairs(x, every.anchor)._replace(x_ids=ids, y_ids=columns)

    swept = {
        "query_to_doc": lambda: pairs(x, documents)._replace(
            x_labels=ids, y_labels=document_labels
        ),
        "query_to_query": of_queries,
        "doc_to_query": lambda: pairs(y, every.anchor)._replace(x_labels=ids, y_labels=columns),
        "doc_to_doc": lambda: pairs(y, documents)._replace(x_ids=ids, y_ids=document_ids),
    }
    found = {
        direction: pair_statistics(swept[direction](), room=how.room, backend=how.backend)[0].value
        for direction in how.directions
    }
    target = found["query_to_doc"][POSITIVE]
    rest = []
    for direction, value in found.items():
        negative = value[NEGATIVE]
        if how.partition == "joint":
            more = direction == "doc_to_query"
            rest.append(merged(negative, value[POSITIVE]) if more else negative)
            continue
        some = negative != -torch.inf
        inside = direction in ("query_to_doc", "doc_to_query")
        gap = torch.where(some, negative - (value[POSITIVE] if inside else target), 0)
        rest.append(torch.where(some, softplus(gap) if inside else gap, 0))
    if how.partition == "per_direction":
        return torch.stack(rest).mean(dim=0)
    total = rest[0]
    for more in rest[1:]:
        total = merged(total, more)
    some = total != -torch.inf
    return torch.where(some, softplus(torch.where(some, total - target, 0)), 0)


examples(
    multiple_negatives,
    lambda f, t: f(t.x, t.y[: len(t.x)], t.negatives, scale=t.scale),
    {
        "": dict(directions=DIRECTIONS),
        "per direction": dict(
            directions=DIRECTIONS[::-1], partition="per_direction", normalize=False
        ),
    },
)

"""Retrieval: how good are the nearest rows?

Queries against a gallery, or a set against itself, where a row is not its own neighbour. Relevant
to a query are the gallery's rows of its label, or those that share one of its labels. Nearest
first, equal ones by the lowest index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import no_autocast, row_dtype
from fused_losses.base.validation import check_integers
from fused_losses.metrics.lists import QueryLists
from fused_losses.metrics.search import (
    Search,
    check_k,
    checked,
    distances,
    finite,
    neighbours,
    relevant,
    relevant_rows,
)


class Retrieval(NamedTuple):
    """A mean over the queries that have a relevant row; NaN when there are none.

    value: a number, or {k: number} where several k were asked for. queries: how many count.
    left_out: how many have no relevant row in the gallery. per_query: where it was asked for, each
    query's own value [N], or {k: [N]}, NaN for those that are left out.
    """

    value: float | dict[int, float]
    queries: int
    left_out: int
    per_query: Tensor | dict[int, Tensor] | None = None


def hits(search: Search, k: int) -> Iterator[tuple[slice, Tensor]]:
    """Runs of queries, and which of their k nearest rows are relevant. [B, k] bool"""
    for run, _, index in neighbours(search, k):
        there = index >= 0
        yield run, there & relevant(search, run, index.clamp_min(0)) if len(search.y) else there


def mean_of(
    search: Search,
    count: Tensor,
    values: dict[int, Tensor],
    k: int | Sequence[int] | None,
    per_query: bool,
) -> Retrieval:
    """values: of each k a number for each query [N]."""
    counted = count > 0
    queries = int(counted.sum())
    means = {
        one: float(value[counted].mean()) if queries else float("nan")
        for one, value in values.items()
    }
    several = isinstance(k, list | tuple)
    found = means if several else next(iter(means.values()))
    each = None
    if per_query:
        own = {one: torch.where(counted, value, torch.nan) for one, value in values.items()}
        each = own if several else next(iter(own.values()))
    return Retrieval(found, queries, len(search.labels) - queries, each)


def _averaged(
    search: Search, longest: int, ks: dict[int, Tensor], precise: bool, count: Tensor
) -> dict[int, Tensor]:
    """For each k, whose ranks [N] end where ks says, the sum of hits, or of precisions at hits."""
    dtype = row_dtype(search.x.device)
    out = {k: count.new_zeros(len(count), dtype=dtype) for k in ks}
    for run, hit in hits(search, longest):
        ranks = torch.arange(1, hit.shape[1] + 1, device=hit.device)
        gain = hit.to(dtype)
        if precise:
            gain = gain.cumsum(dim=1) / ranks * gain
        for k, end in ks.items():
            out[k][run] = torch.where(ranks <= end[run, None], gain, 0).sum(dim=1)
    return out


# ---- retrieval metrics --------------------------------------------------------------------------


@torch.no_grad()
def recall_at_k(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]; None: embeddings
    ref_labels: Tensor | None = None,  # [M]
    *,
    k: int | Sequence[int] = 1,
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    galleries: QueryLists | None = None,  # [N, G]
    per_query: bool = False,
    backend: str | None = None,
) -> Retrieval:
    """The share of queries with a relevant row among their k nearest.

    Args:
        embeddings, labels: [N, D], integers [N], the queries; or a set of labels a row, [N, L]
            padded with -1: then rows match that share one, at O(N M L^2).
        ref_embeddings, ref_labels: [M, D], [M] (or [M, L]), the gallery; None: the queries
            themselves, each without itself.
        k: >= 1; several in one search: value is then a dict. It may be larger than the gallery.
        metric: a distance of `pairwise_distance` (without arguments; not mahalanobis), or "dot".
        ids, ref_ids: integers; rows with equal ids are left out of a query's neighbours.
        galleries: columns of the gallery, integers [N, G] padded with -1 or N lists: then a query
            meets those alone, and of them are R and the ranks. A search a query.
        per_query: also return every query's own value.

    Returns `Retrieval`: the mean over the queries with a relevant row; the others are counted. A
    query with NaN finds nothing. Raises ValueError, TypeError for arguments that do not fit.
    Time O(N M D); memory O(N + M) and a few blocks.
    """
    several = check_k("k", k)
    search = checked(
        embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend, galleries
    )
    with no_autocast(embeddings.device):
        count = relevant_rows(search)
        ends = {one: torch.full_like(count, one) for one in several}
        found = _averaged(search, max(several), ends, False, count)
        hit = {one: (sums > 0).to(sums.dtype) for one, sums in found.items()}
        return mean_of(search, count, hit, k, per_query)


@torch.no_grad()
def precision_at_k(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]; None: embeddings
    ref_labels: Tensor | None = None,  # [M]
    *,
    k: int | Sequence[int] = 1,
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    galleries: QueryLists | None = None,  # [N, G]
    per_query: bool = False,
    backend: str | None = None,
) -> Retrieval:
    """The share of relevant rows among the k nearest; the divisor is k, however few there are.

    Arguments, result, errors and cost as in `recall_at_k`.
    """
    several = check_k("k", k)
    search = checked(
        embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend, galleries
    )
    with no_autocast(embeddings.device):
        count = relevant_rows(search)
        ends = {one: torch.full_like(count, one) for one in several}
        found = _averaged(search, max(several), ends, False, count)
        return mean_of(
            search, count, {one: sums / one for one, sums in found.items()}, k, per_query
        )


@torch.no_grad()
def map_at_k(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]; None: embeddings
    ref_labels: Tensor | None = None,  # [M]
    *,
    k: int | Sequence[int] = 100,
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    galleries: QueryLists | None = None,  # [N, G]
    per_query: bool = False,
    backend: str | None = None,
) -> Retrieval:
    """Mean average precision: (1 / min(R, k)) sum over relevant ranks i <= k of precision at i.

    R: a query's relevant rows. Arguments, result, errors and cost as in `recall_at_k`. Weyand et
    al., Google Landmarks v2, 2020 (mAP@100).
    """
    several = check_k("k", k)
    search = checked(
        embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend, galleries
    )
    with no_autocast(embeddings.device):
        count = relevant_rows(search)
        ends = {one: torch.full_like(count, one) for one in several}
        found = _averaged(search, max(several), ends, True, count)
        parts = {one: sums / count.clamp(1, one) for one, sums in found.items()}
        return mean_of(search, count, parts, k, per_query)


@torch.no_grad()
def map_at_r(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]; None: embeddings
    ref_labels: Tensor | None = None,  # [M]
    *,
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    galleries: QueryLists | None = None,  # [N, G]
    per_query: bool = False,
    backend: str | None = None,
) -> Retrieval:
    """MAP@R: (1 / R) sum over relevant ranks i <= R of precision at i, R a query's relevant rows.

    Arguments, result, errors as in `recall_at_k`; memory O(N + M + max R) and a few blocks.
    Musgrave et al., A Metric Learning Reality Check, 2020.
    """
    search = checked(
        embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend, galleries
    )
    return _at_r(search, True, per_query)


@torch.no_grad()
def r_precision(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]; None: embeddings
    ref_labels: Tensor | None = None,  # [M]
    *,
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    galleries: QueryLists | None = None,  # [N, G]
    per_query: bool = False,
    backend: str | None = None,
) -> Retrieval:
    """The share of relevant rows among the R nearest, R a query's relevant rows.

    Arguments, result, errors and cost as in `map_at_r`.
    """
    search = checked(
        embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend, galleries
    )
    return _at_r(search, False, per_query)


def _at_r(search: Search, precise: bool, per_query: bool) -> Retrieval:
    with no_autocast(search.x.device):
        count = relevant_rows(search)
        longest = int(count.max()) if len(count) else 0
        found = {0: count.new_zeros(len(count), dtype=row_dtype(search.x.device))}
        if longest:
            found = _averaged(search, longest, {0: count}, precise, count)
        return mean_of(search, count, {0: found[0] / count.clamp_min(1)}, None, per_query)


@torch.no_grad()
def mean_reciprocal_rank(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]; None: embeddings
    ref_labels: Tensor | None = None,  # [M]
    *,
    k: int | None = None,
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    galleries: QueryLists | None = None,  # [N, G]
    per_query: bool = False,
    backend: str | None = None,
) -> Retrieval:
    """The mean of 1 / rank of the nearest relevant row; with k, 0 where that rank is above k.

    Arguments, result, errors as in `recall_at_k`. k None: over the whole gallery, by counting what
    is nearer in one pass of distances. Time O(N M D); memory O((N + M) D) and a few blocks.
    """
    if k is not None:
        if isinstance(k, list | tuple):
            raise TypeError(f"k: expected an integer or None, got {type(k).__name__}")
        check_k("k", k)
    search = checked(
        embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend, galleries
    )
    with no_autocast(embeddings.device):
        count = relevant_rows(search)
        out = count.new_zeros(len(count), dtype=row_dtype(search.x.device))
        if k is None and search.galleries is not None:
            k = max(1, search.galleries.shape[1])
        if k is not None:
            for run, hit in hits(search, k):
                rank = hit.int().argmax(dim=1) + 1
                out[run] = torch.where(hit.any(dim=1), 1 / rank.to(out.dtype), 0)
        elif len(search.y):
            columns = torch.arange(len(search.y), device=search.x.device)
            for run, d in distances(search):
                hit = relevant(search, run, columns) & ~d.isnan()
                key = finite(d)
                nearest, at = torch.where(hit, key, torch.inf).min(dim=1, keepdim=True)
                before = (key < nearest) | ((key == nearest) & (columns < at))
                rank = before.sum(dim=1) + 1
                out[run] = torch.where(hit.any(dim=1), 1 / rank.to(out.dtype), 0)
        return mean_of(search, count, {0: out}, None, per_query)


def gap(
    scores: Tensor,  # [Q] or [Q, K]
    predictions: Tensor,  # [Q] or [Q, K]
    labels: Tensor,  # [Q] or [Q, L]
) -> float:
    """Global average precision (micro AP): (1 / G) sum over predictions i of P(i) rel(i).

    Args:
        scores: how sure each prediction is, higher first over all queries together; of equal ones
            the lower query, then the earlier column.
        predictions: integer labels, < 0 for none. labels: the truth, [Q] or several a query
            [Q, L], < 0 for none.

    P(i) is the share of right ones among the i first predictions, G the number of queries that have
    a label: a prediction for a query without one is wrong and costs. A NaN score gives NaN; so does
    G = 0. Raises ValueError, TypeError for tensors that do not fit. Time O(QK log QK), memory
    O(Q (K + L)). Weyand et al., Google Landmarks v2, 2020.
    """
    if not isinstance(scores, Tensor) or scores.dtype not in validation.FLOATS:
        got = validation.describe(scores) if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: expected a floating point tensor [Q] or [Q, K], got {got}")
    if scores.dim() not in (1, 2):
        raise ValueError(f"scores: expected [Q] or [Q, K], got {validation.describe(scores)}")
    check_integers("predictions", predictions, tuple(scores.shape), scores)
    flat = isinstance(labels, Tensor) and labels.dim() == 1
    check_integers("labels", labels, (len(scores),) if flat else (len(scores), None), scores)
    scores, predictions, labels = (
        t[:, None] if t.dim() == 1 else t for t in (scores, predictions, labels)
    )
    answers = int((labels >= 0).any(dim=1).sum())
    made = predictions >= 0
    if answers == 0 or bool(scores[made].isnan().any()):
        return float("nan")
    right = torch.zeros_like(made)
    for column in range(labels.shape[1]):
        right |= made & (predictions == labels[:, column, None])
    order = scores[made].sort(descending=True, stable=True).indices
    hit = right[made][order].to(row_dtype(scores.device))
    ranks = torch.arange(1, len(hit) + 1, device=hit.device)
    return float((hit.cumsum(0) / ranks * hit).sum() / answers)

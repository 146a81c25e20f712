"""The search behind the retrieval metrics: a call's checks, its nearest rows, block by block.

Queries against a gallery, or a set against itself, where a row is not its own neighbour. Relevant
to a query are the gallery's rows of its label, or those that share one of its labels. Nearest
first, equal ones by the lowest index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.base.sides import ref_sides
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_integers
from fused_losses.metrics.lists import QueryLists, check_lists, check_once
from fused_losses.pairwise.distance import pairwise_distance, pairwise_similarity
from fused_losses.pairwise.metrics import METRICS, moved
from fused_losses.pairwise.topk import pairwise_topk
from fused_losses.primitives.topk.inputs import MOST

COSINES = ("cosine", "angular", "correlation")
LISTED = 1 << 21  # neighbours in a block
BLOCK_BYTES = 2 << 20  # of distances in a block, where no top-k is long enough; ten such are alive


class Search(NamedTuple):
    """One call, checked."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    own: bool
    labels: Tensor  # [N] int32, numbered; sets of labels: [N, L] int64, < 0: none
    ref_labels: Tensor  # [M], or [M, L]
    ids: Tensor | None  # [N]
    ref_ids: Tensor | None  # [M]
    metric: str
    backend: str | None
    galleries: Tensor | None = None  # [N, G] columns in increasing order, then -1


def checked(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    metric: str,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    backend: str | None,
    galleries: QueryLists | None = None,
) -> Search:
    check_metric(metric)
    sets = None
    if isinstance(labels, Tensor) and labels.dim() == 2:
        sets = _label_sets(embeddings, labels, ref_embeddings, ref_labels)
        labels = sets[0].new_zeros(len(sets[0]))
        ref_labels = None if sets[1] is None else sets[1].new_zeros(len(sets[1]))
    both = ref_sides(embeddings, labels, ref_embeddings, ref_labels, "fp32", (ids, ref_ids))
    of_x, of_y = both.labels
    if sets is not None:
        of_x = sets[0].long()
        of_y = of_x if sets[1] is None else sets[1].long()
    known = (of_x, of_y, both.numbers.x_ids, both.numbers.y_ids)
    columns = None
    if galleries is not None:
        n, m = len(both.x), len(both.y)
        columns = check_lists("galleries", galleries, n, m, both.x)
        check_once("galleries", columns)
        columns = torch.where(columns < 0, m, columns).sort(dim=1).values
        columns = torch.where(columns == m, -1, columns)
    return Search(both.x, both.y, both.alone, *known, metric, backend, columns)


def _label_sets(
    embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor | None, ref_labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Labels [N, L] and [M, L], each row a set."""
    validation.check_matrix("embeddings", embeddings, "[N, D]")
    check_integers("labels", labels, (embeddings.shape[0], None), embeddings)
    if ref_labels is not None and ref_embeddings is not None:
        validation.check_matrix("ref_embeddings", ref_embeddings, "[M, D]")
        check_integers("ref_labels", ref_labels, (ref_embeddings.shape[0], None), embeddings)
    return labels, ref_labels


def check_metric(metric: str) -> None:
    known = ("dot", *(name for name in METRICS if name != "mahalanobis"))
    validation.check_choice("metric", metric, known)


def check_k(name: str, k: int | Sequence[int]) -> list[int]:
    several: list[Any] = list(k) if isinstance(k, list | tuple) else [k]
    for one in several:
        validation.check_count(name, one)
    if not several:
        raise ValueError(f"{name}: expected at least one value, got none")
    return several


def relevant_rows(search: Search) -> Tensor:
    """How many rows of the gallery are relevant to each query. [N] int64"""
    if search.labels.dim() == 2 or search.galleries is not None:
        return _counted(search)
    count = _matches(search.labels, search.ref_labels)
    if search.ids is not None:
        # rows with the query's label and its id
        count = count - _matches(*_joint(search))
    if search.own:
        itself = search.labels == search.ref_labels
        if search.ids is not None:
            itself = itself & (search.ids != search.ref_ids)
        count = count - itself.long()
    return count


def relevant(search: Search, run: slice, columns: Tensor) -> Tensor:
    """Whether columns [B, k] or [k] of the gallery are relevant to a run of queries. [B, k]"""
    if search.labels.dim() == 1:
        return search.labels[run, None] == search.ref_labels[columns]
    labels = search.labels[run]
    hit = torch.zeros(1, dtype=torch.bool, device=labels.device)
    hit = hit.expand(len(labels), columns.shape[-1])
    for theirs in search.ref_labels.unbind(1):
        told = theirs[columns]
        for mine in labels.unbind(1):
            hit = hit | ((mine[:, None] == told) & (told >= 0))
    return hit


def candidates(search: Search, run: slice, columns: Tensor) -> Tensor:
    """Whether columns [B, k], -1: none, may be found by a run of queries. [B, k]"""
    able = columns >= 0
    if not len(search.y):
        return able
    if search.ids is not None and search.ref_ids is not None:
        able = able & (search.ids[run, None] != search.ref_ids[columns])
    if search.own:
        able = able & (columns != torch.arange(run.start, run.stop, device=able.device)[:, None])
    return able


def _counted(search: Search) -> Tensor:
    """`relevant_rows` by looking at each pair, a block at a time."""
    n, m = len(search.x), len(search.y)
    count = torch.zeros(n, dtype=torch.int64, device=search.x.device)
    width = m if search.galleries is None else search.galleries.shape[1]
    step = max(1, LISTED // max(1, width))
    every = torch.arange(m, device=search.x.device)
    for i in range(0, n if m else 0, step):
        run = slice(i, min(i + step, n))
        columns = every[None] if search.galleries is None else search.galleries[run]
        hit = relevant(search, run, columns) & candidates(search, run, columns)
        count[run] = hit.sum(dim=1)
    return count


def _matches(values: Tensor, among: Tensor) -> Tensor:
    among, values = among.sort().values, values.contiguous()
    high = torch.searchsorted(among, values, right=True)
    return high - torch.searchsorted(among, values)


def _joint(search: Search) -> tuple[Tensor, Tensor]:
    """One number for each (label, id)."""
    assert search.ids is not None and search.ref_ids is not None
    n = len(search.labels)
    labels = torch.cat([search.labels, search.ref_labels]).unique(return_inverse=True)[1]
    names, ids = torch.cat([search.ids, search.ref_ids]).unique(return_inverse=True)
    key = labels * len(names) + ids
    return key[:n], key[n:]


def neighbours(search: Search, k: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Runs of queries, their k nearest distances (or largest products) and columns [B, k].

    -1 where there are fewer. k is cut to the gallery's size.
    """
    n, m = search.x.shape[0], search.y.shape[0]
    k = max(1, min(k, m))
    if search.galleries is not None:
        yield from _of_galleries(search, search.galleries, k)
        return
    if k > MOST:
        yield from _long_neighbours(search, k)
        return
    step = max(1, LISTED // k)
    given: dict[str, Any] = dict(metric=search.metric, backend=search.backend)
    if search.own and n <= step and search.ids is search.ref_ids:
        # half the work
        yield (
            slice(0, n),
            *pairwise_topk(search.x, None, k, x_ids=search.ids, skip_self=True, **given),
        )
        return
    for i in range(0, n, step):
        run = slice(i, min(i + step, n))
        itself = torch.arange(i, run.stop, device=search.x.device)[:, None]
        yield (
            run,
            *pairwise_topk(
                *(search.x[run], search.y, k),
                x_ids=None if search.ids is None else search.ids[run],
                y_ids=search.ref_ids,
                exclude=itself if search.own else None,
                **given,
            ),
        )


def _of_galleries(
    search: Search, galleries: Tensor, k: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A search a query, among its own columns."""
    n, k = len(search.x), max(1, min(k, galleries.shape[1]))
    given: dict[str, Any] = dict(metric=search.metric, backend=search.backend)
    worst = -torch.inf if search.metric == "dot" else torch.inf
    for i in range(0, n, step := max(1, LISTED // k)):
        run = slice(i, min(i + step, n))
        columns = galleries[run]
        able = candidates(search, run, columns)
        dtype = accumulate_dtype(search.x.dtype)
        value = torch.full((len(columns), k), worst, dtype=dtype, device=columns.device)
        index = torch.full_like(value, -1, dtype=torch.int64)
        for row in range(len(columns)):
            # increasing, so that the lower of equals stays first
            own = columns[row][able[row]]
            if len(own):
                at = slice(i + row, i + row + 1)
                best, place = pairwise_topk(search.x[at], search.y[own], min(k, len(own)), **given)
                value[row, : best.shape[1]] = best[0]
                index[row, : best.shape[1]] = torch.where(place < 0, -1, own[place])[0]
        yield run, value, index


def distances(search: Search) -> Iterator[tuple[slice, Tensor]]:
    """Runs of queries against the whole gallery, smaller is nearer; NaN where not a candidate."""
    x, y, metric = search.x, search.y, search.metric
    if metric in COSINES:
        # not once a run; a row of zeros, or of correlation a constant one, has cosine 0 with all
        turned = (lambda r: unit(moved(r))) if metric == "correlation" else unit
        x = turned(x.to(accumulate_dtype(x.dtype)))
        y = x if search.own else turned(y.to(x.dtype))
    n, m = x.shape[0], y.shape[0]
    size = accumulate_dtype(x.dtype).itemsize
    step = max(1, BLOCK_BYTES // (size * max(1, m)))
    for i in range(0, n, step):
        run = slice(i, min(i + step, n))
        if metric == "dot":
            d = -pairwise_similarity(x[run], y, "dot", backend=search.backend)
        elif metric in COSINES:
            d = _of_cosines(x[run], y, metric, search.backend)
        else:
            d = pairwise_distance(x[run], y, metric, backend=search.backend)
        if search.own:
            d[torch.arange(len(d)), torch.arange(i, run.stop)] = torch.nan
        if search.ids is not None:
            d[search.ids[run, None] == search.ref_ids] = torch.nan
        yield run, d


def _of_cosines(x: Tensor, y: Tensor, metric: str, backend: str | None) -> Tensor:
    """1 - cos, or arccos / pi, of unit rows.

    Near rows by their chord, which keeps its digits; others by the product, which is 0 exactly
    where rows have no coordinate in common, and so leaves a tie one.
    """
    cosine = pairwise_similarity(x, y, "dot", backend=backend)
    chord = pairwise_distance(x, y, backend=backend)
    near = cosine > 0.5
    if metric == "angular":
        angle = cosine.clamp_min_(-1).acos_()
        return torch.where(near, 2 * chord.div_(2).asin_(), angle).div_(math.pi)
    return torch.where(near, chord.square_().div_(2), 1 - cosine)


def _long_neighbours(search: Search, k: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Beyond what pairwise_topk takes: whole rows of distances, sorted."""
    for run, d in distances(search):
        value, index = finite(d).sort(dim=1, stable=True)
        taken = torch.arange(k, device=d.device) < (~d.isnan()).sum(dim=1, keepdim=True)
        value = -value if search.metric == "dot" else value
        yield run, value[:, :k], torch.where(taken, index[:, :k], -1)


def finite(d: Tensor) -> Tensor:
    """inf where d is NaN, and there only."""
    return torch.where(d.isnan(), torch.inf, d.clamp(max=torch.finfo(d.dtype).max))

"""Retrieval and kNN classification: how good are the nearest rows?

Queries against a gallery, or a set against itself, where a row is not its own neighbour. Relevant
to a query are the gallery's rows of its label. Nearest first, equal ones by the lowest index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, no_autocast, row_dtype
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_both, check_integer_pair, check_integers, check_rows
from fused_losses.pairwise.distance import pairwise_distance, pairwise_similarity
from fused_losses.pairwise.metrics import METRICS
from fused_losses.pairwise.topk import MOST, pairwise_topk

WEIGHTS = ("uniform", "exp", "softmax")
LISTED = 1 << 21  # neighbours in a block
BLOCK_BYTES = 2 << 20  # of distances in a block, where no top-k is long enough; ten such are alive


class Retrieval(NamedTuple):
    """A mean over the queries that have a relevant row; NaN when there are none.

    value: a number, or {k: number} where several k were asked for. queries: how many count.
    left_out: how many have no relevant row in the gallery.
    """

    value: float | dict[int, float]
    queries: int
    left_out: int


class KnnClasses(NamedTuple):
    """What the neighbours say: the winning label [N] int64 and its score [N].

    scores: [N, num_classes] of every class where num_classes was given, else None. A query without
    a neighbour has label -1 and score 0.
    """

    labels: Tensor
    score: Tensor
    scores: Tensor | None


# ---- the queries' relevant ranks ----------------------------------------------------------------


class _Search(NamedTuple):
    """One call, checked."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    own: bool
    labels: Tensor  # [N]
    ref_labels: Tensor  # [M]
    ids: Tensor | None  # [N]
    ref_ids: Tensor | None  # [M]
    metric: str
    backend: str | None


def _search(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    metric: str,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    backend: str | None,
) -> _Search:
    _check_metric(metric)
    own = ref_embeddings is None or ref_embeddings is embeddings
    if ref_embeddings is None and ref_labels is not None:
        raise ValueError("ref_embeddings: expected a tensor beside ref_labels, got None")
    if own:
        check_rows("embeddings", embeddings, "fp32")
        x = y = embeddings
        ref_labels = labels if ref_labels is None else ref_labels
        ref_ids = ids if ref_ids is None else ref_ids
    else:
        x = check_both("embeddings", embeddings, "ref_embeddings", ref_embeddings, "fp32")
        y = ref_embeddings
        if ref_labels is None:
            raise ValueError("ref_labels: expected a tensor beside ref_embeddings, got None")
    sizes = (x.shape[0], y.shape[0])
    check_integers("labels", labels, sizes[:1], x)
    check_integers("ref_labels", ref_labels, sizes[1:], x)
    check_integer_pair("ids", ids, "ref_ids", ref_ids, sizes, x)
    return _Search(x, y, own, labels, ref_labels, ids, ref_ids, metric, backend)


def _check_metric(metric: str) -> None:
    known = ("dot", *(name for name in METRICS if name != "mahalanobis"))
    validation.check_choice("metric", metric, known)


def _check_k(name: str, k: int | Sequence[int]) -> list[int]:
    several = list(k) if isinstance(k, list | tuple) else [k]
    for one in several:
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"{name}: expected integers >= 1, got {type(one).__name__}")
        if one < 1:
            raise ValueError(f"{name}: expected values >= 1, got {one}")
    if not several:
        raise ValueError(f"{name}: expected at least one value, got none")
    return several


def _relevant(search: _Search) -> Tensor:
    """How many rows of the gallery are relevant to each query. [N] int64"""
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


def _matches(values: Tensor, among: Tensor) -> Tensor:
    among = among.sort().values
    high = torch.searchsorted(among, values.to(among.dtype).contiguous(), right=True)
    return high - torch.searchsorted(among, values.to(among.dtype).contiguous())


def _joint(search: _Search) -> tuple[Tensor, Tensor]:
    """One number for each (label, id)."""
    n = len(search.labels)
    labels = torch.cat([search.labels.long(), search.ref_labels.long()])
    ids = torch.cat([search.ids.long(), search.ref_ids.long()])
    labels = labels.unique(return_inverse=True)[1]
    names, ids = ids.unique(return_inverse=True)
    key = labels * len(names) + ids
    return key[:n], key[n:]


def _neighbours(search: _Search, k: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Runs of queries, their k nearest distances (or largest products) and columns [B, k].

    -1 where there are fewer. k is cut to the gallery's size.
    """
    n, m = search.x.shape[0], search.y.shape[0]
    k = max(1, min(k, m))
    if k > MOST:
        yield from _long_neighbours(search, k)
        return
    step = max(1, LISTED // k)
    given = dict(metric=search.metric, backend=search.backend)
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


def _distances(search: _Search) -> Iterator[tuple[slice, Tensor]]:
    """Runs of queries against the whole gallery, smaller is nearer; NaN where not a candidate."""
    x, y, metric = search.x, search.y, search.metric
    if metric == "cosine":
        # not once a run
        x, metric = unit(x.to(accumulate_dtype(x.dtype))), "sqeuclidean"
        y = x if search.own else unit(y.to(x.dtype))
    n, m = x.shape[0], y.shape[0]
    size = 8 if x.dtype == torch.float64 else 4
    step = max(1, BLOCK_BYTES // (size * max(1, m)))
    for i in range(0, n, step):
        run = slice(i, min(i + step, n))
        if metric == "dot":
            d = -pairwise_similarity(x[run], y, "dot", backend=search.backend)
        else:
            d = pairwise_distance(x[run], y, metric, backend=search.backend)
        if search.metric == "cosine":
            d = d / 2  # 1 - cos = |u - v|^2 / 2
        if search.own:
            d[torch.arange(len(d)), torch.arange(i, run.stop)] = torch.nan
        if search.ids is not None:
            d[search.ids[run, None] == search.ref_ids] = torch.nan
        yield run, d


def _long_neighbours(search: _Search, k: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Beyond what pairwise_topk takes: whole rows of distances, sorted."""
    for run, d in _distances(search):
        value, index = _finite(d).sort(dim=1, stable=True)
        taken = torch.arange(k, device=d.device) < (~d.isnan()).sum(dim=1, keepdim=True)
        value = -value if search.metric == "dot" else value
        yield run, value[:, :k], torch.where(taken, index[:, :k], -1)


def _finite(d: Tensor) -> Tensor:
    """inf where d is NaN, and there only."""
    return torch.where(d.isnan(), torch.inf, d.clamp(max=torch.finfo(d.dtype).max))


def _hits(search: _Search, k: int) -> Iterator[tuple[slice, Tensor]]:
    """Runs of queries, and which of their k nearest rows are relevant. [B, k] bool"""
    for run, _, index in _neighbours(search, k):
        found = search.ref_labels[index.clamp_min(0)] if len(search.y) else index
        yield run, (index >= 0) & (found == search.labels[run, None])


def _mean(
    search: _Search, relevant: Tensor, values: dict[int, Tensor], k: int | Sequence[int] | None
) -> Retrieval:
    """values: of each k a number for each query [N]."""
    counted = relevant > 0
    queries = int(counted.sum())
    means = {
        one: float(value[counted].mean()) if queries else float("nan")
        for one, value in values.items()
    }
    found = means if isinstance(k, list | tuple) else next(iter(means.values()))
    return Retrieval(found, queries, len(search.labels) - queries)


def _averaged(
    search: _Search, longest: int, ks: dict[int, Tensor], precise: bool, relevant: Tensor
) -> dict[int, Tensor]:
    """For each k, whose ranks [N] end where ks says, the sum of hits, or of precisions at hits."""
    dtype = row_dtype(search.x.device)
    out = {k: relevant.new_zeros(len(relevant), dtype=dtype) for k in ks}
    for run, hit in _hits(search, longest):
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
    backend: str | None = None,
) -> Retrieval:
    """The share of queries with a relevant row among their k nearest.

    Args:
        embeddings, labels: [N, D], integers [N], the queries. ref_embeddings, ref_labels: [M, D],
            [M], the gallery; None: the queries themselves, each without itself.
        k: >= 1; several in one search: value is then a dict. It may be larger than the gallery.
        metric: a distance of `pairwise_distance` (without arguments; not mahalanobis), or "dot".
        ids, ref_ids: integers; rows with equal ids are left out of a query's neighbours.

    Returns `Retrieval`: the mean over the queries with a relevant row; the others are counted. A
    query with NaN finds nothing. Raises ValueError, TypeError for arguments that do not fit.
    Time O(N M D); memory O(N + M) and a few blocks.
    """
    several = _check_k("k", k)
    search = _search(embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend)
    with no_autocast(embeddings.device):
        relevant = _relevant(search)
        ends = {one: torch.full_like(relevant, one) for one in several}
        found = _averaged(search, max(several), ends, False, relevant)
        hit = {one: (sums > 0).to(sums.dtype) for one, sums in found.items()}
        return _mean(search, relevant, hit, k)


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
    backend: str | None = None,
) -> Retrieval:
    """The share of relevant rows among the k nearest; the divisor is k, however few there are.

    Arguments, result, errors and cost as in `recall_at_k`.
    """
    several = _check_k("k", k)
    search = _search(embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend)
    with no_autocast(embeddings.device):
        relevant = _relevant(search)
        ends = {one: torch.full_like(relevant, one) for one in several}
        found = _averaged(search, max(several), ends, False, relevant)
        return _mean(search, relevant, {one: sums / one for one, sums in found.items()}, k)


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
    backend: str | None = None,
) -> Retrieval:
    """Mean average precision: (1 / min(R, k)) sum over relevant ranks i <= k of precision at i.

    R: a query's relevant rows. Arguments, result, errors and cost as in `recall_at_k`. Weyand et
    al., Google Landmarks v2, 2020 (mAP@100).
    """
    several = _check_k("k", k)
    search = _search(embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend)
    with no_autocast(embeddings.device):
        relevant = _relevant(search)
        ends = {one: torch.full_like(relevant, one) for one in several}
        found = _averaged(search, max(several), ends, True, relevant)
        parts = {one: sums / relevant.clamp(1, one) for one, sums in found.items()}
        return _mean(search, relevant, parts, k)


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
    backend: str | None = None,
) -> Retrieval:
    """MAP@R: (1 / R) sum over relevant ranks i <= R of precision at i, R a query's relevant rows.

    Arguments, result, errors as in `recall_at_k`; memory O(N + M + max R) and a few blocks.
    Musgrave et al., A Metric Learning Reality Check, 2020.
    """
    search = _search(embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend)
    return _at_r(search, True)


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
    backend: str | None = None,
) -> Retrieval:
    """The share of relevant rows among the R nearest, R a query's relevant rows.

    Arguments, result, errors and cost as in `map_at_r`.
    """
    search = _search(embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend)
    return _at_r(search, False)


def _at_r(search: _Search, precise: bool) -> Retrieval:
    with no_autocast(search.x.device):
        relevant = _relevant(search)
        longest = int(relevant.max()) if len(relevant) else 0
        found = {0: relevant.new_zeros(len(relevant), dtype=row_dtype(search.x.device))}
        if longest:
            found = _averaged(search, longest, {0: relevant}, precise, relevant)
        return _mean(search, relevant, {0: found[0] / relevant.clamp_min(1)}, None)


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
    backend: str | None = None,
) -> Retrieval:
    """The mean of 1 / rank of the nearest relevant row; with k, 0 where that rank is above k.

    Arguments, result, errors as in `recall_at_k`. k None: over the whole gallery, by counting what
    is nearer in one pass of distances. Time O(N M D); memory O((N + M) D) and a few blocks.
    """
    if k is not None:
        if isinstance(k, list | tuple):
            raise TypeError(f"k: expected an integer or None, got {type(k).__name__}")
        _check_k("k", k)
    search = _search(embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend)
    with no_autocast(embeddings.device):
        relevant = _relevant(search)
        out = relevant.new_zeros(len(relevant), dtype=row_dtype(search.x.device))
        if k is not None:
            for run, hit in _hits(search, k):
                rank = hit.int().argmax(dim=1) + 1
                out[run] = torch.where(hit.any(dim=1), 1 / rank.to(out.dtype), 0)
        elif len(search.y):
            columns = torch.arange(len(search.y), device=search.x.device)
            for run, d in _distances(search):
                hit = (search.labels[run, None] == search.ref_labels) & ~d.isnan()
                key = _finite(d)
                nearest, at = torch.where(hit, key, torch.inf).min(dim=1, keepdim=True)
                before = (key < nearest) | ((key == nearest) & (columns < at))
                rank = before.sum(dim=1) + 1
                out[run] = torch.where(hit.any(dim=1), 1 / rank.to(out.dtype), 0)
        return _mean(search, relevant, {0: out}, None)


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


# ---- classification -----------------------------------------------------------------------------


@torch.no_grad()
def knn_classify(
    embeddings: Tensor,  # [N, D]
    ref_embeddings: Tensor,  # [M, D]
    ref_labels: Tensor,  # [M]
    *,
    k: int = 10,
    weights: str = "softmax",
    temperature: float = 0.1,
    num_classes: int | None = None,
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    backend: str | None = None,
) -> KnnClasses:
    """The class of the most weight among the k nearest rows of a labelled set.

    Args:
        embeddings, ref_embeddings: [N, D], [M, D]; one tensor twice: each row without itself.
        ref_labels: integers >= 0, [M].
        weights: "uniform" 1, "exp" e^(s / temperature), or "softmax", the same divided by its sum
            over the k; s the cosine, the product, or the negative distance.
        num_classes: also return the scores of every class, [N, num_classes].
        metric, ids, ref_ids: as in `recall_at_k`.

    Of equal classes the lowest wins. Returns `KnnClasses`. Raises ValueError, TypeError for
    arguments that do not fit, IndexError for labels outside [0, num_classes).
    Time O(N M D + N k^2); memory O(N + M) and a few blocks, and the scores if wanted.
    Papers: Wu et al., 2018 (exp); Zhang et al., AdaNPC, 2023 (softmax).
    """
    if isinstance(k, list | tuple):
        raise TypeError(f"k: expected an integer, got {type(k).__name__}")
    _check_k("k", k)
    validation.check_choice("weights", weights, WEIGHTS)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature: expected a number > 0, got {type(temperature).__name__}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")
    if num_classes is not None and (isinstance(num_classes, bool) or num_classes < 1):
        raise ValueError(f"num_classes: expected None or an integer >= 1, got {num_classes}")
    validation.check_matrix("embeddings", embeddings, "[N, D]")
    validation.check_matrix("ref_embeddings", ref_embeddings, "[M, D]")
    check_integers("ref_labels", ref_labels, (ref_embeddings.shape[0],), ref_embeddings)
    if len(ref_labels) and int(ref_labels.min()) < 0:
        raise IndexError(f"ref_labels: expected values >= 0, got {int(ref_labels.min())}")
    if num_classes is not None:
        validation.check_labels(ref_labels, num_classes, name="ref_labels")
    unused = torch.zeros(len(embeddings), dtype=torch.int64, device=embeddings.device)
    if embeddings is ref_embeddings:
        unused = ref_labels
    search = _search(
        *(embeddings, unused, ref_embeddings, ref_labels, metric, ids, ref_ids, backend)
    )
    n, dtype = len(embeddings), accumulate_dtype(embeddings.dtype)
    winner = torch.full((n,), -1, dtype=torch.int64, device=embeddings.device)
    score = torch.zeros(n, dtype=dtype, device=embeddings.device)
    dense = None if num_classes is None else score.new_zeros((n, num_classes))
    k = max(1, min(k, len(ref_embeddings)))
    with no_autocast(embeddings.device):
        for run, value, index in _neighbours(search, k) if len(ref_embeddings) else ():
            label = ref_labels.long()[index.clamp_min(0)]
            weight = _weights(value, index, weights, temperature, metric)
            for i in range(0, len(index), step := max(1, LISTED // (k * k))):
                part = slice(i, i + step)
                at = slice(run.start + i, min(run.start + i + step, run.stop))
                # a class's sum has one order, so equal ones are equal to the bit
                same = label[part, :, None] == label[part, None, :]
                total = torch.where(same, weight[part, None, :], 0).sum(dim=2)
                taken = index[part] >= 0
                best = torch.where(taken, total, -torch.inf).amax(dim=1, keepdim=True)
                first = taken & (total == best)
                lowest = torch.where(first, label[part], torch.iinfo(torch.int64).max).amin(dim=1)
                some = taken.any(dim=1)
                winner[at] = torch.where(some, lowest, -1)
                score[at] = torch.where(some, best[:, 0], 0).to(dtype)
                if dense is not None:
                    # a place that is no neighbour writes to a column of its own
                    place = torch.where(taken, label[part], num_classes)
                    wide = dense.new_zeros((len(place), num_classes + 1))
                    dense[at] = wide.scatter(1, place, total.to(dtype))[:, :num_classes]
    return KnnClasses(winner, score, dense)


def _weights(value: Tensor, index: Tensor, weights: str, temperature: float, metric: str) -> Tensor:
    """The weight of each neighbour, 0 where there is none. [B, k] float64 where there is that"""
    taken = index >= 0
    value = value.to(row_dtype(value.device))
    if weights == "uniform":
        return taken.to(value.dtype)
    similarity = value if metric == "dot" else 1 - value if metric == "cosine" else -value
    z = torch.where(taken, similarity / temperature, -torch.inf)
    if weights == "softmax":
        top = z.amax(dim=1, keepdim=True)
        z = torch.where(taken, z - top, -torch.inf)
        mass = z.exp()
        return mass / mass.sum(dim=1, keepdim=True).clamp_min(1)
    return z.exp()

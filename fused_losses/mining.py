"""Mining: the triplets and pairs that a loss is worth taking over, of a batch or against a memory.

d is a distance, or the negative of a similarity ("dot", "cosine"): smaller is nearer. Of one label:
a positive; of another: a negative. A row is never its own positive, and pairs with equal ids are
left out. Distances are computed a block of rows at a time; nothing is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.integers import dense, dense_pair
from fused_losses.base.numerics import accumulate_dtype, no_autocast, row_dtype
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_both, check_integer_pair, check_integers, check_rows
from fused_losses.neighbors import pairwise_topk
from fused_losses.primitives.distances.op import distance_matrix

SIMILARITIES = ("dot", "cosine")
DISTANCES = (
    "euclidean",
    "sqeuclidean",
    "cityblock",
    "chebyshev",
    "minkowski",
    "canberra",
    "braycurtis",
)
CHOICES = ("hardest", "easiest", "semihard", "all")
RANKS = ("all", "hardest", "easiest")
RULES = ("all", "hard", "semihard", "easy")
STRATEGIES = (
    "multi_similarity",
    "pair_margin",
    "ranked",
    "distance_weighted",
    "angular",
    "all",
)
BLOCK_BYTES = 2 << 20  # of distances in a block; about ten such are alive


class _TripletFields(NamedTuple):
    anchor: Tensor  # [T] int64, rows of embeddings
    positive: Tensor  # [T] int64, rows of ref_embeddings
    negative: Tensor  # [T] int64
    positive_distance: Tensor  # [T]
    negative_distance: Tensor  # [T]


class Triplets(_TripletFields):
    """Indices int64 [T] and distances [T] of (anchor, positive, negative).

    In the order of the anchors, then the positives, then the negatives. Distances (similarities
    with a similarity) in float32, or float64 for float64 embeddings.
    left_out: how many anchors have no triplet here.
    """

    left_out: int = 0


class _PairFields(NamedTuple):
    anchor: Tensor  # [P] int64, rows of embeddings
    positive: Tensor  # [P] int64, rows of ref_embeddings
    negative_anchor: Tensor  # [Q] int64
    negative: Tensor  # [Q] int64
    positive_distance: Tensor  # [P]
    negative_distance: Tensor  # [Q]


class Pairs(_PairFields):
    """Positive pairs (anchor, positive) [P] and negative pairs (negative_anchor, negative) [Q].

    int64, either list in the order of its anchors, then of the other index; distances as in
    `Triplets`. left_out: how many anchors are in neither list.
    """

    left_out: int = 0


def mine_triplets(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]; None: embeddings
    ref_labels: Tensor | None = None,  # [M]
    *,
    positive: str = "hardest",
    negative: str = "hardest",
    triplets: str = "all",
    margin: float | None = None,
    positive_range: tuple[float, float] | None = None,
    negative_range: tuple[float, float] | None = None,
    metric: str = "euclidean",
    p: float = 2.0,
    normalize: bool = False,
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    precision: str = "fp32",
    backend: str | None = None,
) -> Triplets:
    """Triplets (anchor a, positive p, negative n) of a batch, or of a batch and a memory.

    Args:
        embeddings, labels: [N, D] and integers [N], the anchors. ref_embeddings, ref_labels:
            [M, D], [M], where positives and negatives are looked for; None: the batch itself.
        positive: which positives of an anchor: "hardest" the farthest, "easiest" the nearest,
            "semihard" for each negative that is taken the farthest one nearer than it, "all".
        negative: "hardest" the nearest, "easiest" the farthest, "semihard" for each positive that
            is taken the nearest one farther than it, "all". Not both sides can be "semihard".
        triplets, margin: which of those are kept, by g = d(a, n) - d(a, p): "all" with g <= margin
            (None: every one), "hard" with g <= 0, "semihard" with g > 0 (both g <= margin, too),
            "easy" with g > margin (None: 0).
        positive_range, negative_range: (low, high): pairs at a distance outside do not take part.
        metric: a distance, euclidean, sqeuclidean, cityblock, chebyshev, minkowski (with p),
            canberra or braycurtis; or a similarity, dot or cosine, where larger is nearer.
        normalize: divide the rows by their norms first.
        ids, ref_ids: integers; rows with equal ids are never paired.

    positive = negative = "hardest" is batch-hard mining. positive="all" with a margin: with
    negative="hardest" FaceNet's pairs, "semihard" its semi-hard negatives, "all" every triplet that
    violates the margin. Of equal distances the lowest index is taken. A pair at a NaN distance is
    never taken. Nothing is differentiated: the distances need no gradient.

    Returns `Triplets`. Raises ValueError, TypeError for arguments that do not fit.
    Time O(N M D), and O(N M log M) for "semihard", O(N P M) for all of both sides with P positives
    a row; memory beyond what is returned O((N + M) D) and a few blocks.
    Papers: Schroff et al., FaceNet, 2015; Hermans et al., 2017; Xuan et al., 2020 (easy positives).
    """
    validation.check_choice("positive", positive, CHOICES)
    validation.check_choice("negative", negative, CHOICES)
    validation.check_choice("triplets", triplets, RULES)
    if positive == negative == "semihard":
        raise ValueError(
            "negative: expected 'hardest', 'easiest' or 'all' with positive='semihard' (each would "
            "be chosen by the other), got 'semihard'"
        )
    _check_range("positive_range", positive_range)
    _check_range("negative_range", negative_range)
    if margin is not None:
        _check_number("margin", margin)
    batch = _batch(
        *(embeddings, labels, ref_embeddings, ref_labels, ids, ref_ids),
        *(metric, p, normalize, precision, backend),
    )
    with torch.no_grad(), no_autocast(embeddings.device):
        keep = _rule(triplets, margin)
        ranked = {"hardest", "easiest"}
        if positive in ranked and negative in ranked and positive_range is negative_range is None:
            return _one_each(batch, positive, negative, keep)
        ranges = (positive_range, negative_range)
        sides = (positive, negative, ranges, keep)
        lines = (line for block in _blocks(batch) for line in _block_triplets(block, *sides))
        return _gathered_triplets(batch, lines)


def mine_pairs(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]; None: embeddings
    ref_labels: Tensor | None = None,  # [M]
    *,
    strategy: str = "multi_similarity",
    epsilon: float = 0.1,
    positive_margin: float = 0.2,
    negative_margin: float = 0.8,
    positive: str = "all",
    negative: str = "hardest",
    k: int = 1,
    positive_range: tuple[float, float] | None = None,
    negative_range: tuple[float, float] | None = None,
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
    generator: torch.Generator | None = None,
    angle: float = 20.0,
    metric: str | None = None,
    p: float = 2.0,
    normalize: bool = False,
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    precision: str = "fp32",
    backend: str | None = None,
) -> Pairs:
    """Positive pairs and negative pairs, two lists.

    Args:
        embeddings, labels, ref_embeddings, ref_labels, p, normalize, ids, ref_ids: as in
            `mine_triplets`. metric, too; None: cosine for "multi_similarity", else euclidean.
        strategy: "multi_similarity": positives with d + epsilon > the least d of a negative,
            negatives with d - epsilon < the largest d of a positive; a row without either has none.
            "pair_margin": positives with d > positive_margin, negatives with d < negative_margin
            (of a similarity: s < positive_margin, s > negative_margin).
            "ranked": of each row's positives and negatives apart "all", or the k "hardest" or
            "easiest" (`positive`, `negative`, within positive_range and negative_range).
            "distance_weighted": for every positive pair one negative, drawn with a probability
            proportional to 1 / q(max(d, cutoff)) from those with d < nonzero_loss_cutoff, where
            q(d) = d^(D-2) (1 - d^2/4)^((D-3)/2) is the density of distances on the sphere. Rows
            are normalised. The two lists are aligned: line t is a triplet.
            "angular": every (a, p, n) with arctan(d(a, p) / (2 d(n, c))) > angle degrees, c the
            middle of a and p. The two lists are aligned.
            "all": every pair.
        generator: of the draws (None: torch's own, of the CPU).

    Returns `Pairs`. Raises ValueError, TypeError for arguments that do not fit.
    Time O(N M D), "ranked" with k or a range O(N M log M) more, "angular" O(N P M D) with P
    positives a row; memory beyond what is returned O((N + M) D) and a few blocks.
    Papers: Wang et al., 2019 (multi-similarity); Wu et al., 2017 (distance-weighted); Wang et al.,
    2017 (angular).
    """
    validation.check_choice("strategy", strategy, STRATEGIES)
    validation.check_choice("positive", positive, RANKS)
    validation.check_choice("negative", negative, RANKS)
    _check_range("positive_range", positive_range)
    _check_range("negative_range", negative_range)
    numbers = dict(
        epsilon=epsilon,
        positive_margin=positive_margin,
        negative_margin=negative_margin,
        cutoff=cutoff,
        nonzero_loss_cutoff=nonzero_loss_cutoff,
        angle=angle,
    )
    for name, value in numbers.items():
        _check_number(name, value)
    if not 0 < cutoff <= 2:
        raise ValueError(f"cutoff: expected a distance in (0, 2], got {cutoff}")
    if not 0 < angle < 90:
        raise ValueError(f"angle: expected degrees in (0, 90), got {angle}")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an integer >= 1, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k: expected a value >= 1, got {k}")
    if strategy in ("distance_weighted", "angular") and metric not in (None, "euclidean"):
        raise ValueError(
            f"metric: expected None or 'euclidean' with strategy={strategy!r}, got {metric!r}"
        )
    if metric is None:
        metric = "cosine" if strategy == "multi_similarity" else "euclidean"
    batch = _batch(
        *(embeddings, labels, ref_embeddings, ref_labels, ids, ref_ids),
        *(metric, p, normalize or strategy == "distance_weighted", precision, backend),
    )
    with torch.no_grad(), no_autocast(embeddings.device):
        if strategy == "distance_weighted":
            shape = (float(cutoff), float(nonzero_loss_cutoff))
            drawn = (_drawn(batch, block, *shape, generator) for block in _blocks(batch))
            return _as_pairs(_gathered_triplets(batch, drawn))
        if strategy == "angular":
            batch = _widened(batch)
            limit = 2 * math.tan(math.radians(angle))
            wide = (line for b in _blocks(batch) for line in _wide_angles(batch, b, limit))
            return _as_pairs(_gathered_triplets(batch, wide))

        def choose(block: _Block) -> tuple[Tensor, Tensor]:
            z, same, different = block.z, block.positive, block.negative
            if strategy == "multi_similarity":
                nearest = torch.where(different, z, torch.inf).amin(dim=1, keepdim=True)
                farthest = torch.where(same, z, -torch.inf).amax(dim=1, keepdim=True)
                return same & (z + epsilon > nearest), different & (z - epsilon < farthest)
            if strategy == "pair_margin":
                near, far = batch.sign * negative_margin, batch.sign * positive_margin
                return same & (z > far), different & (z < near)
            if strategy == "ranked":
                same = _within(block, same, positive_range)
                different = _within(block, different, negative_range)
                return (
                    _ranked(z, same, positive, k, farthest=positive == "hardest"),
                    _ranked(z, different, negative, k, farthest=negative == "easiest"),
                )
            return same, different

        return _gathered_pairs(batch, choose)


# ---- checks and preparation ---------------------------------------------------------------------


class _Batch(NamedTuple):
    """One call, checked. z = sign * distance: smaller is nearer, whatever the metric."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    x_labels: Tensor  # [N] int32
    y_labels: Tensor  # [M] int32
    x_ids: Tensor | None  # [N] int32
    y_ids: Tensor | None  # [M] int32
    own: bool  # y is x
    kind: str  # of the distance matrix
    sign: int
    p: float
    precision: str
    backend: str | None


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if math.isnan(value):
        raise ValueError(f"{name}: expected a number, got {value}")


def _check_range(name: str, bounds: tuple[float, float] | None) -> None:
    if bounds is None:
        return
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"{name}: expected (low, high), got {bounds!r}")
    for bound in bounds:
        _check_number(name, bound)
    if bounds[0] > bounds[1]:
        raise ValueError(f"{name}: expected low <= high, got {bounds!r}")


def _batch(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    ids: Tensor | None,
    ref_ids: Tensor | None,
    metric: str,
    p: float,
    normalize: bool,
    precision: str,
    backend: str | None,
) -> _Batch:
    validation.check_choice("metric", metric, (*DISTANCES, *SIMILARITIES))
    _check_number("p", p)
    if p != 2.0 and metric != "minkowski":
        raise ValueError(f"p: expected no value with metric={metric!r}, got {p}")
    if not 0 < p < math.inf:
        raise ValueError(f"p: expected a finite value > 0, got {p}")
    own = ref_embeddings is None or ref_embeddings is embeddings
    if ref_embeddings is None and ref_labels is not None:
        raise ValueError("ref_embeddings: expected a tensor beside ref_labels, got None")
    if own:
        check_rows("embeddings", embeddings, precision)
        x = y = embeddings
        ref_labels = labels if ref_labels is None else ref_labels
        ref_ids = ids if ref_ids is None else ref_ids
    else:
        x = check_both("embeddings", embeddings, "ref_embeddings", ref_embeddings, precision)
        y = ref_embeddings
        if ref_labels is None:
            raise ValueError("ref_labels: expected a tensor beside ref_embeddings, got None")
    sizes = (x.shape[0], y.shape[0])
    check_integers("labels", labels, sizes[:1], x)
    check_integers("ref_labels", ref_labels, sizes[1:], x)
    check_integer_pair("ids", ids, "ref_ids", ref_ids, sizes, x)
    with torch.no_grad():
        x, y = x.detach(), y.detach()
        if normalize or metric == "cosine":
            # unit rows rounded to a narrow type would be mined by other cosines
            x = unit(x.to(accumulate_dtype(x.dtype)))
            y = x if own else unit(y.to(accumulate_dtype(y.dtype)))
        elif own:
            y = x
        if ref_labels is labels:
            x_labels = y_labels = dense(labels)
        else:
            x_labels, y_labels = dense_pair(labels, ref_labels)
        x_ids, y_ids = dense_pair(ids, ref_ids)
    kind = "dot" if metric == "cosine" else metric
    sign = -1 if metric in SIMILARITIES else 1
    return _Batch(
        *(x, y, x_labels, y_labels, x_ids, y_ids, own, kind, sign),
        *(float(p), precision, backend),
    )


def _widened(batch: _Batch) -> _Batch:
    """The same in the accumulation dtype."""
    x = batch.x.to(accumulate_dtype(batch.x.dtype))
    return batch._replace(x=x, y=x if batch.own else batch.y.to(x.dtype))


# ---- blocks of rows -----------------------------------------------------------------------------


class _Block(NamedTuple):
    """Some rows against every column."""

    start: int
    distance: Tensor  # [B, M], the metric's own
    z: Tensor  # [B, M] sign * distance, finite where a pair takes part
    positive: Tensor  # [B, M] bool
    negative: Tensor  # [B, M] bool


def _matrix(batch: _Batch, rows: Tensor) -> Tensor:
    return distance_matrix(
        *(rows, batch.y),
        kind=batch.kind,
        p=batch.p,
        precision=batch.precision,
        backend=batch.backend,
    )


def _rows_at_once(batch: _Batch) -> int:
    size = 8 if batch.x.dtype == torch.float64 else 4
    return max(1, BLOCK_BYTES // (size * max(1, batch.y.shape[0])))


def _blocks(batch: _Batch) -> Iterator[_Block]:
    n, m = batch.x.shape[0], batch.y.shape[0]
    step = _rows_at_once(batch)
    columns = torch.arange(m, device=batch.x.device)
    for start in range(0, n if m else 0, step):
        rows = slice(start, min(start + step, n))
        distance = _matrix(batch, batch.x[rows])
        same = batch.x_labels[rows, None] == batch.y_labels
        taken = ~distance.isnan()
        if batch.own:
            taken &= columns != torch.arange(start, rows.stop, device=columns.device)[:, None]
        if batch.x_ids is not None:
            taken &= batch.x_ids[rows, None] != batch.y_ids
        # finite, for infinity stands for pairs that do not take part
        top = torch.finfo(distance.dtype).max
        z = (batch.sign * distance).clamp(-top, top)
        yield _Block(start, distance, z, same & taken, ~same & taken)


def _within(block: _Block, mask: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    if bounds is None:
        return mask
    return mask & (block.distance >= bounds[0]) & (block.distance <= bounds[1])


def _extreme(z: Tensor, mask: Tensor, *, farthest: bool) -> tuple[Tensor, Tensor]:
    """The first column with the largest or smallest z of the mask [B], and whether there is one."""
    if farthest:
        return torch.where(mask, z, -torch.inf).argmax(dim=1), mask.any(dim=1)
    return torch.where(mask, z, torch.inf).argmin(dim=1), mask.any(dim=1)


def _ranked(z: Tensor, mask: Tensor, which: str, k: int, *, farthest: bool) -> Tensor:
    """The k columns of the mask with the largest or smallest z, as a mask; the lowest of equals."""
    if which == "all":
        return mask
    if k == 1:
        index, some = _extreme(z, mask, farthest=farthest)
        return torch.zeros_like(mask).scatter(1, index[:, None], some[:, None])
    key = torch.where(mask, -z if farthest else z, torch.inf)
    order = key.sort(dim=1, stable=True).indices[:, :k]
    return torch.zeros_like(mask).scatter(1, order, mask.gather(1, order))


# ---- triplets -----------------------------------------------------------------------------------

Keep = Callable[[Tensor], Tensor]  # g = d(a, n) - d(a, p) -> bool
Lines = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # the fields of Triplets


def _rule(triplets: str, margin: float | None) -> Keep | None:
    """Which g are kept; None: every one."""
    if triplets == "easy":
        return lambda g: g > (margin or 0.0)
    if triplets == "semihard":
        return lambda g: (g > 0) if margin is None else (g > 0) & (g <= margin)
    if triplets == "hard":
        limit = 0.0 if margin is None else min(0.0, margin)
        return lambda g: g <= limit
    return None if margin is None else lambda g: g <= margin


def _one_each(batch: _Batch, positive: str, negative: str, keep: Keep | None) -> Triplets:
    """The hardest or easiest of either side: two streamed selections, no block of distances."""

    def best(match: str, farthest: bool) -> tuple[Tensor, Tensor]:
        values, index = pairwise_topk(
            *(batch.x, None if batch.own else batch.y, 1, batch.kind),
            p=batch.p,
            largest=farthest == (batch.sign > 0),
            x_labels=batch.x_labels,
            y_labels=batch.y_labels,
            match=match,
            x_ids=batch.x_ids,
            y_ids=batch.y_ids,
            skip_self=batch.own,
            backend=batch.backend,
        )
        return values[:, 0], index[:, 0]

    near, p = best("same", positive == "hardest")
    far, n = best("different", negative == "easiest")
    kept = (p >= 0) & (n >= 0)
    if keep is not None:
        kept &= keep(batch.sign * (far - near))
    anchor = kept.nonzero()[:, 0]
    found = (anchor, p, n, near, far)
    if len(anchor) < len(kept):
        found = (anchor, p[anchor], n[anchor], near[anchor], far[anchor])
    out = Triplets(*found)
    out.left_out = len(kept) - len(anchor)
    return out


def _block_triplets(
    block: _Block,
    positive: str,
    negative: str,
    ranges: tuple[tuple[float, float] | None, tuple[float, float] | None],
    keep: Keep | None,
) -> Iterator[Lines]:
    z = block.z
    same = _within(block, block.positive, ranges[0])
    different = _within(block, block.negative, ranges[1])
    if positive == "all" and negative == "all":
        yield from _every(block, same, different, keep)
        return
    far, near = positive == "hardest", negative == "easiest"
    if negative == "semihard":
        i, p = _ranked(z, same, positive, 1, farthest=far).nonzero(as_tuple=True)
        n, found = _next_farther(z, different, i, p)
    elif positive == "semihard":
        i, n = _ranked(z, different, negative, 1, farthest=near).nonzero(as_tuple=True)
        p, found = _next_nearer(z, same, i, n)
    elif negative == "all":
        i, n = different.nonzero(as_tuple=True)
        index, some = _extreme(z, same, farthest=far)
        p, found = index[i], some[i]
    else:
        i, p = _ranked(z, same, positive, 1, farthest=far).nonzero(as_tuple=True)
        index, some = _extreme(z, different, farthest=near)
        n, found = index[i], some[i]
    if keep is not None:
        found = found & keep(z[i, n] - z[i, p])
    i, p, n = i[found], p[found], n[found]
    if positive == "semihard" and negative == "all":
        # the list stands in the order of its negatives
        m = z.shape[1]
        order = ((i * m + p) * m + n).argsort()
        i, p, n = i[order], p[order], n[order]
    yield _lines(block, i, p, n)


def _lines(block: _Block, i: Tensor, p: Tensor, n: Tensor) -> Lines:
    return (i + block.start, p, n, block.distance[i, p], block.distance[i, n])


def _slices(block: _Block, pairs: int) -> Iterator[slice]:
    """Runs of pairs that against every column take no more than the block does."""
    step = max(1, block.z.shape[0])
    for at in range(0, pairs, step):
        yield slice(at, min(at + step, pairs))


def _every(block: _Block, same: Tensor, different: Tensor, keep: Keep | None) -> Iterator[Lines]:
    """Each positive with each negative."""
    i, p = same.nonzero(as_tuple=True)
    for run in _slices(block, len(i)):
        rows, near = i[run], block.z[i[run], p[run]]
        kept = different[rows]
        if keep is not None:
            kept &= keep(block.z[rows] - near[:, None])
        pair, n = kept.nonzero(as_tuple=True)
        yield _lines(block, rows[pair], p[run][pair], n)


def _places(sorted_rows: Tensor, i: Tensor, values: Tensor, *, right: bool = False) -> Tensor:
    """searchsorted of values [K] in the rows i [K] (increasing) of sorted_rows [B, M]. [K]"""
    # side by side in their rows: no copy of a row for each value
    count = i.bincount(minlength=sorted_rows.shape[0])
    column = torch.arange(len(i), device=i.device) - (count.cumsum(0) - count)[i]
    sought = values.new_zeros((len(count), int(count.max()) if len(i) else 0))
    sought[i, column] = values
    return torch.searchsorted(sorted_rows, sought, right=right)[i, column]


def _next_farther(z: Tensor, mask: Tensor, i: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest column of the mask farther than p, of each pair (i, p); whether there is one."""
    values, order = torch.where(mask, z, torch.inf).sort(dim=1, stable=True)
    place = _places(values, i, z[i, p], right=True)
    found = place < mask.sum(dim=1)[i]
    return order[i, place.clamp_max(z.shape[1] - 1)], found


def _next_nearer(z: Tensor, mask: Tensor, i: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """The farthest column of the mask nearer than n, of each pair (i, n); whether there is one."""
    values, order = torch.where(mask, z, torch.inf).sort(dim=1, stable=True)
    place = _places(values, i, z[i, n]) - 1
    found = place >= 0
    # of equal ones the first
    first = _places(values, i, values[i, place.clamp_min(0)])
    return order[i, first], found


def _gathered_triplets(batch: _Batch, lines: Iterable[Lines]) -> Triplets:
    table = _Table(batch, indices=3, distances=2)
    for line in lines:
        table.add(line)
    out = Triplets(*table.columns())
    out.left_out = batch.x.shape[0] - len(out.anchor.unique_consecutive())
    return out


class _Table:
    """Columns that grow in place: small tensors kept from every block would break up the heap."""

    def __init__(self, batch: _Batch, *, indices: int, distances: int) -> None:
        rows, device = batch.x.shape[0], batch.x.device
        dtypes = [torch.int64] * indices + [accumulate_dtype(batch.x.dtype)] * distances
        self.held = [torch.empty(rows, dtype=dtype, device=device) for dtype in dtypes]
        self.rows = 0

    def add(self, columns: tuple[Tensor, ...]) -> None:
        end = self.rows + len(columns[0])
        room = len(self.held[0])
        for k, fresh in enumerate(columns):
            if end > room:
                wide = self.held[k].new_empty(max(end, 2 * room))
                wide[: self.rows] = self.held[k][: self.rows]
                self.held[k] = wide
            self.held[k][self.rows : end] = fresh
        self.rows = end

    def columns(self) -> list[Tensor]:
        # a copy, where the room left is more than what is filled
        return [
            h[: self.rows] if len(h) <= 2 * self.rows else h[: self.rows].clone() for h in self.held
        ]


# ---- pairs --------------------------------------------------------------------------------------


def _gathered_pairs(batch: _Batch, choose: Callable[[_Block], tuple[Tensor, Tensor]]) -> Pairs:
    """choose: the pairs of a block that are taken, positive and negative, as masks."""
    tables = [_Table(batch, indices=2, distances=1) for _ in range(2)]
    for block in _blocks(batch):
        for table, taken in zip(tables, choose(block), strict=True):
            i, j = taken.nonzero(as_tuple=True)
            table.add((i + block.start, j, block.distance[i, j]))
    (a, p, near), (b, n, far) = (table.columns() for table in tables)
    out = Pairs(a, p, b, n, near, far)
    seen = torch.zeros(batch.x.shape[0], dtype=torch.bool, device=batch.x.device)
    seen[a] = True
    seen[b] = True
    out.left_out = len(seen) - int(seen.sum())
    return out


def _as_pairs(triplets: Triplets) -> Pairs:
    a, p, n, near, far = triplets
    out = Pairs(a, p, a, n, near, far)
    out.left_out = triplets.left_out
    return out


def _drawn(
    batch: _Batch,
    block: _Block,
    cutoff: float,
    nonzero_loss_cutoff: float,
    generator: torch.Generator | None,
) -> Lines:
    """A negative for each positive pair, by the inverse of the law's distribution function."""
    dimension = batch.x.shape[1]
    i, p = block.positive.nonzero(as_tuple=True)
    draws = torch.rand(
        len(i),
        dtype=torch.float64,
        generator=generator,
        device="cpu" if generator is None else generator.device,
    )
    draws = draws.to(i.device, row_dtype(i.device))
    d = block.distance.to(draws.dtype).clamp_min(cutoff)
    log_weight = (2 - dimension) * d.log() - (dimension - 3) / 2 * (1 - d.square() / 4).log()
    taken = block.negative & (d < nonzero_loss_cutoff) & log_weight.isfinite()
    log_weight = torch.where(taken, log_weight, -torch.inf)
    top = log_weight.amax(dim=1, keepdim=True)
    some = taken.any(dim=1)
    summed = torch.where(taken, (log_weight - top).exp(), 0).cumsum(dim=1)
    total = summed[:, -1]
    # strictly below the total, or nothing would be found
    sought = torch.minimum(draws * total[i], total.nextafter(total * 0)[i])
    n = _places(summed, i, sought, right=True)
    found = some[i]
    return _lines(block, i[found], p[found], n[found])


def _wide_angles(batch: _Batch, block: _Block, limit: float) -> Iterator[Lines]:
    """Triplets with d(a, p) > limit * d(n, (a + p) / 2)."""
    i, p = block.positive.nonzero(as_tuple=True)
    for run in _slices(block, len(i)):
        rows, columns = i[run], p[run]
        centre = (batch.x[rows + block.start] + batch.y[columns]) / 2
        wide = block.distance[rows, columns, None] > limit * _matrix(batch, centre)
        pair, n = (wide & block.negative[rows]).nonzero(as_tuple=True)
        yield _lines(block, rows[pair], columns[pair], n)

"""Losses over one triplet a row: its positive and its negative, each chosen by a rule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.examples import PRECISIONS, examples
from fused_losses.base.indices import Indices, ListedPairs, PairList
from fused_losses.base.numerics import (
    accumulate_dtype,
    nan_where_infinite,
    no_autocast,
    reduced,
    root,
    softplus,
)
from fused_losses.base.sides import batch_sides
from fused_losses.base.validation import check_at_least, check_plain
from fused_losses.functions.listed_triplets import listed_example, pair_distances
from fused_losses.functions.scored_rows import DISTANCES, scored_rows
from fused_losses.primitives.row_rules.inputs import PICKS, ROW_SCORES, RowInputs
from fused_losses.primitives.row_rules.op import row_losses
from fused_losses.primitives.topk.inputs import TopkInputs
from fused_losses.primitives.topk.op import best_screen, select


def listed_distances(x: Tensor, y: Tensor, index: Tensor, distance: str) -> Tensor:
    """d(x_i, y_index[i, l]), of an index < 0 with row 0; differentiable to any order. [N, L]"""
    dtype = accumulate_dtype(x.dtype)
    near = y.index_select(0, index.clamp_min(0).flatten()).to(dtype)
    near = near.view(*index.shape, y.shape[1])
    x = x.to(dtype)[:, None]
    bad = nan_where_infinite(x) + nan_where_infinite(near)
    if distance == "cosine":
        return 1 - (x * near).sum(dim=2) + bad
    squared = (x - near).square().sum(dim=2) + bad
    return squared if distance == "sqeuclidean" else root(squared)


def chosen_distances(
    inputs: RowInputs,
    positive: str,
    negative: str,
    distance: str,
    backend: str | None,
    listed: ListedPairs | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """d of each row's chosen positive and negative, [N] each, and which rows have both."""
    if listed is not None:
        return _listed_choice(inputs, listed, positive, negative, backend)
    formula = backends.requested(backend) == "reference"
    extreme = "semihard" not in (positive, negative) and inputs.x_groups is None
    if extreme and not formula:
        index = _extremes(inputs, positive == "hardest", negative == "hardest", backend)
    else:
        params = (PICKS.index(positive), PICKS.index(negative))
        inputs = inputs._replace(rule="chosen", params=params)
        index = row_losses(inputs, backend=backend).long()
    if inputs.y.shape[0] == 0:
        nothing = inputs.x.to(accumulate_dtype(inputs.x.dtype)).sum(dim=1) * 0
        return nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool)
    found = (index >= 0).all(dim=1)
    near, far = listed_distances(inputs.x, inputs.y, index, distance).unbind(dim=1)
    if extreme and not formula:
        # a NaN among a row's candidates would have been the extreme one
        near = near + nan_where_infinite(inputs.y).sum()
    return torch.where(found, near, 0), torch.where(found, far, 0), found


def _extremes(inputs: RowInputs, farthest: bool, nearest: bool, backend: str | None) -> Tensor:
    """The columns of each row's extreme positive and negative, -1 over none. [N, 2]"""
    kind, sign = ROW_SCORES[inputs.score]
    # NaN is put back by the distances of what is chosen
    x = inputs.x.detach().nan_to_num(0, torch.inf, -torch.inf)
    same = inputs.y is inputs.x
    y = x if same else inputs.y.detach().nan_to_num(0, torch.inf, -torch.inf)

    def best(match: str, far: bool) -> Tensor:
        return select(
            TopkInputs(
                x,
                y,
                x_labels=inputs.x_labels,
                y_labels=inputs.y_labels,
                kind="dot" if kind == "dot" else "sqeuclidean",
                k=1,
                largest=far == (sign > 0),
                match=match,
                skip_self=inputs.skip_self,
                symmetric=same and inputs.x_labels is inputs.y_labels,
                screen=best_screen(x, backend),
            ),
            backend,
        )[1]

    return torch.cat([best("same", farthest), best("different", not nearest)], dim=1)


@torch.no_grad()
def _first_extreme(
    d: Tensor, rows: Tensor, kept: Tensor, n: int, largest: bool
) -> tuple[Tensor, Tensor]:
    """The extreme d of each row among the lines that are kept, and its first line, -1 over none."""
    worst = -torch.inf if largest else torch.inf
    # a NaN is the extreme one
    hidden = d.masked_fill(~kept, worst)
    best = d.new_full((n,), worst).scatter_reduce(0, rows, hidden, "amax" if largest else "amin")
    lines = d.shape[0]
    is_best = kept & ((hidden == best[rows]) | hidden.isnan())
    line = torch.where(is_best, torch.arange(lines, device=d.device), lines)
    first = torch.full_like(best, lines, dtype=torch.int64).scatter_reduce(0, rows, line, "amin")
    return best, torch.where(first == lines, -1, first)


def _listed_choice(
    inputs: RowInputs, listed: ListedPairs, positive: str, negative: str, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`chosen_distances` among listed pairs."""
    n = inputs.x.shape[0]
    with torch.no_grad():
        d = [pair_distances(inputs, side, backend) for side in listed[:2]]
    sides = (listed.positive, listed.negative)
    kinds, best, line = (positive, negative), {}, {}
    for side in (1, 0) if positive == "semihard" else (0, 1):
        pairs = sides[side]
        kept = torch.ones_like(pairs.rows, dtype=torch.bool) if pairs.kept is None else pairs.kept
        if kinds[side] == "semihard":
            bound = best[1 - side][pairs.rows]
            beyond = d[side] >= bound if side == 0 else d[side] <= bound
            kept = kept & ~beyond
        largest = (kinds[0] != "easiest", kinds[1] == "easiest")[side]
        best[side], line[side] = _first_extreme(d[side], pairs.rows, kept, n, largest)
    found = (line[0] >= 0) & (line[1] >= 0)
    rows = torch.arange(n, device=found.device)
    chosen = []
    for side in (0, 1):
        columns = sides[side].columns
        at = line[side].clamp_min(0)
        # a list of nothing has no line that could be taken
        column = columns[at] if len(columns) else torch.zeros_like(at)
        if len(inputs.y):
            each = pair_distances(inputs, PairList(rows, column), backend)
        else:
            each = inputs.x.to(accumulate_dtype(inputs.x.dtype)).sum(dim=1) * 0
        chosen.append(torch.where(found, each, 0))
    return chosen[0], chosen[1], found


def violated(near: Tensor, far: Tensor, margin: float | None) -> Tensor:
    """The hinge, or without a margin softplus. [N]"""
    return softplus(near - far) if margin is None else F.relu(near - far + margin)


def batch_hard_triplet(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    margin: float | None = None,
    distance: str = "euclidean",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Each row's farthest positive against its nearest negative, the first of equal ones.

        loss_i = [max_P d - min_N d + margin]+;   margin=None: log(1 + e^(max_P d - min_N d))

    embeddings [N, D], labels [N] integers, and ref_embeddings [M, D], ref_labels [M] where the
    positives and negatives are not the batch itself. indices: a miner's (a, p, n) or (a, p, a, n),
    int64, or `Triplets`, `Pairs`: the pairs (a, p) and (a, n) to choose among, of equal ones the
    first; no label is then asked for (None). reduction: "mean" over the rows that have both,
    "sum", "none" [N].

    Returns float32 (float64 for float64 inputs), differentiable to any order. Raises ValueError,
    TypeError, IndexError for bad arguments. Time O(N M D), of P listed pairs O(P D); memory
    O((N + M) D) and a few blocks, and O(P). Paper: Hermans et al., In Defense of the Triplet Loss,
    2017.
    """
    check_plain(margin=margin)
    return batch_easy_hard_triplet(
        embeddings,
        labels,
        ref_embeddings,
        ref_labels,
        indices=indices,
        positive="hardest",
        negative="hardest",
        margin=margin,
        distance=distance,
        normalize=normalize,
        reduction=reduction,
        precision=precision,
        backend=backend,
    )


def batch_easy_hard_triplet(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    positive: str = "easiest",
    negative: str = "semihard",
    margin: float | None = 0.05,
    distance: str = "euclidean",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """One positive and one negative a row, chosen each its own way; else `batch_hard_triplet`.

    positive: "hardest" (farthest), "easiest" (nearest) or "semihard": the farthest that is nearer
    than the chosen negative. negative: "hardest" (nearest), "easiest" or "semihard": the nearest
    that is farther than the chosen positive. Not both "semihard". A row without such a pair is
    left out as well. Paper: Xuan et al., Improved Embeddings with Easy Positive Triplet Mining,
    2020.
    """
    check_plain(margin=margin)
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices
    )
    validation.check_choice("positive", positive, PICKS)
    validation.check_choice("negative", negative, PICKS)
    validation.check_choice("distance", distance, DISTANCES)
    if margin is not None:
        check_at_least("margin", margin, 0)
    if positive == negative == "semihard":
        raise ValueError("negative: expected another choice beside positive='semihard'")
    with no_autocast(embeddings.device):
        inputs = scored_rows(both, distance, precision, normalize)
        near, far, found = chosen_distances(
            inputs, positive, negative, distance, backend, both.listed
        )
        loss = violated(near, far, margin)
        return reduced(loss, found, reduction, accumulate_dtype(both.x.dtype))


_ref = lambda f, t: f(t.x, t.labels, t.y, t.y_labels)


examples(
    batch_hard_triplet,
    lambda f, t: f(t.x, t.labels),
    {
        "": dict(margin=0.3),
        "soft": dict(margin=None),
        "none": dict(margin=0.3, reduction="none"),
        "cosine": dict(margin=0.3, distance="cosine", normalize=True),
    },
)
examples(batch_hard_triplet, _ref, {"ref": dict(margin=0.3, distance="sqeuclidean")})
examples(
    batch_easy_hard_triplet,
    lambda f, t: f(t.x, t.labels, margin=0.3),
    {
        "": dict(positive="easiest", negative="semihard"),
        "semihard, hard": dict(positive="semihard", negative="hardest"),
        "semihard, easy": dict(positive="semihard", negative="easiest", reduction="sum"),
    },
    precisions=PRECISIONS[:3],  # rounded scores choose other semi-hard rows
)
_listed = lambda f, t: f(t.x, None, indices=listed_example(len(t.x), t.x.device))
examples(batch_hard_triplet, _listed, {"listed": dict(margin=0.3)})
_hardest = dict(margin=0.3, positive="hardest", negative="easiest")
examples(batch_easy_hard_triplet, _ref, {"ref": _hardest})

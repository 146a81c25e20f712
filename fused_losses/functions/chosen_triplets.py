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
    no_autocast,
    reduced,
    softplus,
)
from fused_losses.base.sides import batch_sides
from fused_losses.base.validation import check_at_least, check_plain
from fused_losses.functions.listed_triplets import listed_example, pair_distances
from fused_losses.functions.scored_rows import DISTANCES, scored_rows
from fused_losses.primitives.row_rules.inputs import PICKS, ROW_SCORES, RowInputs
from fused_losses.primitives.row_rules.op import row_losses
from fused_losses.primitives.topk.extremes import Extremes, extremes, listed_columns


def listed_distances(inputs: RowInputs, index: Tensor, backend: str | None) -> Tensor:
    """The scores of x_i and y_index[i, l], of an index < 0 those of row 0. [N, L]"""
    n, width = index.shape
    rows = torch.arange(n, device=index.device).repeat_interleave(width)
    pairs = PairList(rows, index.clamp_min(0).flatten())
    return pair_distances(inputs, pairs, backend).view(n, width)


def chosen_distances(
    inputs: RowInputs,
    positive: str,
    negative: str,
    backend: str | None,
    listed: ListedPairs | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """d of each row's chosen positive and negative, [N] each, and which rows have both."""
    if listed is not None:
        return _listed_choice(inputs, listed, positive, negative, backend)
    formula = backends.requested(backend) == "reference"
    extreme = "semihard" not in (positive, negative) and inputs.x_groups is None
    if extreme and not formula:
        kind, sign = ROW_SCORES[inputs.score]
        chosen = extremes(
            *(inputs.x, inputs.y, inputs.x_labels, inputs.y_labels),
            kind="dot" if kind == "dot" else "sqeuclidean",
            largest=((positive == "hardest") == (sign > 0), (negative == "easiest") == (sign > 0)),
            skip_self=inputs.skip_self,
            backend=backend,
        )
    else:
        params = (PICKS.index(positive), PICKS.index(negative))
        picked = inputs._replace(rule="chosen", params=params)
        index = row_losses(picked, backend=backend).long()
        chosen = Extremes(*listed_columns(*index.unbind(dim=1)), False, None)
    if inputs.y.shape[0] == 0:
        nothing = inputs.x.to(accumulate_dtype(inputs.x.dtype)).sum(dim=1) * 0
        return nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool)
    d = pair_distances(inputs, PairList(chosen.rows, chosen.columns), backend)
    d = d.view(2, inputs.x.shape[0])
    if chosen.mark is not None:
        # a NaN among a row's candidates would have been the extreme one
        d = d + chosen.mark
    if not chosen.all_found:
        d = torch.where(chosen.found, d, 0)
    near, far = d
    return near, far, chosen.found


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
        near, far, found = chosen_distances(inputs, positive, negative, backend, both.listed)
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

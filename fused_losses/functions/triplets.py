"""Losses over all triplets, without listing them, and over those that are listed.

d is the distance by name: "euclidean" |x - y|, "sqeuclidean" |x - y|^2 or "cosine" 1 - <x, y> of
unit rows. Equal labels make a positive; where a batch meets itself a row is not its own positive.
A row without a positive or without a negative has no triplet: it is left out of every mean over
triplets, and with reduction="none" its loss is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.indices import Indices, miner_pairs
from fused_losses.base.numerics import (
    accumulate_dtype,
    nan_where_infinite,
    no_autocast,
    reduced,
    softplus,
)
from fused_losses.base.sides import NEITHER, batch_sides, both_of, sides
from fused_losses.base.validation import (
    check_at_least,
    check_class_ids,
    check_count,
    check_integers,
    check_plain,
    number,
)
from fused_losses.functions.listed_triplets import (
    drawn_triplets,
    listed_example,
    listed_triplets,
    swapped_triplets,
)
from fused_losses.functions.scored_rows import DISTANCES, over_terms, scored_rows
from fused_losses.primitives.row_rules.inputs import TRIPLETS, RowInputs
from fused_losses.primitives.row_rules.op import row_losses


def all_triplets(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    margin: float = 0.05,
    triplets: str = "all",
    smooth: bool = False,
    swap: bool = False,
    per_anchor: int | None = None,
    generator: torch.Generator | None = None,
    distance: str = "euclidean",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """The sum over all triplets (a, p, n) of [d_ap - d_an + margin]+, by counting.

    Args:
        embeddings, labels: [N, D], [N] integers, the anchors. ref_embeddings, ref_labels: [M, D],
            [M], where positives and negatives come from; without them the batch itself.
        indices: a miner's triplets (a, p, n), int64 [T], of which no others take part, or pairs
            (a, p, a, n), where each positive of an anchor meets each of its negatives; where both
            a are one tensor line t is a triplet. a are rows of embeddings, p and n of the other
            side; `Triplets` and `Pairs`, too. No label is then asked for (None).
        margin: >= 0.
        triplets: "all"; "hard": d_an <= d_ap; "semihard": d_ap < d_an <= d_ap + margin; "easy":
            d_an > d_ap + margin, with smooth=True only (the hinge is 0 there). The choice is not
            differentiated.
        smooth: log(1 + e^(d_ap - d_an + margin)) in the place of the hinge.
        swap: d_pn in the place of d_an where it is smaller.
        per_anchor: None, or so many triplets of each anchor, drawn evenly with repetition, by
            `generator` (None: torch's own, of the CPU).
        distance: "euclidean", "sqeuclidean", "cosine" (of rows of norm 1; FaceNet: sqeuclidean,
            margin 0.2, semihard, normalize=True).
        reduction: "mean" over the triplets whose loss is not 0 (pytorch-metric-learning; with
            smooth all that are chosen), "sum", "none" [N]: the sum of each anchor's.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    A row's gradient is counts: of the negatives that violate a positive, and the reverse.
    Time O(N M D), and O(M P) a row with P <= 32 positives, else O(M log M); smooth: O(M P); swap:
    O(N P M D). Memory O((N + M) D) and a few blocks. Of lists of T triplets or pairs time O(T D)
    and O(1) a triplet, with swap O(D), memory O(T + (N + M) D).
    Papers: Schroff et al., FaceNet, 2015; Balntas et al., 2016 (swap).
    """
    check_plain(margin=margin)
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices
    )
    check_at_least("margin", margin, 0)
    validation.check_choice("triplets", triplets, TRIPLETS)
    validation.check_choice("distance", distance, DISTANCES)
    if triplets == "easy" and not smooth:
        raise ValueError("triplets: expected smooth=True with 'easy', whose hinges are all 0")
    if per_anchor is not None:
        check_count("per_anchor", per_anchor)
        if indices is not None:
            raise ValueError(f"per_anchor: expected None beside indices, got {per_anchor}")
    with no_autocast(embeddings.device):
        inputs, listed = scored_rows(both, distance, precision, normalize), both.listed
        if per_anchor is not None:
            listed = drawn_triplets(both.labels, both.alone, per_anchor, generator)
        rule = (margin, triplets, smooth)
        if listed is None and not swap:
            return _over_triplets(inputs, *rule, reduction, backend)
        if listed is None:
            total, count = swapped_triplets(inputs, *rule, backend)
        else:
            total, count = listed_triplets(inputs, listed, *rule, swap, backend)
        return over_terms(total, count, reduction, accumulate_dtype(both.x.dtype))


def _over_triplets(
    inputs: RowInputs,
    margin: float,
    triplets: str,
    smooth: bool,
    reduction: str,
    backend: str | None,
) -> Tensor:
    params = (margin, TRIPLETS.index(triplets), smooth)
    inputs = inputs._replace(rule="triplets", params=params)
    total, count = row_losses(inputs, backend=backend).unbind(dim=1)
    return over_terms(total, count, reduction, accumulate_dtype(inputs.x.dtype))


def harmonic_triplet(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    frozen: Tensor,  # [M, D]
    frozen_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    margin: float = 0.2,
    triplets: str = "semihard",
    distance: str = "sqeuclidean",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """`all_triplets` of rows as they are (`HarmonicTripletLoss`: normalize=True), of two models.

    Of a new model's rows among themselves and an old model's, which stay put.

    embeddings [N, D], labels [N] integers: the new model's, the anchors. frozen [M, D]: the old
    model's, further positives and negatives without a gradient; frozen_labels [M] (None: frozen
    are the same samples). A row is not its own positive, but its old version is. indices: as in
    `all_triplets`, p and n rows of [embeddings, frozen]; of these, too, `triplets` are taken.
    Other arguments, result, errors and cost as in `all_triplets`, with N + M columns.
    """
    check_plain(margin=margin)
    all_of = indices is None
    both = sides(
        embeddings,
        frozen,
        precision,
        names=("embeddings", "frozen"),
        prefixes=("", "frozen_"),
        labels=both_of(labels, frozen_labels) if all_of else NEITHER,
        labelled=all_of,
    )
    if not all_of:
        for name, told, rows in (
            ("labels", labels, both.x),
            ("frozen_labels", frozen_labels, both.y),
        ):
            if told is not None:
                check_integers(name, told, (rows.shape[0],), embeddings)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    validation.check_choice("triplets", triplets, TRIPLETS[:3])
    validation.check_choice("distance", distance, DISTANCES)
    check_at_least("margin", margin, 0)
    with no_autocast(embeddings.device):
        columns = torch.cat([both.x, both.y.detach()])
        if not all_of:
            listed = miner_pairs(indices, both.x.shape[0], columns.shape[0], both.x)
            both = both._replace(y=columns, listed=listed)
            inputs = scored_rows(both, distance, precision, normalize)
            found = listed_triplets(inputs, listed, margin, triplets, False, False, backend)
            return over_terms(*found, reduction, accumulate_dtype(both.x.dtype))
        numbers = both.numbers._replace(y_labels=torch.cat(both.labels))
        both = both._replace(y=columns, alone=True, numbers=numbers)
        inputs = scored_rows(both, distance, precision, normalize)
        return _over_triplets(inputs, margin, triplets, False, reduction, backend)


def triplet_margin(
    anchor: Tensor,  # [T, D]
    positive: Tensor,  # [T, D]
    negative: Tensor,  # [T, D]
    *,
    triplets: tuple[Tensor, Tensor, Tensor] | None = None,  # [T] each
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    smooth: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.triplet_margin_loss`, margin=1.0 (`TripletMarginLoss`: 0.05, "all").

    Of listed triplets: [d_ap - d_an + margin]+.

    Args:
        anchor, positive, negative: [T, D]; or with triplets any number of rows each.
        triplets: three integer tensors [T], the rows of anchor, positive and negative of each
            triplet: triplet_margin(x, x, x, triplets=mined).
        margin: > 0. p: of the norm. eps: added to each difference, as torch does.
        swap: d_pn in the place of d_an where it is smaller. smooth: log(1 + e^.), not the hinge.
        reduction: "mean" over the triplets (0 over none), "sum", "none" [T].

    Returns float32 (float64 for float64 inputs); differentiable to any order. Raises ValueError,
    TypeError, IndexError for bad arguments. Time and memory O(T D).
    """
    check_plain(margin=margin, p=p, eps=eps)
    parts = dict(anchor=anchor, positive=positive, negative=negative)
    for name, rows in parts.items():
        validation.check_matrix(name, rows, "[T, D]")
        if rows.shape[1] != anchor.shape[1]:
            raise ValueError(
                f"{name}: expected [T, {anchor.shape[1]}] as anchor has, got "
                f"{validation.describe(rows)}"
            )
        parts[name] = validation.beside("anchor", anchor, name, rows)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    for name, value in (("margin", margin), ("p", p)):
        number(name, value, anchor)
    check_at_least("eps", eps, 0)
    if triplets is None:
        for name, rows in parts.items():
            if rows.shape != anchor.shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(anchor.shape)} as anchor has, got "
                    f"{validation.describe(rows)}"
                )
    else:
        if not isinstance(triplets, tuple | list) or len(triplets) != 3:
            raise TypeError("triplets: expected (anchor, positive, negative) indices, three of [T]")
        for name, index in zip(parts, triplets, strict=True):
            size = triplets[0].shape[0] if isinstance(triplets[0], Tensor) else None
            check_integers(f"triplets, {name}", index, (size,), anchor)
            check_class_ids(f"triplets, {name}", index, parts[name].shape[0])
    with no_autocast(anchor.device):
        dtype = accumulate_dtype(anchor.dtype)
        a, near, far = (rows.to(dtype) for rows in parts.values())
        if triplets is not None:
            a, near, far = (
                rows.index_select(0, index.long())
                for rows, index in zip((a, near, far), triplets, strict=True)
            )
        d_near, d_far = (F.pairwise_distance(a, rows, p, eps) for rows in (near, far))
        if swap:
            d_far = torch.minimum(d_far, F.pairwise_distance(near, far, p, eps))
        bad = nan_where_infinite(a) + nan_where_infinite(near) + nan_where_infinite(far)
        violation = d_near - d_far + margin + bad
        loss = softplus(violation) if smooth else F.relu(violation)
        return reduced(loss, torch.ones_like(loss, dtype=torch.bool), reduction, dtype)


_alone = lambda f, t: f(t.x, t.labels)


_ref = lambda f, t: f(t.x, t.labels, t.y, t.y_labels)


_SEMIHARD = dict(triplets="semihard", margin=0.8)


examples(
    all_triplets,
    _alone,
    {
        "": dict(margin=0.3),
        "none": dict(margin=0.3, reduction="none"),
        "sum": dict(margin=0.3, reduction="sum"),
        "hard": dict(margin=0.3, triplets="hard"),
        "semihard": dict(distance="sqeuclidean", **_SEMIHARD),
        "semihard, none": dict(margin=0.3, triplets="semihard", reduction="none"),
        "smooth": dict(margin=0.3, smooth=True),
        "smooth, hard": dict(margin=0.3, smooth=True, triplets="hard"),
        "smooth, easy": dict(margin=0.3, smooth=True, triplets="easy"),
        "smooth, semihard": dict(smooth=True, **_SEMIHARD),
        "cosine": dict(margin=0.3, distance="cosine", normalize=True),
    },
)
examples(
    all_triplets,
    _ref,
    {
        "ref": dict(margin=0.3),
        "swap": dict(margin=0.3, swap=True),
    },
)
examples(
    all_triplets,
    lambda f, t: f(t.x, None, t.y, indices=listed_example(len(t.x), t.x.device, len(t.y))),
    {"listed": dict(margin=0.3), "listed, swap": dict(margin=0.3, swap=True)},
)
examples(harmonic_triplet, _ref, {"": dict(margin=0.4, distance="sqeuclidean")})
examples(
    harmonic_triplet,
    lambda f, t: f(
        *(t.x, None, t.y),
        indices=listed_example(len(t.x), t.x.device, len(t.x) + len(t.y)),
        triplets="all",
    ),
    {"listed": dict(margin=0.3)},
)
examples(
    triplet_margin,
    lambda f, t: f(
        t.x, t.x, t.y, triplets=(torch.arange(len(t.x), device=t.x.device),) * 3, swap=True
    ),
)

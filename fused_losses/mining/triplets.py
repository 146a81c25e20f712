"""Mining: the triplets and pairs that a loss is worth taking over, of a batch or against a memory.

d is a distance, or the negative of a similarity ("dot", "cosine"): smaller is nearer. Of one label:
a positive; of another: a negative. A row is never its own positive, and pairs with equal ids are
left out. Distances are computed a block of rows at a time; nothing is differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.examples import EXACT, examples
from fused_losses.base.numerics import no_autocast
from fused_losses.base.validation import check_number, check_range
from fused_losses.mining.batch import (
    MiningBatch,
    MiningBlock,
    blocks,
    checked_batch,
    extreme,
    ranked,
    within,
)
from fused_losses.mining.lists import (
    Keep,
    Lines,
    Triplets,
    every,
    gathered_triplets,
    lines,
    places,
    slices,
)
from fused_losses.pairwise.topk import best_columns
from fused_losses.primitives.row_rules.inputs import TRIPLETS

CHOICES = ("hardest", "easiest", "semihard", "all")
NEGATIVES = (*CHOICES, "random")
FALLBACKS = ("farthest",)
RANKS = ("all", "hardest", "easiest")


@plans.hands_out
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
    fallback: str | None = None,
    generator: torch.Generator | None = None,
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
            is taken the nearest one farther than it, "all", or "random": for each positive one
            drawn evenly from those that `triplets` and `margin` keep. Not both sides can be
            "semihard", nor one be beside "random".
        triplets, margin: which of those are kept, by g = d(a, n) - d(a, p): "all" with g <= margin
            (None: every one), "hard" with g <= 0, "semihard" with g > 0 (both g <= margin, too),
            "easy" with g > margin (None: 0).
        fallback: with negative="semihard" what stands in where no negative is farther than the
            positive: "farthest", the farthest negative (TensorFlow Addons, sentence-transformers);
            None: the positive has no triplet.
        generator: of the draws (None: torch's own, of the CPU).
        positive_range, negative_range: (low, high): pairs at a distance outside do not take part.
        metric: a distance, euclidean, sqeuclidean, cityblock, chebyshev, minkowski (with p),
            canberra or braycurtis; or a similarity, dot or cosine, where larger is nearer.
        normalize: divide the rows by their norms first.
        ids, ref_ids: integers; rows with equal ids are never paired.

    positive = negative = "hardest" is batch-hard mining. positive="all" with a margin: with
    negative="hardest" FaceNet's pairs, "semihard" its semi-hard negatives, "random" those of the
    facenet code after VGG-Face, "all" every triplet that violates the margin. Of equal distances
    the lowest index is taken. A pair at a NaN distance is never taken. Nothing is differentiated:
    the distances need no gradient.

    Returns `Triplets`. Raises ValueError, TypeError for arguments that do not fit.
    Time O(N M D), and O(N M log M) for "semihard", O(N P M) for all of both sides with P positives
    a row; memory beyond what is returned O((N + M) D) and a few blocks.
    Papers: Schroff et al., FaceNet, 2015; Hermans et al., 2017; Xuan et al., 2020 (easy positives).
    """
    validation.check_choice("positive", positive, CHOICES)
    validation.check_choice("negative", negative, NEGATIVES)
    validation.check_choice("triplets", triplets, TRIPLETS)
    if positive == negative == "semihard":
        raise ValueError(
            "negative: expected 'hardest', 'easiest' or 'all' with positive='semihard' (each would "
            "be chosen by the other), got 'semihard'"
        )
    if positive == "semihard" and negative == "random":
        raise ValueError(
            "positive: expected another choice than 'semihard', which needs a negative first, "
            "beside negative='random'"
        )
    if fallback is not None:
        validation.check_choice("fallback", fallback, FALLBACKS)
        if negative != "semihard":
            raise ValueError(
                f"fallback: expected None without negative='semihard', got {fallback!r}"
            )
    check_range("positive_range", positive_range)
    check_range("negative_range", negative_range)
    if margin is not None:
        check_number("margin", margin)
    batch = checked_batch(
        *(embeddings, labels, ref_embeddings, ref_labels, ids, ref_ids),
        *(metric, p, normalize, precision, backend),
    )
    with torch.no_grad(), no_autocast(embeddings.device):
        keep = _rule(triplets, margin)
        ranked = {"hardest", "easiest"}
        if positive in ranked and negative in ranked and positive_range is negative_range is None:
            return _one_each(batch, positive, negative, keep)
        ranges = (positive_range, negative_range)
        sides = (positive, negative, ranges, keep, fallback is not None, generator)
        lines = (line for block in blocks(batch) for line in _block_triplets(block, *sides))
        return gathered_triplets(batch, lines)


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


def _one_each(batch: MiningBatch, positive: str, negative: str, keep: Keep | None) -> Triplets:
    """The hardest or easiest of either side: two streamed selections, no block of distances."""

    def best(match: str, farthest: bool) -> tuple[Tensor, Tensor]:
        asked = dict(
            x_labels=batch.x_labels,
            y_labels=batch.y_labels,
            x_ids=batch.x_ids,
            y_ids=batch.y_ids,
            k=1,
            largest=farthest == (batch.sign > 0),
            match=match,
            skip_self=batch.own,
            symmetric=batch.own and batch.mirrored,
        )
        values, index = best_columns(
            batch.x, batch.y, batch.kind, asked, p=batch.p, backend=batch.backend
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
    block: MiningBlock,
    positive: str,
    negative: str,
    ranges: tuple[tuple[float, float] | None, tuple[float, float] | None],
    keep: Keep | None,
    fallback: bool,
    generator: torch.Generator | None,
) -> Iterator[Lines]:
    z = block.z
    same = within(block, block.positive, ranges[0])
    different = within(block, block.negative, ranges[1])
    if positive == "all" and negative == "all":
        yield from every(block, same, different, keep)
        return
    far, near = positive == "hardest", negative == "easiest"
    if negative == "random":
        i, p = ranked(z, same, positive, 1, farthest=far).nonzero(as_tuple=True)
        yield from _drawn(block, different, i, p, keep, generator)
        return
    if negative == "semihard":
        i, p = ranked(z, same, positive, 1, farthest=far).nonzero(as_tuple=True)
        n, found = _next_farther(z, different, i, p, fallback)
    elif positive == "semihard":
        i, n = ranked(z, different, negative, 1, farthest=near).nonzero(as_tuple=True)
        p, found = _next_nearer(z, same, i, n)
    elif negative == "all":
        i, n = different.nonzero(as_tuple=True)
        index, some = extreme(z, same, farthest=far)
        p, found = index[i], some[i]
    else:
        i, p = ranked(z, same, positive, 1, farthest=far).nonzero(as_tuple=True)
        index, some = extreme(z, different, farthest=near)
        n, found = index[i], some[i]
    if keep is not None:
        found = found & keep(z[i, n] - z[i, p])
    i, p, n = i[found], p[found], n[found]
    if positive == "semihard" and negative == "all":
        # the list stands in the order of its negatives
        m = z.shape[1]
        order = ((i * m + p) * m + n).argsort()
        i, p, n = i[order], p[order], n[order]
    yield lines(block, i, p, n)


def _next_farther(
    z: Tensor, mask: Tensor, i: Tensor, p: Tensor, fallback: bool
) -> tuple[Tensor, Tensor]:
    """The nearest column of the mask farther than p, of each pair (i, p); whether there is one.

    fallback: the farthest one, the first of equals, stands in where there is none.
    """
    values, order = torch.where(mask, z, torch.inf).sort(dim=1, stable=True)
    place = places(values, i, z[i, p], right=True)
    count = mask.sum(dim=1)[i]
    found = place < count
    n = order[i, place.clamp_max(z.shape[1] - 1)]
    if not fallback:
        return n, found
    index, _ = extreme(z, mask, farthest=True)
    return torch.where(found, n, index[i]), count > 0


def _drawn(
    block: MiningBlock,
    different: Tensor,
    i: Tensor,
    p: Tensor,
    keep: Keep | None,
    generator: torch.Generator | None,
) -> Iterator[Lines]:
    """For each pair (i, p) one of the negatives that are kept."""
    on = "cpu" if generator is None else generator.device
    draws = torch.rand(len(i), dtype=torch.float64, generator=generator, device=on).to(i.device)
    for run in slices(block, len(i)):
        rows, near = i[run], block.z[i[run], p[run]]
        kept = different[rows]
        if keep is not None:
            kept = kept & keep(block.z[rows] - near[:, None])
        ends = kept.cumsum(dim=1)
        count = ends[:, -1]
        rank = torch.minimum((draws[run] * count).long(), count - 1) + 1
        n = torch.searchsorted(ends, rank[:, None])[:, 0]
        found = count > 0
        yield lines(block, rows[found], p[run][found], n[found])


def _next_nearer(z: Tensor, mask: Tensor, i: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """The farthest column of the mask nearer than n, of each pair (i, n); whether there is one."""
    values, order = torch.where(mask, z, torch.inf).sort(dim=1, stable=True)
    place = places(values, i, z[i, n]) - 1
    found = place >= 0
    # of equal ones the first
    first = places(values, i, values[i, place.clamp_min(0)])
    return order[i, first], found


examples(
    mine_triplets,
    lambda f, t: f(t.x, t.labels),
    {"": {}, "semihard": dict(positive="all", negative="semihard")},
    bound=EXACT,
    precisions=("fp32",),
    value=lambda mined: torch.stack(mined[:3]),
)

"""`mine_pairs`: the pairs that a strategy keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.examples import EXACT, UNJUDGED, examples
from fused_losses.base.numerics import no_autocast, row_dtype
from fused_losses.base.validation import check_number, check_range
from fused_losses.mining.batch import (
    MiningBatch,
    MiningBlock,
    blocks,
    checked_batch,
    matrix,
    ranked,
    widened,
    within,
)
from fused_losses.mining.lists import (
    Lines,
    Pairs,
    as_pairs,
    gathered_pairs,
    gathered_triplets,
    lines,
    places,
    slices,
)
from fused_losses.mining.triplets import RANKS

STRATEGIES = (
    "multi_similarity",
    "pair_margin",
    "ranked",
    "distance_weighted",
    "angular",
    "all",
)


@plans.hands_out
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
    check_range("positive_range", positive_range)
    check_range("negative_range", negative_range)
    numbers = dict(
        epsilon=epsilon,
        positive_margin=positive_margin,
        negative_margin=negative_margin,
        cutoff=cutoff,
        nonzero_loss_cutoff=nonzero_loss_cutoff,
        angle=angle,
    )
    for name, value in numbers.items():
        check_number(name, value)
    if not 0 < cutoff <= 2:
        raise ValueError(f"cutoff: expected a distance in (0, 2], got {cutoff}")
    if not 0 < angle < 90:
        raise ValueError(f"angle: expected degrees in (0, 90), got {angle}")
    validation.check_count("k", k)
    if strategy in ("distance_weighted", "angular") and metric not in (None, "euclidean"):
        raise ValueError(
            f"metric: expected None or 'euclidean' with strategy={strategy!r}, got {metric!r}"
        )
    if metric is None:
        metric = "cosine" if strategy == "multi_similarity" else "euclidean"
    batch = checked_batch(
        *(embeddings, labels, ref_embeddings, ref_labels, ids, ref_ids),
        *(metric, p, normalize or strategy == "distance_weighted", precision, backend),
    )
    with torch.no_grad(), no_autocast(embeddings.device):
        if strategy == "distance_weighted":
            shape = (float(cutoff), float(nonzero_loss_cutoff))
            drawn = (_drawn(batch, block, *shape, generator) for block in blocks(batch))
            return as_pairs(gathered_triplets(batch, drawn))
        if strategy == "angular":
            batch = widened(batch)
            limit = 2 * math.tan(math.radians(angle))
            wide = (line for b in blocks(batch) for line in _wide_angles(batch, b, limit))
            return as_pairs(gathered_triplets(batch, wide))

        def choose(block: MiningBlock) -> tuple[Tensor, Tensor]:
            z, same, different = block.z, block.positive, block.negative
            if strategy == "multi_similarity":
                nearest = torch.where(different, z, torch.inf).amin(dim=1, keepdim=True)
                farthest = torch.where(same, z, -torch.inf).amax(dim=1, keepdim=True)
                return same & (z + epsilon > nearest), different & (z - epsilon < farthest)
            if strategy == "pair_margin":
                near, far = batch.sign * negative_margin, batch.sign * positive_margin
                return same & (z > far), different & (z < near)
            if strategy == "ranked":
                same = within(block, same, positive_range)
                different = within(block, different, negative_range)
                return (
                    ranked(z, same, positive, k, farthest=positive == "hardest"),
                    ranked(z, different, negative, k, farthest=negative == "easiest"),
                )
            return same, different

        return gathered_pairs(batch, choose)


def _drawn(
    batch: MiningBatch,
    block: MiningBlock,
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
    n = places(summed, i, sought, right=True)
    found = some[i]
    return lines(block, i[found], p[found], n[found])


def _wide_angles(batch: MiningBatch, block: MiningBlock, limit: float) -> Iterator[Lines]:
    """Triplets with d(a, p) > limit * d(n, (a + p) / 2)."""
    i, p = block.positive.nonzero(as_tuple=True)
    for run in slices(block, len(i)):
        rows, columns = i[run], p[run]
        centre = (batch.x[rows + block.start] + batch.y[columns]) / 2
        wide = block.distance[rows, columns, None] > limit * matrix(batch, centre)
        pair, n = (wide & block.negative[rows]).nonzero(as_tuple=True)
        yield lines(block, rows[pair], columns[pair], n)


_call, _joined = lambda f, t: f(t.x, t.labels), lambda mined: torch.cat(mined[:4])
examples(
    mine_pairs, _call, {"": dict(epsilon=-0.5)}, bound=EXACT, precisions=("fp32",), value=_joined
)
_DRAWN = dict(strategy="distance_weighted")  # by the default generator
examples(mine_pairs, _call, {"drawn": _DRAWN}, bound=UNJUDGED, value=_joined)

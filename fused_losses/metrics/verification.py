"""Verification: do two rows show the same thing? Rates over pairs, accepted above a threshold.

far (false accept rate): the share of impostor pairs that are accepted; tar: of genuine ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.integers import dense
from fused_losses.base.numerics import accumulate_dtype, no_autocast
from fused_losses.base.unit_norm import wide_unit
from fused_losses.base.validation import check_integers, check_rows
from fused_losses.mining.batch import LARGEST_IS_NEAREST, SMALLEST_IS_NEAREST
from fused_losses.pairwise.distance import check_exponent
from fused_losses.primitives.distances.op import distance_matrix

BLOCK_BYTES = 2 << 20  # of scores in a block; about ten such are alive
DIGIT = 16  # bits of a score that a pass settles


class Roc(NamedTuple):
    """Points of the curve, from nothing accepted (0, 0) to everything (1, 1), float64 [T]."""

    far: Tensor
    tar: Tensor
    threshold: Tensor  # a pair is accepted where its score is > threshold


class EqualErrorRate(NamedTuple):
    """Where as large a share of impostors is accepted as of genuine pairs is refused."""

    rate: float
    threshold: float


class VerificationAccuracy(NamedTuple):
    """Mean and standard deviation (divisor: the folds) over folds, and each fold's numbers."""

    mean: float
    std: float
    accuracy: Tensor  # [F] float64
    threshold: Tensor  # [F] float64, learnt on the other folds


class AllPairs(NamedTuple):
    """TAR at a FAR over all pairs of a set."""

    tar: float
    threshold: float  # accepted: a similarity above it, a distance below it
    genuine: int  # pairs of one label
    impostors: int


# ---- given scores -------------------------------------------------------------------------------


def _check_scores(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(scores, Tensor) or scores.dtype not in validation.FLOATS:
        got = validation.describe(scores) if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: expected a floating point tensor [n], got {got}")
    if scores.dim() != 1:
        raise ValueError(f"scores: expected one dimension [n], got {validation.describe(scores)}")
    if not isinstance(same, Tensor) or same.dtype != torch.bool:
        got = validation.describe(same) if isinstance(same, Tensor) else type(same).__name__
        raise TypeError(f"same: expected a bool tensor [n], got {got}")
    if same.shape != scores.shape:
        raise ValueError(
            f"same: expected shape {tuple(scores.shape)} as scores, got {validation.describe(same)}"
        )
    validation.check_device("scores", scores, "same", same)
    # -0.0 and 0.0 are one score
    return scores.detach().double() + 0.0, same


def check_far(far: object) -> float:
    if isinstance(far, bool) or not isinstance(far, Real):
        raise TypeError(f"far: expected a rate in [0, 1], got {type(far).__name__}")

    rate = float(far)
    if not 0 <= rate <= 1:
        raise ValueError(f"far: expected a rate in [0, 1], got {far}")
    return rate


def _allowed(far: float, impostors: int) -> int:
    """How many impostors a rate lets through."""
    count = int(far * impostors)
    # the most whose share is at most the rate, as `roc` divides: 0.29 * 100 is 28.999...
    while count < impostors and (count + 1) / impostors <= far:
        count += 1
    while count and count / impostors > far:
        count -= 1
    return count


def roc(scores: Tensor, same: Tensor) -> Roc:
    """The ROC curve of pairs: scores [n] floats, same [n] bool (genuine or impostor).

    Higher scores are more alike (negate distances). Equal scores are accepted together: one point
    for each distinct score, and the one that accepts all. Without a genuine (impostor) pair its
    rates are NaN, and all are where a score is NaN. Raises ValueError, TypeError for tensors that
    do not fit. Time O(n log n), memory O(n).
    """
    scores, same = _check_scores(scores, same)
    values, place = scores.unique(return_inverse=True)  # ascending
    count = torch.zeros(2, len(values), dtype=torch.int64, device=scores.device)
    for kind in (0, 1):
        count[kind] = place[same == bool(kind)].bincount(minlength=len(values))
    above = count.flip(1).cumsum(1)
    above = torch.cat([above.new_zeros(2, 1), above], dim=1).double()
    rates = above / above[:, -1:]
    if bool(scores.isnan().any()):
        rates = rates * torch.nan
    lowest = torch.full((1,), -torch.inf, dtype=scores.dtype, device=scores.device)
    return Roc(rates[0], rates[1], torch.cat([values.flip(0), lowest]))


def threshold_at_far(scores: Tensor, same: Tensor, far: float) -> float:
    """The lowest threshold above which lie at most a share `far` of the impostors' scores.

    Arguments and errors as in `roc`; far in [0, 1]. -inf where every impostor may pass.
    """
    scores, same = _check_scores(scores, same)
    far = check_far(far)
    if bool(scores.isnan().any()):
        return float("nan")
    impostors = scores[~same]
    allowed = _allowed(far, len(impostors))
    if allowed >= len(impostors):
        return float("-inf")
    return float(impostors.topk(allowed + 1).values[-1])


@overload
def tar_at_far(scores: Tensor, same: Tensor, far: float) -> float: ...
@overload
def tar_at_far(scores: Tensor, same: Tensor, far: Sequence[float]) -> dict[float, float]: ...
def tar_at_far(scores: Tensor, same: Tensor, far: Any) -> float | dict[float, float]:
    """The share of genuine pairs above `threshold_at_far`; for several rates a dict of them.

    NaN without a genuine pair or with a NaN score. Arguments and errors as in `roc`.
    """
    if isinstance(far, list | tuple):
        return {rate: tar_at_far(scores, same, rate) for rate in far}
    threshold = threshold_at_far(scores, same, far)
    genuine = scores.detach().double()[same]
    if threshold != threshold or not len(genuine):
        return float("nan")
    return float((genuine > threshold).double().mean())


def eer(scores: Tensor, same: Tensor) -> EqualErrorRate:
    """The equal error rate, between two points of the ROC on the straight line that joins them.

    The threshold is that of the nearer point (the lower rate of accepting, of equals). NaN without
    a genuine or an impostor pair, or with a NaN score. Arguments and errors as in `roc`.
    """
    curve = roc(scores, same)
    gap = curve.far - (1 - curve.tar)  # rises from -1 to 1
    if bool(gap.isnan().any()):
        return EqualErrorRate(float("nan"), float("nan"))
    right = int((gap >= 0).int().argmax())
    left = right - 1
    share = float(-gap[left] / (gap[right] - gap[left]))
    rate = float(curve.far[left] + share * (curve.far[right] - curve.far[left]))
    return EqualErrorRate(rate, float(curve.threshold[left if share <= 0.5 else right]))


def auc(scores: Tensor, same: Tensor) -> float:
    """The area under the ROC: P(genuine > impostor) + P(genuine = impostor) / 2.

    NaN without a genuine or an impostor pair, or with a NaN score. Arguments, errors as in `roc`.
    """
    curve = roc(scores, same)
    # a lone point spans no area
    area = torch.trapezoid(curve.tar, curve.far)
    return float("nan") if bool(curve.far[-1].isnan()) else float(area)


def best_threshold(scores: Tensor, same: Tensor) -> float:
    """The threshold with the highest accuracy; midway between two scores, the lowest of equals.

    0 without scores.
    """
    if not len(scores):
        return 0.0
    values, place = scores.unique(return_inverse=True)
    signs = torch.where(same, -1, 1)
    # right answers: all genuine at the lowest threshold, then each score passed changes them
    gained = torch.zeros(len(values), dtype=torch.int64, device=scores.device)
    gained = gained.index_add(0, place, signs)
    right = torch.cat([gained.new_zeros(1), gained.cumsum(0)])
    # halves first: the sum of two large scores is not finite
    middle = values[1:] / 2 + values[:-1] / 2
    return float(torch.cat([values[:1] - 1, middle, values[-1:] + 1])[right.argmax()])


def verification_accuracy(
    scores: Tensor,  # [n]
    same: Tensor,  # [n] bool
    folds: int | Tensor = 10,
) -> VerificationAccuracy:
    """Accuracy of same or different as LFW takes it: each fold at the best threshold of the others.

    folds: how many runs of consecutive pairs, as equal as can be (the first ones longer); or the
    fold of each pair, integers [n]. A pair is accepted above the threshold. NaN with a NaN score.
    Raises ValueError, TypeError for arguments that do not fit, and where there are fewer than two
    folds or an empty one. Time O(F n log n), memory O(n). Huang et al., 2007.
    """
    scores, same = _check_scores(scores, same)
    n = len(scores)
    if isinstance(folds, Tensor):
        check_integers("folds", folds, (n,), scores)
        names, fold = folds.unique(return_inverse=True)
        count = len(names)
    elif isinstance(folds, bool) or not isinstance(folds, Integral):
        raise TypeError(f"folds: expected an integer or a tensor, got {type(folds).__name__}")
    else:
        count = folds
        sizes = [n // max(count, 1) + (f < n % max(count, 1)) for f in range(count)]
        fold = torch.arange(count, device=scores.device).repeat_interleave(
            torch.tensor(sizes, dtype=torch.int64, device=scores.device)
        )
    if count < 2 or n < count:
        raise ValueError(
            f"folds: expected at least two folds, none of them empty, got {count} for {n} pairs"
        )
    accuracy = torch.full((count,), torch.nan, dtype=torch.float64)
    threshold = accuracy.clone()
    if not bool(scores.isnan().any()):
        for f in range(count):
            mine = fold == f
            threshold[f] = best_threshold(scores[~mine], same[~mine])
            right = (scores[mine] > threshold[f].to(scores.device)) == same[mine]
            accuracy[f] = right.double().mean()
    mean, std = float(accuracy.mean()), float(accuracy.std(correction=0))
    return VerificationAccuracy(mean, std, accuracy, threshold)


# ---- all pairs of a set -------------------------------------------------------------------------


class AllPairsOptions(TypedDict, total=False):
    """Keywords of `all_pairs_tar_at_far`, whose own signature has their defaults."""

    metric: str
    p: float
    precision: str
    backend: str | None


@overload
def all_pairs_tar_at_far(
    embeddings: Tensor, labels: Tensor, far: float, **options: Unpack[AllPairsOptions]
) -> AllPairs: ...
@overload
def all_pairs_tar_at_far(
    embeddings: Tensor, labels: Tensor, far: Sequence[float], **options: Unpack[AllPairsOptions]
) -> dict[float, AllPairs]: ...
def all_pairs_tar_at_far(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    far: float | Sequence[float],
    *,
    metric: str = "cosine",
    p: float = 2.0,
    precision: str = "fp32",
    backend: str | None = None,
) -> AllPairs | dict[float, AllPairs]:
    """TAR at a FAR over all N (N - 1) / 2 pairs of a labelled set, exact, without listing them.

    far: a rate in [0, 1] or several (a dict of them). metric, p as in `mine_triplets`. The
    threshold is the lowest above which lie at most that share of the impostors (of a distance: the
    highest below which); equal scores pass together. tar is NaN without a genuine pair; tar and
    threshold are where a score is.

    The impostors' order statistic is settled 16 bits of the score a pass, by counting: two passes
    over the pairs for float32 scores, four for float64. Raises ValueError, TypeError for arguments
    that do not fit. Time O(N^2 D) a pass (half of it saved: the upper triangle); memory O(N D) and
    a few blocks.
    """
    check_rows("embeddings", embeddings, precision)
    check_integers("labels", labels, (embeddings.shape[0],), embeddings)
    validation.check_choice("metric", metric, (*LARGEST_IS_NEAREST, *SMALLEST_IS_NEAREST))
    check_exponent(metric, p)
    several = isinstance(far, list | tuple)
    rates = [check_far(rate) for rate in (far if several else [far])]
    with torch.no_grad(), no_autocast(embeddings.device):
        x = embeddings.detach()
        if metric == "cosine":
            x = wide_unit(x)
        kind = "dot" if metric == "cosine" else metric
        sign = 1 if metric in LARGEST_IS_NEAREST else -1
        numbers = dense(labels)

        def blocks() -> Iterator[tuple[Tensor, Tensor]]:
            n, size = len(x), accumulate_dtype(x.dtype).itemsize
            step = max(1, BLOCK_BYTES // (size * max(1, n)))
            for i in range(0, n, step):
                rows = slice(i, min(i + step, n))
                options: dict[str, Any] = dict(kind=kind, p=p, precision=precision, backend=backend)
                scores = sign * distance_matrix(x[rows], x[i:], **options) + 0.0
                above = torch.ones_like(scores, dtype=torch.bool).triu(1)
                same = numbers[rows, None] == numbers[i:]
                yield scores[above], same[above]

        found = _settled(blocks, rates, sign)
    return dict(zip(far, found, strict=True)) if several else found[0]


class _OrderStatistic:
    """Which score is the impostors' highest but `rank`, digit by digit."""

    def __init__(self, rank: int) -> None:
        self.rank = rank  # among those that share the digits found so far
        self.prefix = 0
        self.genuine_above = 0

    def narrow(self, histogram: Tensor, first: bool) -> None:
        """Takes the next digit from the counts of the scores with this prefix, [2, digits]."""
        impostors, genuine = histogram.flip(1).cumsum(1)
        at = int(torch.searchsorted(impostors, self.rank, right=True))
        digit = (1 << DIGIT) - 1 - at
        if at:
            self.rank -= int(impostors[at - 1])
            self.genuine_above += int(genuine[at - 1])
        # the first digit has the sign
        self.prefix = digit - (1 << (DIGIT - 1)) if first else (self.prefix << DIGIT) | digit


def _ordered(scores: Tensor) -> Tensor:
    """Integers int64 in the order of the floats."""
    integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
    raw = scores.view(integer)
    # a negative float's bits rise with its size
    return torch.where(raw < 0, raw ^ torch.iinfo(integer).max, raw).long()


def _unordered(key: int, dtype: torch.dtype) -> float:
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    raw = key if key >= 0 else key ^ torch.iinfo(integer).max
    return float(torch.tensor([raw], dtype=integer).view(dtype))


def _settled(
    blocks: Callable[[], Iterator[tuple[Tensor, Tensor]]], rates: list[float], sign: int
) -> list[AllPairs]:
    """blocks(): scores [c] and whether their pairs are genuine [c], the same in every pass."""
    size = 1 << DIGIT
    dtype, total, nan = torch.float32, torch.zeros(2, size, dtype=torch.int64), False
    for scores, same in blocks():
        dtype = scores.dtype
        nan = nan or bool(scores.isnan().any())
        digit = (_ordered(scores) >> (_bits(dtype) - DIGIT)) + size // 2
        total += _counted(digit, same)
    impostors, genuine = total.sum(dim=1).tolist()
    if nan:
        lost = float("nan")
        return [AllPairs(lost, lost, genuine, impostors) for _ in rates]
    ranks = [_allowed(rate, impostors) for rate in rates]
    searches = [_OrderStatistic(rank) for rank in ranks if rank < impostors]
    for search in searches:
        search.narrow(total, True)
    for shift in range(_bits(dtype) - 2 * DIGIT, -1, -DIGIT):
        counts = {s.prefix: torch.zeros(2, size, dtype=torch.int64) for s in searches}
        for scores, same in blocks() if counts else ():
            key = _ordered(scores)
            before, digit = key >> (shift + DIGIT), (key >> shift) & (size - 1)
            for prefix, count in counts.items():
                here = (before == prefix).nonzero()[:, 0]
                if len(here):
                    count += _counted(digit[here], same[here])
        for search in searches:
            search.narrow(counts[search.prefix], False)
    out, left = [], iter(searches)
    for rank in ranks:
        above, threshold = genuine, -torch.inf
        if rank < impostors:
            search = next(left)
            above, threshold = search.genuine_above, _unordered(search.prefix, dtype)
        tar = above / genuine if genuine else float("nan")
        out.append(AllPairs(tar, sign * threshold + 0.0, genuine, impostors))
    return out


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _counted(digit: Tensor, same: Tensor) -> Tensor:
    """How many impostors and genuine pairs have each digit, [2, digits], on the host."""
    size = 1 << DIGIT
    return (digit + size * same).bincount(minlength=2 * size).reshape(2, size).cpu()

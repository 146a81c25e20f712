"""Options of what chooses at other values than their defaults: ids, ranges, exponents, margins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from choice_draws import (
    CHOICES,
    Batch,
    Choice,
    Decide,
    always,
    angles,
    chosen_pairs,
    pair_indices,
    wide,
)
from identification_draws import CHOICES as IDENTIFIED
from metric_oracles import by_loops, rankings
from mining_formulas import allowed, lines, pairs_by_loops, triplets_by_loops
from search_draws import CHOICES as SEARCHES
from torch import Tensor

from fused_losses import functional, metrics, miners
from fused_losses.mining.pairs import mine_pairs
from fused_losses.mining.triplets import mine_triplets

NEAR, FAR = (0.2, 1.5), (0.3, 2.0)


def ids(given: Batch) -> dict[str, Tensor]:
    """Two rows an id, the same in both sets."""
    own = torch.arange(len(given.x)) // 2
    return {"ids": own} | ({} if given.y is None else {"ref_ids": torch.arange(len(given.y)) // 2})


def sides(given: Batch) -> tuple[list[list[int]], list[list[int]]]:
    of = ids(given)
    own, columns = of["ids"], of.get("ref_ids", of["ids"])
    return allowed(given.labels, given.columns[1], given.y is None, own, columns)


def cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).abs().pow(3).sum(2).pow(1 / 3)


CUBIC: dict[str, Any] = dict(metric="minkowski", p=3.0)


# ---- mining -------------------------------------------------------------------------------------


def in_ranges(keep: Callable[[float], bool] = always, **options: Any) -> Decide:
    def decide(d: Tensor, given: Batch) -> list:
        return triplets_by_loops(d, 1, *given.sides(), keep=keep, ranges=(NEAR, FAR), **options)

    return decide


def by_id(d: Tensor, given: Batch) -> list:
    return triplets_by_loops(d, 1, *sides(given))


def easiest(z: list[float], ps: list[int], ns: list[int]) -> tuple:
    """The two nearest positives and the two farthest negatives, within their ranges."""
    ps, ns = (
        [p for p in ps if NEAR[0] <= z[p] <= NEAR[1]],
        [n for n in ns if FAR[0] <= z[n] <= FAR[1]],
    )
    return sorted(ps, key=lambda j: (z[j], j))[:2], sorted(ns, key=lambda j: (-z[j], j))[:2]


def wider(z: list[float], ps: list[int], ns: list[int]) -> tuple:
    if not ps or not ns:
        return [], []
    nearest, farthest = min(z[n] for n in ns), max(z[p] for p in ps)
    return [p for p in ps if z[p] + 0.3 > nearest], [n for n in ns if z[n] - 0.3 < farthest]


def margins(z: list[float], ps: list[int], ns: list[int]) -> tuple:
    return [p for p in ps if z[p] > 0.5], [n for n in ns if z[n] < 0.9]


WITH_FALLBACK: dict[str, Any] = dict(positive="all", negative="semihard")


def with_fallback(d: Tensor, given: Batch) -> list:
    return triplets_by_loops(d, 1, *given.sides(), **WITH_FALLBACK, fallback=True)


def everything(z: list[float], ps: list[int], ns: list[int]) -> tuple:
    return ps, ns


def mining(told: str, metric: str, decide: Decide, /, **options: Any) -> Choice:
    def call(given: Batch, more: dict[str, Any]) -> list:
        of = ids(given) if told == "ids" else {}
        return lines(mine_triplets(*given.given, **options, **of, **more))

    values = cubic if metric == "minkowski" else None
    name = f"mine_triplets_{told}"
    return Choice(name, functional.mine_triplets, metric, call, decide, values=values)


def pairing(told: str, metric: str, decide: Decide, /, **options: Any) -> Choice:
    def call(given: Batch, more: dict[str, Any]) -> tuple:
        of = ids(given) if told == "ids" else {}
        return pair_indices(mine_pairs(*given.given, **options, **of, **more))

    values = cubic if metric == "minkowski" else None
    return Choice(f"mine_pairs_{told}", functional.mine_pairs, metric, call, decide, values=values)


def mined(
    kind: type,
    metric: str,
    decide: Decide,
    told: Callable,
    /,
    normalize: bool = True,
    values: Callable[[Tensor, Tensor], Tensor] | None = None,
    **options: Any,
) -> Choice:
    def call(given: Batch, more: dict[str, Any]) -> Any:
        return told(kind(normalize=normalize, **options, **more)(*given.given))

    name = f"{kind.__name__}_options"
    return Choice(name, kind, metric, call, decide, normalize=normalize, values=values)


def as_pairs(found: Any) -> tuple:
    return pair_indices((*found,))


def hard_easy(d: Tensor, given: Batch) -> tuple:
    found = in_ranges(positive="hardest", negative="easiest")(d, given)
    return [(a, p) for a, p, _ in found], [(a, n) for a, _, n in found]


def violating(d: Tensor, given: Batch) -> list:
    rules = dict(positive="all", negative="all")
    return triplets_by_loops(d, 1, *given.sides(), keep=lambda g: g <= 0, **rules)


# ---- metrics ------------------------------------------------------------------------------------


def retrieval(name: str, k: int | None) -> Choice:
    function, options = getattr(metrics, name), {} if k is None else {"k": k}

    def told(value: float, queries: int) -> tuple:
        return ("nan" if math.isnan(value) else round(value, 9), queries)

    def decide(d: Tensor, given: Batch) -> tuple:
        of = ids(given)
        order = rankings(d, given.y is None, of["ids"], of.get("ref_ids", of["ids"]))
        return told(*by_loops(name, order, given.labels, given.columns[1], k))

    def call(given: Batch, more: dict[str, Any]) -> tuple:
        found = function(*given.given, metric="euclidean", **options, **ids(given), **more)
        return told(found.value, found.queries)

    return Choice(f"{name}_ids", function, "euclidean", call, decide)


def in_galleries(name: str, k: int | None) -> Choice:
    """A query meets three of four rows; each query's own value."""
    function, options = getattr(metrics, name), {} if k is None else {"k": k}

    def told(values: list[float]) -> list:
        return ["nan" if math.isnan(value) else round(value, 9) for value in values]

    def decide(d: Tensor, given: Batch) -> list:
        found = []
        for i, columns in enumerate(rankings(d, given.y is None)):
            own = [[j for j in columns if (i + j) % 4]]
            found.append(by_loops(name, own, given.labels[i, None], given.columns[1], k)[0])
        return told(found)

    def call(given: Batch, more: dict[str, Any]) -> list:
        m = len(given.columns[0])
        galleries = [[j for j in range(m) if (i + j) % 4] for i in range(len(given.x))]
        more = dict(galleries=galleries, per_query=True, metric="euclidean") | options | more
        return told(function(*given.given, **more).per_query.tolist())

    return Choice(f"{name}_galleries", function, "euclidean", call, decide)


def weighed(d: Tensor, given: Batch) -> list:
    """The class of the largest sum of e^(-2 d) among the three nearest; none where two are near."""
    of, found = ids(given), []
    for i, columns in enumerate(
        rankings(d, given.y is None, of["ids"], of.get("ref_ids", of["ids"]))
    ):
        sums: dict[int, float] = {}
        near = [float(d[i, j]) for j in columns[:3]]
        for j, apart in zip(columns[:3], near, strict=True):
            label = int(given.columns[1][j])
            sums[label] = sums.get(label, 0.0) + math.exp(-2 * (apart - near[0]))
        first, *rest = sorted(sums.items(), key=lambda one: -one[1]) or [(-1, 1.0)]
        # no answer equals this one: which of nearly equal sums is larger, rounding decides
        found.append(object() if rest and rest[0][1] > (1 - 1e-5) * first[1] else first[0])
    return found


def classify(given: Batch, more: dict[str, Any]) -> list[int]:
    y, ref_labels = given.columns
    of: dict[str, Any] = {"ref_ids": torch.arange(len(y)) // 2} | ids(given)
    of |= dict(k=3, weights="exp", temperature=0.5, metric="euclidean")
    rows = (given.x, given.x if given.y is None else y, ref_labels)
    return metrics.knn_classify(*rows, num_classes=40, **of, **more)[0].tolist()


SHARES = (0.0, 0.1, 0.5)


def rates(d: Tensor, given: Batch) -> list:
    """By walking the impostors' distances: the widest with no more of them below than the share."""
    n = len(given.x)
    every = [(i, j) for i in range(n) for j in range(i + 1, n)]
    same = [float(d[i, j]) for i, j in every if given.labels[i] == given.labels[j]]
    other = [float(d[i, j]) for i, j in every if given.labels[i] != given.labels[j]]
    found: list = [len(same), len(other)]
    for share in SHARES:
        tries = [math.inf, *other]
        top = max(t for t in tries if sum(v < t for v in other) <= share * len(other) + 1e-12)
        found.append(round(sum(v < top for v in same) / len(same), 9) if same else "nan")
    return found


def rated(given: Batch, more: dict[str, Any]) -> list:
    found = metrics.all_pairs_tar_at_far(given.x, given.labels, list(SHARES), **CUBIC, **more)
    first = found[SHARES[0]]
    shares = [found[share].tar for share in SHARES]
    told = ["nan" if math.isnan(share) else round(share, 9) for share in shares]
    return [first.genuine, first.impostors, *told]


DRAWN = [
    mining("ids", "euclidean", by_id),
    mining("fallback", "euclidean", with_fallback, **WITH_FALLBACK, fallback="farthest"),
    mining("ranges", "euclidean", in_ranges(), positive_range=NEAR, negative_range=FAR),
    mining(
        "minkowski",
        "minkowski",
        lambda d, given: triplets_by_loops(d, 1, *given.sides()),
        **CUBIC,
    ),
    pairing(
        "ids",
        "euclidean",
        lambda d, given: pairs_by_loops(d, 1, *sides(given), everything),
        strategy="all",
    ),
    pairing(
        "ranked_ranges",
        "minkowski",
        chosen_pairs("minkowski", easiest),
        strategy="ranked",
        positive="easiest",
        negative="easiest",
        k=2,
        positive_range=NEAR,
        negative_range=FAR,
        **CUBIC,
    ),
    pairing("epsilon", "cosine", chosen_pairs("cosine", wider), epsilon=0.3),
    pairing(
        "margins",
        "euclidean",
        chosen_pairs("euclidean", margins),
        strategy="pair_margin",
        positive_margin=0.5,
        negative_margin=0.9,
    ),
    mined(
        miners.BatchHardMiner,
        "minkowski",
        lambda d, given: triplets_by_loops(d, 1, *given.sides()),
        lines,
        normalize=False,
        values=cubic,
        **CUBIC,
    ),
    mined(
        miners.BatchEasyHardMiner,
        "euclidean",
        hard_easy,
        as_pairs,
        pos_strategy="hard",
        neg_strategy="easy",
        allowed_pos_range=NEAR,
        allowed_neg_range=FAR,
    ),
    mined(
        miners.TripletMarginMiner,
        "euclidean",
        violating,
        lines,
        margin=0.25,
        type_of_triplets="hard",
    ),
    mined(
        miners.MultiSimilarityMiner,
        "cosine",
        chosen_pairs("cosine", wider),
        as_pairs,
        epsilon=0.3,
    ),
    mined(
        miners.PairMarginMiner,
        "euclidean",
        chosen_pairs("euclidean", margins),
        as_pairs,
        pos_margin=0.5,
        neg_margin=0.9,
    ),
    mined(miners.AngularMiner, "angle", wide(40.0), lines, values=angles, angle=40.0),
    *(
        retrieval(name, k)
        for name, k in (
            ("recall_at_k", 3),
            ("precision_at_k", 3),
            ("map_at_k", 5),
            ("ndcg", 4),
            ("map_at_r", None),
            ("r_precision", None),
            ("mean_reciprocal_rank", 2),
        )
    ),
    *(
        in_galleries(name, k)
        for name, k in (
            ("recall_at_k", 3),
            ("precision_at_k", 3),
            ("map_at_k", 5),
            ("ndcg", 4),
            ("map_at_r", None),
            ("r_precision", None),
            ("mean_reciprocal_rank", None),
        )
    ),
    Choice("knn_classify_ids", metrics.knn_classify, "euclidean", classify, weighed),
    Choice(
        "all_pairs_tar_at_far",
        metrics.all_pairs_tar_at_far,
        "minkowski",
        rated,
        rates,
        values=lambda x, y: cubic(x, x),
    ),
]
EVERY = [*CHOICES, *DRAWN, *SEARCHES, *IDENTIFIED]
BY_NAME = {choice.name: choice for choice in EVERY}

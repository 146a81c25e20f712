"""What chooses: mining, miners and metrics on drawn rows, against loops over float64 values.

An answer is judged where it is the same under every movement of the values by what roundings do to
them (`base.disturbance`, times `SURE`); of small integers, whose arithmetic is exact, always: ties.
Roots of equal squares are equal: there it is enough that float32's roots decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from draws import Draw
from hard_data import KINDS, LABELS
from metric_oracles import by_loops, rankings
from mining_formulas import (
    allowed,
    lines,
    matrix,
    multi_similarity,
    pairs_by_loops,
    triplets_by_loops,
)
from torch import Tensor

from fused_losses import functional, metrics, miners
from fused_losses.base.disturbance import SURE, Disturbed
from fused_losses.mining.lists import Pairs
from fused_losses.mining.pairs import mine_pairs
from fused_losses.mining.triplets import mine_triplets

EXACT = ("dot", "sqeuclidean", "cityblock")
Decide = Callable[[Tensor, "Batch"], Any]


@dataclass(frozen=True)
class Batch:
    """Rows in the drawn dtype and the labels; a second set, or none."""

    x: Tensor
    labels: Tensor
    y: Tensor | None
    ref_labels: Tensor | None

    @property
    def given(self) -> tuple:
        both = (self.y, self.ref_labels)
        return (self.x, self.labels) if self.y is None else (self.x, self.labels, *both)

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        if self.y is None or self.ref_labels is None:
            return self.x, self.labels
        return self.y, self.ref_labels

    def sides(self) -> tuple[list[list[int]], list[list[int]]]:
        return allowed(self.labels, self.columns[1], self.y is None)


@dataclass(frozen=True)
class Choice:
    """A call and what it should answer, decided by loops on the values of `metric`."""

    name: str
    function: Any  # what of the package is called
    metric: str
    call: Callable[[Batch, dict[str, Any]], Any]
    decide: Decide
    normalize: bool = False
    values: Callable[[Tensor, Tensor], Tensor] | None = None  # instead of the metric


def batch(draw: Draw, both: bool) -> Batch:
    generator = torch.Generator().manual_seed(draw.seed)
    n, m, d = draw.shape
    kind = KINDS.get(draw.kind, KINDS["plain"])

    def rows(count: int) -> Tensor:
        made = torch.randn(count, d, generator=generator, dtype=torch.float64) / d**0.5
        return kind(made, generator).to(draw.dtype)

    def labels(count: int) -> Tensor:
        return LABELS[draw.labels](torch.randint(0, n // 3 + 1, (count,), generator=generator))

    if not both:
        return Batch(rows(n), labels(n), None, None)
    return Batch(rows(n), labels(n), rows(m), labels(m))


def values_of(choice: Choice, given: Batch) -> Tensor:
    x, y = given.x.double(), given.columns[0].double()
    if choice.normalize:
        x, y = (r / r.norm(dim=1, keepdim=True) for r in (x, y))
    return choice.values(x, y) if choice.values else matrix(x, y, choice.metric)


def answer(choice: Choice, draw: Draw, given: Batch) -> tuple[bool, Any]:
    """Whether roundings leave the answer alone, and the answer."""
    values = values_of(choice, given)
    if not bool(values.isfinite().all()):
        return False, None
    right = choice.decide(values, given)
    if draw.kind == "integers" and choice.metric in EXACT and not choice.normalize:
        return True, right
    if draw.kind == "integers" and choice.metric == "euclidean" and not choice.normalize:
        return choice.decide(values.float().double(), given) == right, right
    for seed in range(4):
        with Disturbed(draw.dtype, draw.shape[2], seed=seed):
            moved = values_of(choice, given)
        for sign in (SURE, -SURE):
            if choice.decide(values + sign * (moved - values), given) != right:
                return False, right
    return True, right


def pair_indices(found: Pairs) -> tuple:
    a, p, b, n = (t.tolist() for t in found[:4])
    return list(zip(a, p, strict=True)), list(zip(b, n, strict=True))


# ---- mining -------------------------------------------------------------------------------------


def sign_of(metric: str) -> int:
    return -1 if metric in ("dot", "cosine") else 1


def triplets(name: str, metric: str, keep: Callable[[float], bool], **options: Any) -> Choice:
    def decide(d: Tensor, given: Batch) -> list:
        own = {k: v for k, v in options.items() if k in ("positive", "negative")}
        return triplets_by_loops(d, sign_of(metric), *given.sides(), keep=keep, **own)

    def call(given: Batch, more: dict[str, Any]) -> list:
        return lines(mine_triplets(*given.given, metric=metric, **options, **more))

    return Choice(f"mine_triplets_{name}_{metric}", functional.mine_triplets, metric, call, decide)


def always(gap: float) -> bool:
    return True


RULES: dict[str, tuple[dict[str, Any], Callable[[float], bool]]] = {
    "hard": ({}, always),
    "easy": (dict(positive="easiest", negative="easiest"), always),
    "semihard": (dict(positive="easiest", negative="semihard"), always),
    "semihard_positive": (dict(positive="semihard", negative="hardest"), always),
    "facenet": (dict(positive="all", negative="semihard", margin=0.25), lambda g: g <= 0.25),
    "violating": (dict(positive="all", negative="all", margin=0.25), lambda g: g <= 0.25),
    "below": (dict(positive="all", negative="all", triplets="hard"), lambda g: g <= 0),
    "beyond": (
        dict(positive="all", negative="all", triplets="easy", margin=0.25),
        lambda g: g > 0.25,
    ),
}


def pair_margin(z: list[float], ps: list[int], ns: list[int]) -> tuple:
    return [p for p in ps if z[p] > 0.2], [n for n in ns if z[n] < 0.8]


def everything(z: list[float], ps: list[int], ns: list[int]) -> tuple:
    return ps, ns


def two_hardest(z: list[float], ps: list[int], ns: list[int]) -> tuple:
    return ps, sorted(ns, key=lambda j: (z[j], j))[:2]


PAIRS: dict[str, tuple[str, dict[str, Any], Callable]] = {
    "multi_similarity": ("cosine", {}, multi_similarity),
    "pair_margin": ("euclidean", {}, pair_margin),
    "ranked": ("cityblock", dict(k=2), two_hardest),
    "all": ("sqeuclidean", {}, everything),
}


def chosen_pairs(metric: str, choose: Callable) -> Decide:
    return lambda d, given: pairs_by_loops(d, sign_of(metric), *given.sides(), choose)


def pairs(strategy: str) -> Choice:
    metric, options, choose = PAIRS[strategy]

    def call(given: Batch, more: dict[str, Any]) -> tuple:
        return pair_indices(
            mine_pairs(*given.given, strategy=strategy, metric=metric, **options, **more)
        )

    name = f"mine_pairs_{strategy}"
    return Choice(name, functional.mine_pairs, metric, call, chosen_pairs(metric, choose))


def angles(x: Tensor, y: Tensor) -> Tensor:
    """arctan(d(a, p) / (2 d(n, c))) in degrees, c the middle of a and p. [N, M, M]"""
    middle = (x[:, None] + y) / 2
    apart = (x[:, None] - y).square().sum(2).sqrt()
    far = (middle[:, :, None] - y).square().sum(3).sqrt()
    return torch.atan2(apart[:, :, None].expand_as(far), 2 * far).rad2deg()


def wide(degrees: float) -> Decide:
    def decide(found: Tensor, given: Batch) -> list:
        same, different = given.sides()
        return [
            (i, p, n)
            for i in range(len(found))
            for p in same[i]
            for n in different[i]
            if float(found[i, p, n]) > degrees
        ]

    return decide


# ---- miners, with their own defaults ------------------------------------------------------------


def mined(kind: type, metric: str, decide: Decide, told: Callable, **options: Any) -> Choice:
    def call(given: Batch, more: dict[str, Any]) -> Any:
        return told(kind(**options, **more)(*given.given))

    return Choice(kind.__name__, kind, metric, call, decide, normalize=True)


def by_rule(name: str, metric: str = "euclidean") -> Decide:
    options, keep = RULES[name]
    return triplets(name, metric, keep, **options).decide


def easy_semihard(d: Tensor, given: Batch) -> tuple:
    found = by_rule("semihard")(d, given)
    return [(a, p) for a, p, _ in found], [(a, n) for a, _, n in found]


def as_memory(given: Batch) -> Batch:
    """Without ids the memory's rows are others, those of the batch among them."""
    return Batch(given.x, given.labels, *given.columns)


def remembered(given: Batch, more: dict[str, Any]) -> list:
    """The second set from a memory that a first batch has left."""
    y, ref_labels = given.columns
    memory = miners.CrossBatchMemory(len(y), y.shape[1], dtype=y.dtype)
    memory.enqueue(y + 1, ref_labels)
    memory.enqueue(y, ref_labels)
    miner = miners.BatchHardMiner(normalize=False, **more)
    return lines(memory.mine(miner, given.x, given.labels))


MINERS = [
    mined(miners.BatchHardMiner, "euclidean", by_rule("hard"), lines),
    mined(miners.BatchEasyHardMiner, "euclidean", easy_semihard, lambda f: pair_indices((*f,))),
    mined(miners.TripletMarginMiner, "euclidean", by_rule("violating"), lines, margin=0.25),
    mined(
        miners.MultiSimilarityMiner,
        "cosine",
        chosen_pairs("cosine", multi_similarity),
        lambda f: pair_indices((*f,)),
    ),
    mined(
        miners.PairMarginMiner,
        "euclidean",
        chosen_pairs("euclidean", pair_margin),
        lambda f: pair_indices((*f,)),
    ),
    mined(
        miners.HardNegativeMiner,
        "euclidean",
        chosen_pairs("euclidean", two_hardest),
        lambda f: pair_indices((*f,)),
        k=2,
    ),
    Choice(
        "AngularMiner",
        miners.AngularMiner,
        "angle",
        lambda given, more: lines(miners.AngularMiner(20.0, **more)(*given.given)),
        wide(20.0),
        values=angles,
    ),
]


# ---- metrics over rows --------------------------------------------------------------------------


def retrieval(name: str, metric: str, k: int | None) -> Choice:
    function, options = getattr(metrics, name), {} if k is None else {"k": k}

    def told(value: float, queries: int) -> tuple:
        return ("nan" if math.isnan(value) else round(value, 9), queries)

    def decide(d: Tensor, given: Batch) -> tuple:
        order = rankings(sign_of(metric) * d, given.y is None)
        return told(*by_loops(name, order, given.labels, given.columns[1], k))

    def call(given: Batch, more: dict[str, Any]) -> tuple:
        found = function(*given.given, metric=metric, **options, **more)
        return told(found.value, found.queries)

    return Choice(f"{name}_{metric}", function, metric, call, decide)


def classified(d: Tensor, given: Batch) -> list[int]:
    """The class of the most among the three nearest, the lowest of equals."""
    _, ref_labels = given.columns
    found = []
    for columns in rankings(d, given.y is None):
        votes = [int(ref_labels[j]) for j in columns[:3]]
        found.append(min(set(votes), key=lambda c: (-votes.count(c), c)) if votes else -1)
    return found


def classify(given: Batch, more: dict[str, Any]) -> list[int]:
    y, ref_labels = given.columns
    given_rows = (given.x, given.x if given.y is None else y, ref_labels)
    options: dict[str, Any] = dict(k=3, weights="uniform", metric="euclidean")
    return metrics.knn_classify(*given_rows, **options, **more)[0].tolist()


CHOICES = [
    *(
        triplets(name, metric, keep, **options)
        for name, (options, keep) in RULES.items()
        for metric in ("euclidean", "cosine", "cityblock")
    ),
    *(pairs(strategy) for strategy in PAIRS),
    Choice(
        "mine_pairs_angular",
        functional.mine_pairs,
        "angle",
        lambda given, more: [
            (a, p, n)
            for a, p, _, n in zip(
                *(
                    t.tolist()
                    for t in mine_pairs(*given.given, strategy="angular", angle=40.0, **more)[:4]
                ),
                strict=True,
            )
        ],
        wide(40.0),
        values=angles,
    ),
    *MINERS,
    Choice(
        "CrossBatchMemory",
        miners.CrossBatchMemory,
        "euclidean",
        remembered,
        lambda d, given: by_rule("hard")(d, as_memory(given)),
    ),
    *(
        retrieval(name, metric, k)
        for name, k in (
            ("recall_at_k", 3),
            ("precision_at_k", 3),
            ("map_at_k", 5),
            ("ndcg", 4),
            ("map_at_r", None),
            ("r_precision", None),
            ("mean_reciprocal_rank", None),
        )
        for metric in ("cosine", "euclidean", "dot")
    ),
    Choice("knn_classify", metrics.knn_classify, "euclidean", classify, classified),
]

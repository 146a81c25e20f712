"""What must not change a result: the order of rows, columns and classes, sides that change place,
a shift, a power of two, columns in several segments. Within what roundings may do to either side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from conftest import BACKENDS
from draws import CASES, Call, Draw, Verdict, chooses, inputs, unjudged
from pair_cases import Case, Inputs, in_dtype, outcome
from torch import Tensor

import fused_losses.functional as fl
from fused_losses.base.disturbance import Movement, distance, rounded_once

Change = Callable[[Inputs, torch.Generator], tuple[Inputs, Callable[[list[Tensor]], list[Tensor]]]]


class Invariant(NamedTuple):
    """Inputs are changed, and the results brought back: they are what they were."""

    change: Change
    call: Callable[..., Tensor] | None = None  # (inputs, backend=), of what was changed
    kind: str = ""  # the only data that this is about
    wide: bool = False  # rows leave float16's range


# which of equals is chosen goes by their order
TIES = ("constant", "duplicates", "sparse")


def judged(name: str, invariant: Invariant, draw: Draw) -> bool:
    draw = replace(draw, kind=invariant.kind or draw.kind)
    leaves_range = invariant.wide and draw.dtype == torch.float16
    return not (leaves_range or draw.kind in TIES or unjudged(CASES[name], draw))


def judge(name: str, invariant: Invariant, draw: Draw) -> Iterator[Verdict]:
    """Of each backend how far apart both calls' results are, halved, and the bound."""
    if not judged(name, invariant, draw):
        return
    case = CASES[name]
    draw = replace(draw, kind=invariant.kind or draw.kind)
    exact = inputs(case, draw)
    right = lambda: outcome(case, in_dtype(case, exact, torch.float64), case.formula)
    truth = right()
    moved = Movement(right, truth, draw.dtype, draw.shape[2])
    generator = torch.Generator().manual_seed(draw.seed)
    other, back = invariant.change(exact, generator)
    call = invariant.call or case.call
    for backend in BACKENDS:
        if not chooses(backend, draw) or (backend == "reference" and draw.dtype.itemsize == 2):
            continue
        t, u = (in_dtype(case, inputs, draw.dtype) for inputs in (exact, other))
        first = outcome(case, t, lambda t, b=backend: case.call(t, backend=b))
        second = back(outcome(case, u, lambda u, b=backend: call(u, backend=b)))
        dtypes = [
            torch.promote_types(draw.dtype, torch.float32) if truth[0].dim() == 0 else draw.dtype
        ]
        dtypes += [draw.dtype] * len(case.leaves)
        spares = [
            max(2 * rounded_once(w.to(dtype), float(w.norm())), 1e-37)
            for w, dtype in zip(truth, dtypes, strict=True)
        ]
        # each is within the bound of the truth
        errors = [distance(a, b) / 2 for a, b in zip(first, second, strict=True)]
        bounds = moved.bounds(errors, spares)
        parts = list(zip(("value", *case.leaves), errors, bounds, strict=True))
        yield Verdict(Call(backend), parts)


def _taken(t: Inputs, order: Tensor, *names: str) -> Inputs:
    return Inputs(**(vars(t) | {n: getattr(t, n)[order] for n in names if hasattr(t, n)}))


def _unordered(case: Case, order: Tensor, *names: str) -> Callable[[list[Tensor]], list[Tensor]]:
    """Gradients of permuted fields in their old places."""
    back = order.argsort()
    return lambda found: [
        found[0],
        *(g[back] if name in names else g for name, g in zip(case.leaves, found[1:], strict=True)),
    ]


def _reordered(name: str, *names: str) -> Invariant:
    """The same order for all of these fields, the first of which is there."""

    def change(t: Inputs, generator: torch.Generator) -> tuple:
        order = torch.randperm(len(getattr(t, names[0])), generator=generator)
        return _taken(t, order, *names), _unordered(CASES[name], order, *names)

    return Invariant(change)


def _reordered_classes(name: str) -> Invariant:
    def change(t: Inputs, generator: torch.Generator) -> tuple:
        order = torch.randperm(len(t.w), generator=generator)
        of_classes = ["w", "weight", "teacher_w", "teacher_bias"]
        of_classes += ["bias"] if hasattr(t, "bias") and t.bias.dim() == 1 else []
        u, place = _taken(t, order, *of_classes), order.argsort()
        u.targets = torch.where(t.targets < 0, t.targets, place[t.targets.clamp_min(0)])
        if hasattr(t, "taking"):
            u.taking = place[t.taking]
        return u, _unordered(CASES[name], order, *of_classes)

    return Invariant(change)


def _sides_changed(name: str) -> Invariant:
    def change(t: Inputs, _: torch.Generator) -> tuple:
        return Inputs(**(vars(t) | {"x": t.y, "y": t.x})), lambda f: [f[0], f[2], f[1]]

    return Invariant(change, lambda u, backend: CASES[name].call(u, backend=backend).T)


def _shifted(_: str) -> Invariant:
    """Small whole numbers by a whole number: no rounding in the rows."""

    def change(t: Inputs, _: torch.Generator) -> tuple:
        moved = {n: v + 32 for n, v in vars(t).items() if n in ("x", "y", "other")}
        return Inputs(**(vars(t) | moved)), lambda found: found

    return Invariant(change, kind="integers")


def _longer(_: str) -> Invariant:
    """Rows 2^40 times as long: the same value, gradients over 2^40."""
    times = 2.0**40

    def change(t: Inputs, _: torch.Generator) -> tuple:
        longer = {n: v * times for n, v in vars(t).items() if n in ("x", "y", "w")}
        return Inputs(**(vars(t) | longer)), lambda f: [f[0], *(g * times for g in f[1:])]

    return Invariant(change, wide=True)


def _banked(t: Inputs, backend: str) -> Tensor:
    """Keys beyond the rows' own may as well stand in two banks."""
    n = len(t.x)
    middle = n + (len(t.y) - n) // 2
    banks = [t.y[n:middle], t.y[middle:]]
    return fl.info_nce(t.x, t.y[:n], temperature=0.2, queue=banks, backend=backend)


def _halves(t: Inputs, backend: str) -> Tensor:
    """Two halves of columns, as two ranks hold them: their logsumexps merge."""
    given_rows = dict(similarity="rbf", scale=t.scale, cols=True, rows=False, backend=backend)
    middle = len(t.x) // 2
    parts = [fl.logsumexp_similarity(x, t.y, **given_rows) for x in (t.x[:middle], t.x[middle:])]
    return torch.logaddexp(*parts) if middle else parts[1]


def _attended_halves(t: Inputs, backend: str) -> Tensor:
    """Attention over either half of the columns, weighted by what its sums have of the whole's."""
    given = dict(similarity="euclidean", scale=t.scale, return_lse=True, backend=backend)
    middle = len(t.y) // 2
    sides = (slice(None, middle), slice(middle, None)) if middle else (slice(None),)
    parts = [fl.similarity_attention(t.x, t.y[s], t.v[s], **given) for s in sides]
    sums = torch.stack([lse for _, lse in parts])
    shares = (sums - sums.logsumexp(0)).exp()
    return sum(share[:, None] * out for share, (out, _) in zip(shares, parts, strict=True))


def _nearest_halves(t: Inputs, backend: str) -> Tensor:
    """The k best of the k best of two banks."""
    k, middle = min(5, len(t.y)), len(t.y) // 2
    banks = [bank for bank in (t.y[:middle], t.y[middle:]) if len(bank)]
    found = [fl.pairwise_topk(t.x, b, min(k, len(b)), backend=backend)[0] for b in banks]
    return torch.cat(found, 1).sort(dim=1, stable=True).values[:, :k]


def _mean_halves(t: Inputs, backend: str) -> Tensor:
    given = dict(bandwidth=t.width, reduction="none", backend=backend)
    middle = len(t.other) // 2
    halves = [half for half in (t.other[:middle], t.other[middle:]) if len(half)]
    means = [fl.kernel_mean(t.x, half, **given) * len(half) for half in halves]
    return sum(means) / len(t.other)


def _parted(call: Callable[..., Tensor]) -> Callable[[str], Invariant]:
    return lambda _: Invariant(lambda t, _: (t, lambda found: found), call)


def _scalar(case: Case) -> bool:
    return case.formula(in_dtype(case, case.make(5, 5, 3), torch.float64)).dim() == 0


# what a row has
OF_ROWS = ("x", "labels", "targets", "drawn", "teacher", "counts")
BY_PLACE = (
    *("nt_xent_views", "supervised_contrastive_anchors", "n_pairs"),
    # the rounds are of each class's first rows, second rows, ...
    *("centroid_triplet", "centroid_triplet_of_queries", "centroid_triplet_sum"),
    # the first half of the rows is listed; a miner's pairs are of places
    *("smooth_ap_listed", "proxy_anchor_mined"),
    # memberships are of places
    "coding_rate_membership",
)
MADE = {name: set(vars(case.make(5, 5, 3))) for name, case in CASES.items()}
# one labelled batch, or rows and classes
BATCH = [
    name
    for name, fields in MADE.items()
    if name not in BY_PLACE
    and _scalar(CASES[name])
    and (fields <= {"x", "labels", "temperature", "beta", "class_beta"} or "targets" in fields)
]
# a second set whose rows count by their labels alone
COLUMNS = [
    name
    for name, fields in MADE.items()
    if fields == {"x", "y", "labels", "y_labels"}
    or (fields == {"x", "y", "v", "scale", "labels", "y_labels"} and "attention" in name)
]
# which ask for class 0 by its place, tell of each class, weigh a class by its number, or whose
# covariances have places
PLACED = (
    *("softmax_outputs", "softmax_outputs_capped", "proxy_anchor_none"),
    *("gaussian_scores_covariance", "gaussian_scores_variance"),
    *("gaussian_cross_entropy_covariance", "gaussian_cross_entropy_variance"),
    *("class_aware_alignment_none", "pairwise_topk_class_covariance"),
    *("nested_margin_softmax_weights", "nested_margin_softmax_some_rows"),
)
CLASSES = [
    name for name, fields in MADE.items() if {"targets", "w"} <= fields and name not in PLACED
]
SYMMETRIC = [f"pairwise_{m}" for m in "euclidean sqeuclidean cityblock chebyshev cosine".split()]
SYMMETRIC += [f"pairwise_{m}" for m in "canberra hellinger jensenshannon correlation".split()]
SYMMETRIC += [f"pairwise_{m}" for m in "angular braycurtis minkowski hamming".split()]
SYMMETRIC += [f"similarity_{s}" for s in "dot cosine rbf laplacian polynomial sigmoid".split()]
SHIFTED = [
    *(name for name in BATCH if name.startswith(("contrastive", "margin_loss", "all_triplets_s"))),
    "kernel_mean",
    "mmd",
    "lifted_structure",
    "generalized_lifted_structure",
    "soft_nearest_neighbor",
    "pairwise_euclidean",
    "pairwise_cityblock",
]
SCALED = "multi_similarity circle orthogonal_projection tuplet_margin angular ranked_list".split()
SCALED += "histogram intra_pair_variance proxy_anchor uniformity margin_CosFace".split()
SCALED += "margin_ArcFace_linear margin_CurricularFace pairwise_cosine similarity_cosine".split()

INVARIANTS: dict[tuple[str, str], Invariant] = {
    (what, name): make(name)
    for what, names, make in (
        (
            "order of rows",
            BATCH,
            lambda n: _reordered(n, *OF_ROWS),
        ),
        ("order of columns", COLUMNS, lambda n: _reordered(n, "y", "y_labels", "v")),
        ("order of classes", CLASSES, _reordered_classes),
        ("sides", SYMMETRIC, _sides_changed),
        ("shift", SHIFTED, _shifted),
        ("power of two", SCALED, _longer),
        ("columns in banks", ["info_nce"], _parted(_banked)),
        ("columns in halves", ["logsumexp_rbf"], _parted(_halves)),
        ("columns in halves", ["attention_euclidean"], _parted(_attended_halves)),
        ("columns in halves", ["pairwise_topk_euclidean"], _parted(_nearest_halves)),
        ("columns in halves", ["kernel_mean"], _parted(_mean_halves)),
    )
    for name in names
}

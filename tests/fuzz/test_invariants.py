"""What must not change a result: the order of rows, columns and classes, sides that change place,
a shift, a power of two, columns in several segments. Within what roundings may do to either side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from draws import CASES, DRAWS, Draw, chooses, inputs, unjudged
from fuzz_settings import drawn
from hard_data import KINDS
from hypothesis import given
from pair_cases import Case, Inputs, in_dtype, outcome
from torch import Tensor

import fused_losses.functional as fl
from fused_losses.base.disturbance import Movement, distance, rounded_once

Call = Callable[..., Tensor]  # (inputs, backend=)
Change = Callable[[Inputs, torch.Generator], tuple[Inputs, Callable[[list[Tensor]], list[Tensor]]]]


def held(case: Case, draw: Draw, exact: Inputs, change: Change, call: Call | None = None) -> None:
    """Both calls' results are one, on each backend; the second's are brought back first."""
    right = lambda: outcome(case, in_dtype(case, exact, torch.float64), case.formula)
    truth = right()
    moved = Movement(right, truth, draw.dtype, draw.shape[2])
    generator = torch.Generator().manual_seed(draw.seed)
    other, back = change(exact, generator)
    for backend in BACKENDS:
        if not chooses(backend, draw) or (backend == "reference" and draw.dtype.itemsize == 2):
            continue
        t, u = (in_dtype(case, inputs, draw.dtype) for inputs in (exact, other))
        first = outcome(case, t, lambda t, b=backend: case.call(t, backend=b))
        second = back(outcome(case, u, lambda u, b=backend: (call or case.call)(u, backend=b)))
        dtypes = [
            torch.promote_types(draw.dtype, torch.float32) if truth[0].dim() == 0 else draw.dtype
        ]
        dtypes += [draw.dtype] * len(case.leaves)
        spares = [
            2 * rounded_once(w.to(dtype), float(w.norm()))
            for w, dtype in zip(truth, dtypes, strict=True)
        ]
        # each is within the bound of the truth
        errors = [distance(a, b) / 2 for a, b in zip(first, second, strict=True)]
        bounds = moved.bounds(errors, spares)
        named = list(zip(("value", *case.leaves), errors, bounds, strict=True))
        assert all(e <= max(b, 1e-37) for _, e, b in named), (case.name, draw, backend, named)


def _taken(t: Inputs, order: Tensor, *names: str) -> Inputs:
    return Inputs(**(vars(t) | {n: getattr(t, n)[order] for n in names if hasattr(t, n)}))


def _unordered(case: Case, order: Tensor, *names: str) -> Callable[[list[Tensor]], list[Tensor]]:
    """Gradients of permuted fields in their old places."""
    back = order.argsort()
    return lambda found: [
        found[0],
        *(g[back] if name in names else g for name, g in zip(case.leaves, found[1:], strict=True)),
    ]


def _reordered(case: Case, *names: str) -> Change:
    """The same order for all of these fields, the first of which is there."""

    def change(t: Inputs, generator: torch.Generator) -> tuple:
        order = torch.randperm(len(getattr(t, names[0])), generator=generator)
        return _taken(t, order, *names), _unordered(case, order, *names)

    return change


def _scalar(case: Case) -> bool:
    return case.formula(in_dtype(case, case.make(5, 5, 3), torch.float64)).dim() == 0


BY_PLACE = ("nt_xent_views", "supervised_contrastive_anchors", "n_pairs")
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
CLASSES = [name for name, fields in MADE.items() if {"targets", "w"} <= fields]
SYMMETRIC = [f"pairwise_{m}" for m in "euclidean sqeuclidean cityblock chebyshev cosine".split()]
SYMMETRIC += [f"pairwise_{m}" for m in "canberra hellinger jensenshannon correlation".split()]
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


def _check(name: str, change: Callable[[Case], Change], kind: str = "", **more: Any) -> None:
    case = CASES[name]

    @drawn(6)
    @given(DRAWS)
    def check(draw: Draw) -> None:
        if kind:
            draw = Draw(draw.shape, kind, draw.labels, draw.dtype, draw.seed)
        if not unjudged(case, draw) and draw.kind not in TIES:
            held(case, draw, inputs(case, draw), change(case), **more)

    check()


# which of equals is chosen goes by their order
TIES = ("constant", "duplicates", "sparse")


@pytest.mark.parametrize("name", BATCH)
def test_order_of_rows(name: str) -> None:
    _check(name, lambda case: _reordered(case, "x", "labels", "targets", "drawn"))


@pytest.mark.parametrize("name", COLUMNS)
def test_order_of_columns(name: str) -> None:
    _check(name, lambda case: _reordered(case, "y", "y_labels", "v"))


@pytest.mark.parametrize("name", CLASSES)
def test_order_of_classes(name: str) -> None:
    def change(case: Case) -> Change:
        def changed(t: Inputs, generator: torch.Generator) -> tuple:
            order = torch.randperm(len(t.w), generator=generator)
            u = _taken(t, order, "w", "weight", *(("bias",) if _of_classes(t) else ()))
            u.targets = torch.where(
                t.targets < 0, t.targets, order.argsort()[t.targets.clamp_min(0)]
            )
            fields = ("w", "bias") if _of_classes(t) else ("w",)
            return u, _unordered(case, order, *fields)

        return changed

    _check(name, change)


def _of_classes(t: Inputs) -> bool:
    return hasattr(t, "bias") and t.bias.dim() == 1


@pytest.mark.parametrize("name", SYMMETRIC)
def test_sides_change_place(name: str) -> None:
    def change(case: Case) -> Change:
        def changed(t: Inputs, _: torch.Generator) -> tuple:
            return Inputs(**(vars(t) | {"x": t.y, "y": t.x})), lambda f: [f[0], f[2], f[1]]

        return changed

    case = CASES[name]

    def turned(u: Inputs, backend: str) -> Tensor:
        return case.call(u, backend=backend).T

    _check(name, change, call=turned)


@pytest.mark.parametrize("name", SHIFTED)
def test_a_shift(name: str) -> None:
    """Of small whole numbers by a whole number: no rounding in the rows."""

    def change(case: Case) -> Change:
        def changed(t: Inputs, _: torch.Generator) -> tuple:
            moved = {n: v + 32 for n, v in vars(t).items() if n in ("x", "y", "other")}
            return Inputs(**(vars(t) | moved)), lambda found: found

        return changed

    _check(name, change, "integers")


@pytest.mark.parametrize("name", SCALED)
def test_a_power_of_two(name: str) -> None:
    """Rows 2^40 times as long: the same value, gradients over 2^40."""
    times = 2.0**40

    def change(case: Case) -> Change:
        def changed(t: Inputs, _: torch.Generator) -> tuple:
            longer = {n: v * times for n, v in vars(t).items() if n in ("x", "y", "w")}
            return Inputs(**(vars(t) | longer)), lambda f: [f[0], *(g * times for g in f[1:])]

        return changed

    case = CASES[name]

    @drawn(6)
    @given(DRAWS)
    def check(draw: Draw) -> None:
        if draw.dtype != torch.float16 and not unjudged(case, draw) and draw.kind not in TIES:
            held(case, draw, inputs(case, draw), change(case))

    check()


@drawn(40)
@given(DRAWS)
def test_columns_in_segments(draw: Draw) -> None:
    """Keys beyond the rows' own may as well stand in a bank; two halves of columns merge."""
    case = CASES["info_nce"]
    same = lambda t, _: (t, lambda found: found)

    def banked(t: Inputs, backend: str) -> Tensor:
        n = len(t.x)
        middle = n + (len(t.y) - n) // 2
        banks = [t.y[n:middle], t.y[middle:]]
        return fl.info_nce(t.x, t.y[:n], temperature=0.2, queue=banks, backend=backend)

    if not unjudged(case, draw):
        held(case, draw, inputs(case, draw), same, banked)
    case = CASES["logsumexp_rbf"]

    def halves(t: Inputs, backend: str) -> Tensor:
        given_rows = dict(similarity="rbf", scale=t.scale, cols=True, rows=False, backend=backend)
        middle = len(t.x) // 2
        parts = [
            fl.logsumexp_similarity(x, t.y, **given_rows) for x in (t.x[:middle], t.x[middle:])
        ]
        return torch.logaddexp(*parts) if middle else parts[1]

    if not unjudged(case, draw):
        held(case, draw, inputs(case, draw), same, halves)


def test_no_kind_is_forgotten() -> None:
    assert set(TIES) <= set(KINDS)
    assert len(BATCH) > 50 and len(CLASSES) > 20 and len(COLUMNS) > 8


def _without_rows(t: Inputs) -> Inputs:
    """Nothing of what there are four of: the rows of x and what goes with them."""
    return Inputs(**{n: v[:0] if v.dim() and len(v) == 4 else v for n, v in vars(t).items()})


# torch's, a mean over nothing
NAN_OF_NOTHING = ("linear_cross_entropy", "linear_cross_entropy_options", "triplet_margin")


@pytest.mark.parametrize("name", list(CASES))
def test_no_rows(name: str) -> None:
    """Refused by name, or the same answer on each backend and gradients of nothing."""
    case = CASES[name]
    t = _without_rows(case.make(4, 5, 3))
    found = []
    for backend in ("reference", "bounded", "cpu"):
        try:
            results = outcome(
                case, in_dtype(case, t, torch.float32), lambda t, b=backend: case.call(t, backend=b)
            )
        except ValueError as error:
            assert "expected" in str(error)
            found.append(None)
            continue
        # a logsumexp over nothing is -inf
        assert name.startswith(NAN_OF_NOTHING) or not bool(results[0].isnan().any())
        assert all(bool(g.isfinite().all()) for g in results[1:])
        found.append(results)
    for other in found[1:]:
        assert (other is None) == (found[0] is None)
        for a, b in zip(found[0] or [], other or [], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)

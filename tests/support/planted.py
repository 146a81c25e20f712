"""NaN and inf in drawn places of a call's rows, and which of its results they reach.

A result that the literal formula changes with a row is NaN with the row (docs/pairs.md). So the
formula is only ever asked about finite rows, whatever its comparisons would make of a NaN.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pair_cases
import torch
from draws import CASES, ROWS, Draw, chooses, inputs, unjudged
from pair_cases import BACKENDS, Case, Inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses.base.disturbance import Movement, distance, rounded_once

aten = torch.ops.aten
VALUES = (float("nan"), float("inf"), -float("inf"))
# what gives a number a pair or an entry keeps an infinite one, as float64 has it
PAIRED = ("pairwise", "similarity_", "gaussian_", "segment_", "sparse_decode")
# a direction, a variance or a whitening of a row with inf is none, and terms of either sign no sum
DIRECTED = ("cosine", "correlation", "angular", "snr", "mahalanobis", "covariance", "kl")
# what counts is the score: +inf is a fault, -inf adds nothing (docs/row_statistics.md)
SCORED = (
    "linear_cross_entropy",
    "adaptive_margin_softmax_eval",
    "unpg_margin_softmax_parted",
)
# weights multiply them, those of pairs that are left out, too
WEIGHTED = {
    **{name: ("v",) for name in CASES if name.startswith("attention")},
    **{name: ("few_values", "w") for name in CASES if name.startswith("trilinear_attention")},
}
# what is told of a row's classes, of whose cosines one is NaN
OPEN = ("margin_softmax_told",)
# a sign is told of inf, too, and a bit knows no NaN (the docstrings say what it is)
BITS = ("binary_codes", "hamming", "pack_codes", "packed_product")
# a width reads no coordinate beyond it and a mask hides places: the row's others reach farther
APART = ("nested", "masked_contrastive")
PLANTED = [name for name in CASES if not name.startswith(BITS)]
TRIES = 16


class FaultyScores(TorchDispatchMode):
    """Makes NaN of a product that is +inf."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        return torch.where(out == torch.inf, torch.nan, out) if func is aten.mm.default else out


class Place(NamedTuple):
    """One number of one tensor, and what stands there."""

    name: str
    at: tuple[int, ...]
    value: float


def places(case: Case, exact: Inputs, draw: Draw) -> list[Place]:
    """One to three, in the rows that meet."""
    choice = random.Random(draw.seed)
    names = [n for n in case.leaves if n in ROWS and n not in WEIGHTED.get(case.name, ())]
    names = [n for n in names if getattr(exact, n).dim() > 1]
    found = []
    for _ in range(choice.choice([1, 1, 2, 3])):
        name = choice.choice(names)
        at = tuple(choice.randrange(size) for size in getattr(exact, name).shape)
        found.append(Place(name, at, choice.choice(VALUES)))
    return found


def planted(exact: Inputs, where: list[Place], only_nan: bool = False) -> Inputs:
    made = _copied(exact)
    for name, at, value in where:
        made[name][at] = VALUES[0] if only_nan else value
    return Inputs(**made)


def _copied(exact: Inputs) -> dict[str, Any]:
    return {name: value.clone() for name, value in vars(exact).items()}


def reached(case: Case, exact: Inputs, where: list[Place], draw: Draw) -> Tensor:
    """Which elements of the formula's value other rows in these places change."""
    generator = torch.Generator().manual_seed(draw.seed)
    base = case.formula(exact).detach()
    seen = torch.zeros_like(base, dtype=torch.bool)
    for number in range(TRIES):
        made = _copied(exact)
        for name, at, _ in where:
            rows = made[name].view(-1, made[name].shape[-1])
            shape = rows.shape[1:]
            row = torch.randn(shape, generator=generator, dtype=rows.dtype)
            row = row * 10.0 ** (number % 4 - 1) / shape[0] ** 0.5
            if number % 2:  # near another row, or opposite to it
                at_other = int(torch.randint(0, len(rows), (1,), generator=generator))
                row = 0.01 * row + (1 if number % 4 == 1 else -1) * rows[at_other]
            of = at[-1:] if case.name.startswith(APART) else (...,)
            made[name][at[:-1]][of] = row[of]
        seen |= case.formula(Inputs(**made)).detach() != base
    return seen


def judge(
    case: Case, draw: Draw, backends: tuple[str, ...] = BACKENDS
) -> Iterator[tuple[str, list[str]]]:
    """What each backend has wrong; the first of them also says which NaN all have."""
    if case.name in OPEN:
        return
    exact = inputs(case, draw)
    where = places(case, exact, draw)
    bad = planted(exact, where)
    directed = case.name.endswith(DIRECTED) and "topk" not in case.name
    pairs = case.name.startswith((*PAIRED, *SCORED))
    must = None if pairs else reached(case, exact, where, draw)
    first: Tensor | None = None
    for backend in backends:
        if not chooses(backend, draw) or (backend == "reference" and draw.dtype.itemsize == 2):
            continue
        t = pair_cases.in_dtype(case, bad, draw.dtype)
        got = case.call(t, backend=backend).detach()
        nan = got.isnan()
        faults = []
        if must is not None and bool((must & ~nan).any()):
            faults.append(f"{where} reach {int((must & ~nan).sum())} results that are not NaN")
        first = nan if first is None else first
        if not pairs and not torch.equal(nan, first):
            faults.append(f"{where}, other NaN than the first backend's")
        if not unjudged(case, draw):
            wanted = planted(exact, where, directed) if pairs else exact
            faults += _values(case, draw, wanted, got, where, ~nan)
        yield backend, faults


def _values(
    case: Case, draw: Draw, t: Inputs, got: Tensor, where: list[Place], kept: Tensor
) -> Iterator[str]:
    """The formula's: of pairs all, else where nothing was reached."""
    everything = case.name.startswith((*PAIRED, *SCORED))
    # a soft cap makes a finite score of it
    faulty = case.name.startswith(SCORED) and not case.name.endswith("capped")

    def outcome() -> list[Tensor]:
        with FaultyScores() if faulty else nullcontext():
            value = case.formula(t).detach()
        return [value if everything else value[kept]]

    truth = outcome()
    top = torch.finfo(got.dtype).max
    if not truth[0].numel() or bool((truth[0].abs() > top).logical_and(truth[0].isfinite()).any()):
        return
    value = got if everything else got[kept]
    error = distance(value, truth[0])
    size = float(truth[0].nan_to_num(0, 0, 0).norm())
    # 1 - cos rounds as a number near 1
    spare = 2 * rounded_once(got, size + float(truth[0].numel()) ** 0.5)
    movement = Movement(outcome, truth, draw.dtype, draw.shape[2])
    (bound,) = movement.bounds([error], [spare])
    if not error <= bound:
        yield f"{where}: value {error:.2e} off, at most {bound:.2e}"

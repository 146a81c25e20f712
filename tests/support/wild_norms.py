"""Rows of norms from 1e-40 to 1e30, for what their length does not change or only multiplies.

Which functions these are the literal formula says, by rows 2^20 times as long. Values and gradients
are compared after the length is taken out of them, so that no row's hides another's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache, partial

import pair_cases
import torch
from draws import CANCEL, CASES, ROWS, Call, Draw, calls, inputs
from pair_cases import Case, Inputs
from pair_rows import unit
from torch import Tensor

from fused_losses.base.disturbance import Movement, distance
from fused_losses.base.numerics import ROUNDOFF, accumulate_dtype

# views made of the rows as they are; squares of these; what a rounding of 16 bits chooses;
# negatives that are not divided
NOT_OF_DIRECTIONS = (
    *("nt_xent_views", "n_pairs", "n_pairs_none", "harmonic_triplet", "harmonic_triplet_none"),
    "harmonic_triplet_mined",
    "angular_plain_negatives",
    # whose calls normalise by themselves
    *("multi_similarity_mined", "intra_pair_variance_mined", "circle_mined"),
    *("supervised_contrastive_mined", "nt_xent_mined"),
    # each of whose widths has a norm of its own
    *(name for name in CASES if name.startswith("nested_info_nce")),
    # whose guide is normalised with them
    *(name for name in CASES if name.startswith("info_nce_guide")),
)
# of denormals: a product with a weight has their grain, and rows of few digits are equally near
NO_DENORMALS = ("pairwise_weighted", "icnn")
# of two sweeps, of which one takes short classes for zeros on GPU backends
TWO_SWEEPS = "softmax_outputs"
LENGTHS = {"1e-40": 1e-40, "1e-30": 1e-30, "1e30": 1e30, "from 1e-30 to 1e30": None}
# of classes that GPU backends find shorter they make zeros (docs/row_statistics.md)
COUNTS_AS_ZERO = 2.0**-120
CLASSES = {"weight", "student_weight"}


def _rows(case: Case) -> list[str]:
    return [name for name in case.leaves if name in ROWS or name.startswith("teacher")]


def normalised(case: Case) -> Case | None:
    """The same with `normalize=True`, of whose rows the formula sees the directions."""
    if case.function is None or case.name in NOT_OF_DIRECTIONS or "semihard" in case.name:
        return None
    option = inspect.signature(case.function).parameters.get("normalize")
    if option is None or option.default is not False:
        return None

    def formula(t: Inputs) -> Tensor:
        made = dict(vars(t))
        for name in _rows(case):
            flat = made[name].reshape(-1, made[name].shape[-1])
            made[name] = unit(flat).view(made[name].shape)
        return case.formula(Inputs(**made))

    return Case(
        f"{case.name}_unit",
        case.make,
        lambda t, **more: case.call(t, normalize=True, **more),
        formula,
        case.leaves,
        case.cancels,
        case.function,
    )


UNIT = {made.name: made for made in map(normalised, CASES.values()) if made is not None}


def _over_classes(case: Case) -> bool:
    f = case.function
    return f is not None and not CLASSES.isdisjoint(inspect.signature(f).parameters)


def longer(case: Case, t: Inputs, factor: float | None, seed: int) -> dict[str, Tensor]:
    """A power of two a row, by the rows' names; factor None: each row has its own."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in _rows(case):
        rows = getattr(t, name)
        shape = (*rows.shape[:-1], 1)
        if factor is None:
            powers = (60 * torch.rand(shape, generator=generator, dtype=rows.dtype) - 30) * 3.32
        else:
            powers = torch.full(shape, factor, dtype=rows.dtype).log2()
        made[name] = powers.round().exp2()
    return made


def scaled(t: Inputs, by: dict[str, Tensor]) -> Inputs:
    return Inputs(**{name: v * by[name] if name in by else v for name, v in vars(t).items()})


@cache
def degree(name: str) -> int | None:
    """k of f(c x) = c^k f(x), or None."""
    first, second = (_of_longer(name, factor) for factor in (1.0, 2.0**20))
    powers = [k for k in (0, 1) if torch.equal(second, first * 2.0 ** (20 * k))]
    return powers[0] if len(powers) == 1 and bool(first.any()) else None


def _of_longer(name: str, factor: float | None) -> Tensor:
    """The formula's value on an example of rows so many times as long."""
    case = {**CASES, **UNIT}[name]
    t = inputs(case, Draw((5, 7, 4), "plain", "as they are", torch.float32, 1))
    return case.formula(scaled(t, longer(case, t, factor, 0)))


def _grain(dtype: torch.dtype) -> float:
    """The smallest number above 0."""
    return torch.finfo(dtype).tiny * 2 * ROUNDOFF[dtype]


def judge(case: Case, draw: Draw, length: str) -> Iterator[tuple[Call, list[float], list[float]]]:
    """Errors and bounds of value and gradients, freed of the rows' lengths.

    Gradients of rows of 1e-40 are near 1e40 and not judged.
    """
    k, factor = degree(case.name), LENGTHS[length]
    plain = inputs(case, draw)
    by = longer(case, plain, factor, draw.seed)
    exact = scaled(plain, by)
    exact = Inputs(
        **{n: v.to(draw.dtype).double() if n in by else v for n, v in vars(exact).items()}
    )
    freed = 1.0 if k == 0 or factor is None else 1 / next(iter(by.values())).flatten()[0].item()
    dtype = accumulate_dtype(draw.dtype)
    top, grain = torch.finfo(draw.dtype).max, _grain(dtype)

    def free(found: list[Tensor], like: list[Tensor] | None = None) -> list[Tensor]:
        """What no number of the dtype can be is left out."""
        like = found if like is None else like
        kept = [torch.where(w.abs() < top / 4, f, 0) for f, w in zip(found, like, strict=True)]
        grads = (
            g * by[name] if k == 0 and name in by else g
            for name, g in zip(case.leaves, kept[1:], strict=True)
        )
        return [kept[0] * freed, *grads]

    def right(exact: Inputs) -> list[Tensor]:
        return pair_cases.outcome(
            case, pair_cases.in_dtype(case, exact, torch.float64), case.formula
        )

    def promised(exact: Inputs) -> tuple[list[Tensor], list[Tensor], Movement]:
        raw = right(exact)
        moved = Movement(lambda: free(right(exact), raw), free(raw), draw.dtype, draw.shape[2])
        return raw, free(raw), moved

    promises = [promised(exact)]
    if length == "1e-40" and _over_classes(case):
        short = torch.linalg.vector_norm(exact.w, dim=-1, keepdim=True) < COUNTS_AS_ZERO
        promises += [promised(Inputs(**vars(exact) | dict(w=exact.w.masked_fill(short, 0))))]
    absolute = CANCEL.get(case.name.removesuffix("_unit"), 0) * ROUNDOFF[dtype]

    def against(
        found: list[Tensor], raw: list[Tensor], truth: list[Tensor], movement: Movement
    ) -> tuple[list[float], list[float]]:
        got = free(found, raw)
        errors = [distance(g, w) for g, w in zip(got, truth, strict=True)]
        # in one dimension a direction has no slope: what is left is roundings
        no_slope = length == "1e-40" or (k == 0 and draw.shape[2] == 1)
        errors = errors[:1] if no_slope else errors
        # the grain of each of a row's terms, and of what is stored, which may be rows
        each = (draw.shape[2] + 16) * grain + _grain(draw.dtype if truth[0].dim() > 1 else dtype)
        lost = [each * freed * truth[0].numel() ** 0.5]
        for name, g in zip(case.leaves, truth[1:], strict=True):
            size = by[name].norm().item() if k == 0 and name in by else 1.0
            lost.append(4 * grain * size * g.numel() ** 0.5)
        tiny = 1024 * torch.finfo(dtype).tiny
        spares = [
            2 * ROUNDOFF[draw.dtype] * w.norm().item() + absolute + tiny + each
            for w, each in zip(truth, lost, strict=True)
        ]
        # those that are not judged are within any bound
        rest = [0.0] * (len(truth) - len(errors))
        return errors, movement.bounds([*errors, *rest], spares)[: len(errors)]

    for call in calls(case, draw):
        if call.layout != "contiguous" or call.precision != "fp32":
            continue
        if call.backend == "cuda" and len(promises) > 1 and case.name.startswith(TWO_SWEEPS):
            continue
        t = pair_cases.in_dtype(case, exact, draw.dtype)
        found = pair_cases.outcome(case, t, partial(case.call, backend=call.backend))
        # one of the two throughout: a row's own score and those of others
        kept = promises if call.backend == "cuda" else promises[:1]
        told = [against(found, *promise) for promise in kept]
        shares = [max(e / max(b, 1e-300) for e, b in zip(*pair, strict=True)) for pair in told]
        yield call, *told[shares.index(min(shares))]


@cache
def lengths(name: str) -> list[str]:
    """Each row its own only where each row's alone is nothing."""
    own = degree(name) == 0 and torch.equal(_of_longer(name, None), _of_longer(name, 1.0))
    some = [length for length, factor in LENGTHS.items() if own or factor is not None]
    return some[1:] if name.startswith(NO_DENORMALS) else some


JUDGED = {**CASES, **UNIT}
NAMES = [name for name, case in JUDGED.items() if degree(name) is not None]

"""Float64 against 60 digits where it cancels: every backend, and the literal formulas, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from draws import CANCEL, CASES
from many_digits import FORMULAS, exact
from pair_cases import EXACT, in_dtype, outcome
from pair_rows import Inputs

from fused_losses.base.disturbance import Movement, distance, rounded_once

# how far y is from x, or from -x: no distance is below the roundings of rows of norm 1
NEAR = {"apart": 1.0, "1e-4": 1e-4, "1e-8": 1e-8, "1e-12": 1e-12}
OPPOSITE = ("pairwise_cosine", "pairwise_angular", "pairwise_correlation", "margin_ArcFace_none")
ROWS = [*((name, False) for name in FORMULAS), *((name, True) for name in OPPOSITE)]
# a cosine holds no angle so near to 0 or pi: its slope is not judged (docs/reliability.md)
NO_SLOPE = {
    ("margin_ArcFace_none", near, opposite)
    for near in ("1e-8", "1e-12")
    for opposite in (False, True)
}


def made(name: str, near: float, opposite: bool, shape: tuple[int, int]) -> Inputs:
    n, d = shape
    first, second = FORMULAS[name][0]
    x, more = torch.randn(2, n, d, dtype=torch.float64) / d**0.5
    y = (-x if opposite else x) + near * more
    t = Inputs(targets=torch.arange(n), drawn=torch.zeros(n), scale=torch.tensor(3.0).double())
    t.bias = torch.tensor(-2.0).double()
    setattr(t, first, x)
    setattr(t, second, y)
    return t


def judge(
    name: str, opposite: bool, near: str, shape: tuple[int, int]
) -> Iterator[tuple[str, list[float], list[float]]]:
    """Errors and bounds of value and gradients, of the literal formula and of each backend."""
    given = FORMULAS[name][0]
    case = replace(CASES[name], leaves=given if name != "uniformity" else given[:1])
    t = made(name, NEAR[near], opposite, shape)

    def literal() -> list[torch.Tensor]:
        return outcome(case, in_dtype(case, t, torch.float64), case.formula)

    found = literal()
    weight = torch.randn(
        found[0].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    weights = weight.flatten().tolist() if found[0].dim() else [1.0]
    sides = [getattr(t, field).tolist() for field in given]
    truth = [
        torch.tensor(part, dtype=torch.float64).view(like.shape)
        for part, like in zip(exact(name, sides[0], sides[1], weights), found, strict=False)
    ]
    movement = Movement(literal, found, torch.float64, shape[1])
    spare = CANCEL.get(name, 0) * 2.0**-53
    spares = [2 * rounded_once(w, float(w.norm())) + spare for w in truth]
    called = {
        backend: outcome(
            case,
            in_dtype(case, t, torch.float64),
            lambda t, backend=backend: case.call(t, backend=backend),
        )
        for backend in EXACT
    }
    kept = 1 if (name, near, opposite) in NO_SLOPE else len(truth)
    for who, got in {"the literal formula": found, **called}.items():
        errors = [distance(g, w) for g, w in zip(got, truth, strict=True)]
        bounds = movement.bounds(errors, spares)
        yield who, errors[:kept], bounds[:kept]

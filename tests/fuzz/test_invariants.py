"""What must not change a result, drawn (`invariants`), and calls of nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import BACKENDS
from draws import CASES
from fuzz_settings import draws_of, of_function
from hard_data import KINDS
from invariants import BATCH, CLASSES, COLUMNS, INVARIANTS, TIES, judge, judged
from pair_cases import Inputs, in_dtype, outcome
from torch import Tensor

# of one function each
LONGER = ("columns in banks", "columns in halves")


@pytest.mark.parametrize("what, name", INVARIANTS)
def test_invariants(what: str, name: str) -> None:
    invariant = INVARIANTS[what, name]
    count = 20 if what in LONGER else of_function(name, 3)
    for draw in draws_of(f"{what}, {name}", count, lambda draw: judged(name, invariant, draw)):
        for verdict in judge(name, invariant, draw):
            assert verdict.share <= 1, (draw, verdict)


def test_no_kind_is_forgotten() -> None:
    assert set(TIES) <= set(KINDS)
    assert len(BATCH) > 50 and len(CLASSES) > 20 and len(COLUMNS) > 8


def _no_coordinates(v: Tensor) -> Tensor:
    rows = v.is_floating_point() and v.dim() > 1 and v.shape[-1] == 3
    return v[..., :0] if rows else v


NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda v: v[:0] if v.dim() and len(v) == 4 else v,
    "columns": lambda v: v[:0] if v.dim() and len(v) == 5 else v,
    "coordinates": _no_coordinates,
}
# its call picks columns itself
PICKED = ("triplet_margin_cubic",)


def _without(what: str, t: Inputs) -> Inputs:
    """Nothing of what there are four rows, five columns or three coordinates of."""
    return Inputs(**{n: NOTHING[what](v) for n, v in vars(t).items()})


# torch's, a mean over nothing; a share of distances that are all 0
NAN_OF_NOTHING = ("linear_cross_entropy", "triplet_margin", "class_aware_alignment")


@pytest.mark.parametrize("what", NOTHING)
@pytest.mark.parametrize("name", [name for name in CASES if name not in PICKED])
def test_nothing(name: str, what: str) -> None:
    """Refused by name, or the same answer on each backend and gradients of nothing."""
    case = CASES[name]
    t = _without(what, case.make(4, 5, 3))
    found = []
    for backend in BACKENDS:
        try:
            results = outcome(
                case, in_dtype(case, t, torch.float32), lambda t, b=backend: case.call(t, backend=b)
            )
        except (ValueError, IndexError) as error:
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

"""Hard data, drawn: every loss and similarity against its literal formula in float64.

`draws` says what is drawn and what is allowed; docs/reliability.md what it found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
from choice_option_draws import EVERY
from class_loss_draws import LOSSES
from draws import CASES, judge, unjudged
from fuzz_settings import draws_of, of_function
from margin_calls import MARGINS
from margin_draws import CLASS_LOSSES
from metric_draws import SIMILARITIES

from fused_losses import class_losses, functional, margins, metrics, miners
from fused_losses.pairwise import distance
from fused_losses.pairwise import metrics as pairwise_metrics

DRAWS = 7  # a function, over its variants: of about seven calls each


@pytest.mark.parametrize("name", list(CASES))
def test_hard_data(name: str) -> None:
    case = CASES[name]
    for draw in draws_of(name, of_function(name, DRAWS), lambda draw: not unjudged(case, draw)):
        for verdict in judge(case, draw):
            assert verdict.share <= 1, (draw, verdict)


def test_nothing_public_is_missing() -> None:
    """Each function, margin, class loss, metric, miner and name of a distance is drawn."""
    known = {case.function for case in CASES.values()} | {choice.function for choice in EVERY}
    public = {getattr(functional, name) for name in functional.__all__}
    assert {f for f in public if not isinstance(f, type)} <= known
    of_rows = {f for name, f in vars(metrics).items() if "embeddings" in _parameters(f)}
    assert of_rows <= known
    made = {
        m for m in vars(miners).values() if isinstance(m, type) and m.__module__.endswith(".miners")
    }
    private = {m for m in made if m.__name__.startswith("_")}
    # `test_distance_weighted` draws it
    assert made - private - {miners.Miner, miners.DistanceWeightedMiner} <= known
    kinds = {m.__name__ for m in vars(margins).values() if _is_margin(m)}
    assert kinds == {name.split("_")[0] for name in MARGINS} - {"none"}
    assert set(class_losses.__all__) == {
        *CLASS_LOSSES,
        *(name.split("_")[0] for name in LOSSES),
        *("ALDR", "ClassLoss", "OfProbability", "MergedRows", "class_loss"),
        # functions of a row's features, held to the authors' numbers
        *("BiasWeights", "equity_weights"),
    }
    assert set(SIMILARITIES) == set(distance.SIMILARITIES)
    names = {name.removeprefix("pairwise_") for name in CASES}
    assert set(pairwise_metrics.METRICS) <= names
    assert {f"weighted_{name}" for name in pairwise_metrics.WEIGHTED} <= names


def _parameters(f: object) -> dict:
    return dict(inspect.signature(f).parameters) if inspect.isfunction(f) else {}


def _is_margin(kind: object) -> bool:
    here = isinstance(kind, type) and kind.__module__ == margins.__name__
    return here and issubclass(kind, Callable) and not kind.__name__.startswith("_")

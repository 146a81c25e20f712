"""What a search is given, checked at its door."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import row_dtype
from fused_losses.base.sides import Integers, integers
from fused_losses.pairwise.distance import check_options, check_weighted
from fused_losses.pairwise.metrics import METRICS
from fused_losses.pairwise.own_metric import OwnMetric, check_alone
from fused_losses.primitives.distances.inputs import FLAT
from fused_losses.primitives.topk.inputs import (
    MATCHES,
    MOST,
    SCREENS,
    STEP,
    Prepared,
    PrincipalRows,
    QuantizedRows,
)


def check_named(metric: str | OwnMetric, p: float, options: dict[str, Any]) -> None:
    """The options of `pairwise_distance`, and no others, where the metric has them."""
    if callable(metric):
        check_alone(p=p, **options)
        return
    if metric not in METRICS and metric != "dot":
        known = ", ".join(sorted({*METRICS, "dot"}))
        raise ValueError(f"metric: expected one of {known}, got {metric!r}")
    stray = sorted(set(options) - {"w", "VI", "covariance", "variance", "base"})
    if stray:
        raise TypeError(
            f"{stray[0]}: expected one of w, VI, covariance, variance and base, which "
            f"pairwise_distance takes"
        )
    rest = {name: value for name, value in options.items() if name != "w"}
    check_options(metric, p, **rest)
    if options.get("w") is not None:
        check_weighted(metric)


def _check_side(name: str, rows: Tensor, shape: str, metric: str | OwnMetric) -> None:
    bits = callable(metric) or metric in FLAT
    bits = bits and isinstance(rows, Tensor) and rows.dtype == torch.bool
    validation.check_matrix(name, rows[:0].float() if bits else rows, shape)


def check_topk(
    x: Tensor,
    y: Tensor | QuantizedRows | None,
    k: int,
    metric: str | OwnMetric,
    match: str,
    screen: str | Prepared,
) -> None:
    _check_side("x", x, "[N, D]", metric)
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"k: expected an integer >= 1, got {type(k).__name__}")
    for name, value in (("y", y), ("screen", screen)):
        if isinstance(value, QuantizedRows):
            _check_quantized(name, value)
    if not isinstance(y, QuantizedRows) and y is not None:
        _check_side("y", y, "[M, D]", metric)
    rows = x if y is None else y.codes if isinstance(y, QuantizedRows) else y
    most = max(MOST, rows.shape[0])
    if not 1 <= k <= most:
        raise ValueError(f"k: expected a value in [1, {most}], got {k}")
    validation.check_choice("match", match, MATCHES)
    if rows.shape[1] != x.shape[1]:
        raise ValueError(
            f"y: expected [M, {x.shape[1]}] to match x [N, {x.shape[1]}], got "
            f"{validation.describe(rows)}"
        )
    validation.check_device("x", x, "y", rows)
    if isinstance(screen, PrincipalRows):
        _check_principal(screen, y, rows)
    elif not isinstance(screen, QuantizedRows):
        validation.check_choice("screen", screen, SCREENS)
    elif tuple(screen.codes.shape) != tuple(rows.shape) or isinstance(y, QuantizedRows):
        raise ValueError(
            f"screen: expected the QuantizedRows of float rows y {tuple(rows.shape)}, got codes "
            f"{validation.describe(screen.codes)}"
        )


Sided = tuple[Tensor | None, Tensor | None]


def taking_part(
    x: Tensor,
    y: Tensor | QuantizedRows | None,
    labels: Sided,
    ids: Sided,
    exclude: Tensor | None,
    match: str,
    skip_self: bool,
) -> tuple[dict[str, Any], Integers]:
    """Which pairs a search looks at, as fields of `TopkInputs`, and the numbers they are of."""
    bank = x if y is None else y
    rows = bank.codes if isinstance(bank, QuantizedRows) else bank
    numbers = integers(
        x, rows, ("x_", "y_"), alone=y is None, labels=labels, ids=ids, exclude=exclude
    )
    if match != "any" and labels[0] is None:
        raise ValueError(f"x_labels: expected labels with match={match!r}, got None")
    asked = dict(
        x_labels=None if match == "any" else numbers.x_labels,
        y_labels=None if match == "any" else numbers.y_labels,
        x_ids=numbers.x_ids,
        y_ids=numbers.y_ids,
        exclude=numbers.exclude,
        match=match,
        skip_self=skip_self,
    )
    return asked, numbers


def _check_quantized(name: str, rows: QuantizedRows) -> None:
    m = rows.codes.shape[0]
    if rows.codes.dtype != torch.int8 or rows.codes.dim() != 2:
        raise TypeError(
            f"{name}.codes: expected int8 [M, D], got {validation.describe(rows.codes)}"
        )
    for field in ("scale", "error"):
        vector = getattr(rows, field)
        if vector.dtype != torch.float32 or tuple(vector.shape) != (m,):
            raise TypeError(
                f"{name}.{field}: expected float32 [{m}], got {validation.describe(vector)}"
            )
        validation.check_device(f"{name}.codes", rows.codes, f"{name}.{field}", vector)
    signs, d = rows.signs, rows.codes.shape[1]
    if signs is None:
        return
    if not isinstance(signs, Tensor) or signs.dtype != torch.int8 or signs.shape[1:] != (d,):
        got = validation.describe(signs) if isinstance(signs, Tensor) else type(signs).__name__
        raise TypeError(f"{name}.signs: expected int8 [rounds, {d}], got {got}")
    validation.check_device(f"{name}.codes", rows.codes, f"{name}.signs", signs)


def _check_principal(screen: PrincipalRows, y: Any, rows: Tensor) -> None:
    (m, d), of = rows.shape, screen.first
    if isinstance(y, QuantizedRows) or of.dim() != 2 or of.shape[0] != m:
        raise ValueError(
            f"screen: expected the PrincipalRows of float rows y ({m}, {d}), got coordinates "
            f"{validation.describe(of)}"
        )
    levels = screen.rest.shape[1] if screen.rest.dim() == 3 else 0
    kept = screen.axes.shape[1] if screen.axes.dim() == 2 else 0
    wide = row_dtype(rows.device)
    expected = dict(
        first=((m, of.shape[1]), torch.float32),
        rest=((m, levels, STEP), torch.float32),
        tails=((levels + 2, m), torch.float32),
        axes=((d, kept), wide),
    )
    for field, (shape, dtype) in expected.items():
        part = getattr(screen, field)
        if part.dtype != dtype or tuple(part.shape) != shape:
            raise TypeError(
                f"screen.{field}: expected {dtype} {shape}, got {validation.describe(part)}"
            )
        validation.check_device(f"screen.{field}", part, "y", rows)
    if not of.shape[1] <= kept <= min(d, of.shape[1] + levels * STEP):
        raise ValueError(
            f"screen.axes: expected as many as coordinates are kept, got {kept} beside "
            f"{of.shape[1]} and {levels} levels"
        )
    if not 0 <= screen.moved < 1:
        raise ValueError(f"screen.moved: expected a value in [0, 1), got {screen.moved}")


def check_batches(
    x: Tensor,  # [B, N, D]
    y: Tensor | QuantizedRows | None,
    sided: dict[str, Tensor | None],
    screen: str | Prepared,
) -> Tensor | None:
    """y, where all of a batch of searches has as many items; each is checked as a search."""
    count = x.shape[0]
    if isinstance(screen, Prepared):
        raise ValueError(f"screen: expected no {type(screen).__name__} beside x [B, N, D]")
    if isinstance(y, QuantizedRows):
        raise ValueError("y: expected [B, M, D] beside x [B, N, D], got QuantizedRows")
    for name, t in {"y": y, **sided}.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        dimensions = {"y": 3, "exclude": 3}.get(name, 2)
        if t.dim() != dimensions or t.shape[0] != count:
            raise ValueError(
                f"{name}: expected {count} items in {dimensions} dimensions beside x "
                f"{tuple(x.shape)}, got {validation.describe(t)}"
            )
    return y

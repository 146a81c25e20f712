"""Hyper-parameters, checked where they are given: their range, and who carries a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fused_losses.base.numerics import traced
from fused_losses.base.validation import check_number, check_plain, check_vector, describe


def check_parameter(
    name: str,
    value: float | Tensor,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    within: str | None = None,
    carries: bool = False,
) -> None:
    """A finite number in [low, high]; with `carries` also a tensor of such, with its gradient.

    within: how the range is named, where brackets do not say enough. A tensor elsewhere than on the
    CPU is not read. Raises TypeError or ValueError that names the argument.
    """
    wanted = within or _range(low, high)
    if isinstance(value, Tensor):
        if not carries:
            with torch.enable_grad():  # the call comes later, and may want gradients
                check_plain(**{name: value})
        if not value.is_floating_point() or (not carries and value.dim() > 0):
            raise TypeError(f"{name}: expected {wanted}, got a tensor of {describe(value)}")
        if value.device.type == "cpu" and not traced(value):
            outside = ~((value >= low) & (value <= high) & value.isfinite())
            if bool(outside.any()):
                raise ValueError(f"{name}: expected {wanted}, got {value.detach()[outside][0]:g}")
        return
    check_number(name, value)
    if not (low <= value <= high and abs(value) < math.inf):
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def check_above(name: str, value: float | Tensor, low: float = 0, *, carries: bool = False) -> None:
    """As `check_parameter`, a finite number > low."""
    least = math.nextafter(low, math.inf)
    within = f"a finite value > {low:g}"
    check_parameter(name, value, least, within=within, carries=carries)


def check_angle(name: str, value: float | Tensor) -> None:
    """As `check_parameter`, an angle in [0, pi]; where degrees were meant, it says so."""
    within = "radians in [0, pi]"
    number = not isinstance(value, Tensor | bool) and isinstance(value, int | float)
    if number and math.pi < value <= 180:
        within += f" ({value:g} degrees are {math.radians(value):.4g} radians)"
    check_parameter(name, value, 0, math.pi, within=within, carries=True)


def check_row_weight(row_weight: Tensor | None, n: int, embeddings: Tensor) -> None:
    """None, or what each row counts for in a mean: [n] >= 0, without gradient."""
    if row_weight is None:
        return
    check_vector("row_weight", row_weight, n, f"one value a row [{n}]", embeddings)
    if row_weight.requires_grad:
        raise TypeError("row_weight: expected a tensor without gradient; detach it")
    if row_weight.device.type == "cpu" and not traced(row_weight):
        fit = (row_weight >= 0) & row_weight.isfinite()
        if not bool(fit.all()):
            raise ValueError(
                f"row_weight: expected values >= 0, finite, got {row_weight[~fit][0]:g}"
            )


def check_called(name: str, value: object) -> None:
    """TypeError for a `forward` that a value has and nobody calls: only a module's is."""
    if hasattr(value, "forward") and not isinstance(value, nn.Module):
        raise TypeError(
            f"{name}: expected what {type(value).__name__}.forward does in the method that is "
            "called (__call__ of a margin, row_loss of a loss): forward is an nn.Module's"
        )


def check_margin(margin: object) -> None:
    """None or a callable that is no class; else a TypeError that says what to write."""
    if margin is None or (callable(margin) and not isinstance(margin, type)):
        check_called("margin", margin)
        asks_for = getattr(margin, "asks_for", None)
        if isinstance(asks_for, str):
            raise TypeError(
                f"margin: expected a margin or a loss of cosines, got {type(margin).__name__}, "
                f"which {asks_for}"
            )
        return
    if isinstance(margin, type):
        got, write = f"the class {margin.__name__}", f"{margin.__name__}()"
    elif isinstance(margin, str):
        got, write = repr(margin), "the object, such as ArcFace()"
    else:
        got, write = repr(margin), f"ArcFace({margin!r}) or CosFace({margin!r})"
    raise TypeError(
        f"margin: expected None, a margin such as ArcFace(0.5) or a callable, got {got}; write "
        f"{write}"
    )


def _range(low: float, high: float) -> str:
    if high < math.inf:
        return f"a value in [{low:g}, {high:g}]"
    return f"a finite value >= {low:g}" if low > -math.inf else "a finite value"

"""Margins by the names of the command line."""

from __future__ import annotations

from typing import Any

from fused_losses import margins
from fused_losses.train.frame.options import OptionError


def make_margin(name: str, value: float | None) -> margins.Margin | None:
    """The margin object of that name, with `value` in place of its paper's size."""
    if name == "none":
        return None
    if name == "magface":
        # its margin runs from l_margin to u_margin: `value` is where it starts
        shift: dict[str, Any] = (
            {} if value is None else {"l_margin": value, "u_margin": value + 0.35}
        )
        # this trainer's embeddings have unit variance: a norm near sqrt(D), not the paper's 110
        return margins.MagFace(l_a=2.0, u_a=14.0, **shift)
    kind = {
        "arcface": margins.ArcFace,
        "cosface": margins.CosFace,
        "sphereface": margins.SphereFace,
        "adaface": margins.AdaFace,
        "elastic-arcface": margins.ElasticArcFace,
        "elastic-cosface": margins.ElasticCosFace,
        "curricularface": margins.CurricularFace,
        "mv-softmax": lambda value=0.35: margins.MVSoftmax("am", value),
    }[name]
    if value is not None:
        return kind(value)
    # four times the angle does not start on 30 people; SphereFace2017's own code anneals to it
    return kind(1.5) if name == "sphereface" else kind()


def check_margin(name: str, value: float | None) -> None:
    """OptionError for a size that this margin cannot have."""
    if name == "none" and value is not None:
        raise OptionError("margin_value", f"margin 'none' takes no value, got {value}")
    try:
        make_margin(name, value)
    except (ValueError, TypeError) as error:
        raise OptionError("margin_value", f"margin {name!r} cannot have it: {error}") from error

"""A margin as the losses call it: its bends, its moved cosines and its penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.margins import Margin


def bend_of(margin: Margin | None, cosine: Tensor, present: Tensor) -> Tensor | None:
    """The bends [4, N] of a margin for these target cosines; None: it has none.

    cosine [N] · present [N] bool, False where a row has no target.
    """
    if margin is None or not hasattr(margin, "bend"):
        return None
    bend = margin.bend(torch.where(present, cosine.detach(), torch.nan)).detach()
    if bend.shape != (4, *cosine.shape):
        raise ValueError(
            f"margin.bend: expected it to return shape {(4, *cosine.shape)}, got "
            f"{tuple(bend.shape)}"
        )
    return bend


def shown(target: Tensor) -> Tensor:
    """NaN where it is +inf: a loss's limit is 0, a margin's clamp finite, but a fault must show."""
    return target.masked_fill(target == torch.inf, torch.nan)


def apply_margin(
    margin: Margin | None,
    cosine: Tensor,  # [N]
    norm: Tensor | None,  # [N]
    gradient: str,
    present: Tensor,  # [N] bool
) -> Tensor:
    """The target cosine after the margin. [N]

    `straight_through` takes the margin's slope, in cosine and norm, for 1 and 0; what it has of its
    own, such as a margin that learns, keeps its gradient.
    """
    if margin is None:
        return cosine
    cosine = shown(cosine)
    straight = gradient == "straight_through"
    given = [cosine.detach() if straight else cosine]
    if getattr(margin, "uses_norm", False):
        assert norm is not None
        given.append(norm.detach() if straight else norm)
    if getattr(margin, "uses_present", False):
        given.append(present)
    moved = _called(margin, given)
    if not isinstance(moved, Tensor) or moved.shape != cosine.shape:
        got = tuple(moved.shape) if isinstance(moved, Tensor) else type(moved).__name__
        raise ValueError(f"margin: expected it to return shape {tuple(cosine.shape)}, got {got}")
    # the difference is worth 0, of an infinite cosine too
    return moved + torch.where(cosine.isinf(), 0, cosine - cosine.detach()) if straight else moved


def _called(margin: Margin, given: list[Tensor]) -> Any:
    """TypeError for a callable that is no function of such vectors: a layer, say."""
    if torch.compiler.is_compiling():
        return margin(*given)
    try:
        return margin(*given)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError) as error:
        vectors = f"{len(given)} vector{'s' * (len(given) > 1)} of shape {tuple(given[0].shape)}"
        raise TypeError(
            f"margin: expected a callable on {vectors}, {given[0].dtype}, got "
            f"{type(margin).__name__}, which raised {type(error).__name__}: {error}"
        ) from error


def penalty_of(margin: Margin | None, norm: Tensor | None) -> Tensor | float:
    """What the margin adds to each row's loss, [N]; 0: nothing."""
    if not hasattr(margin, "penalty"):
        return 0.0
    penalty: Any = margin
    return penalty.penalty(norm)

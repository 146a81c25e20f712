"""A margin's numbers of each class: tensors [C] among them, of which a row takes its labels'."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor, nn

from fused_losses import margins
from fused_losses.base.validation import describe


def of_rows(margin: Any, classes: int, labels: Tensor) -> Any:
    """The margin of these rows: each tensor [C] in it, however deep, as one value a label.

    labels [B, L], negative: nothing there. The tensors keep their gradients, averages their
    buffers; a margin without such tensors is returned itself. Time and memory O(B L).
    """
    found: dict[str, Any] = {}
    for name, value in _numbers(margin).items():
        if isinstance(value, Tensor) and tuple(value.shape) == (classes,):
            at = labels.flatten().clamp_min(0).to(value.device)
            found[name] = value[at].to(labels.device)
        elif (
            not isinstance(value, Tensor)
            and (inner := of_rows(value, classes, labels)) is not value
        ):
            found[name] = inner
    if not found:
        return margin
    made = copy.copy(margin)
    if isinstance(made, nn.Module):  # names of the instance come before these
        made._parameters = {k: v for k, v in made._parameters.items() if k not in found}
        made._modules = {k: v for k, v in made._modules.items() if k not in found}
    vars(made).update(found)  # frozen values, too: they were checked when they were made
    return made


def check_numbers(margin: Any, classes: int) -> None:
    """ValueError for a tensor in a margin of this package that is neither one value nor [C]."""
    for name, value in _numbers(margin).items():
        if not isinstance(value, Tensor):
            check_numbers(value, classes)
            continue
        ours = type(margin).__module__ == margins.__name__
        if ours and value.numel() != 1 and tuple(value.shape) != (classes,):
            raise ValueError(
                f"margin.{name}: expected a number or one value a class, shape ({classes},), got "
                f"{describe(value)}"
            )


def _numbers(margin: Any) -> dict[str, Any]:
    """What a margin is made of, by name."""
    if isinstance(margin, nn.Module):
        return {**vars(margin), **margin._parameters, **margin._modules}
    fields = dataclasses.is_dataclass(margin) and not isinstance(margin, type)
    return dict(vars(margin)) if fields or _is_margin(margin) else {}


def _is_margin(value: Any) -> bool:
    """An object of someone's own that is called with cosines."""
    return callable(value) and hasattr(value, "__dict__") and not isinstance(value, type)

"""A margin's numbers of each class: tensors [C] among them, of which a row takes its labels'.

Over ranks each keeps those of its own classes; one that learns is whole on every rank, a parameter
alike on all of them, as DistributedDataParallel and a norm over parameters take it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fused_losses import margins
from fused_losses.base.validation import describe
from fused_losses.centers.collectives import Ranks


@dataclass(frozen=True)
class ShardNumbers:
    """This rank's part of a tensor [C]."""

    own: Tensor  # [c]
    first: int  # class of them
    ranks: Ranks

    def of(self, ids: Tensor) -> Tensor:
        """Of these classes, alike on every rank, each of which calls it. [n]"""
        place = (ids - self.first).to(self.own.device)
        here = (place >= 0) & (place < len(self.own))
        found = self.own.new_zeros(place.shape)
        found[here] = self.own[place[here]]
        found = found.to(ids.device)
        self.ranks.sum_(found)
        return found


def of_shard(margin: Any, classes: int, first: int, count: int, ranks: Ranks) -> Any:
    """The margin with this shard's part alone of each tensor [C] that does not learn."""

    def cut(value: Any) -> Any:
        if not _is_whole(value, classes) or value.requires_grad:
            return value
        return ShardNumbers(value[first : first + count].clone(), first, ranks)

    return margin if ranks.world == 1 else _changed(margin, cut)


def of_rows(margin: Any, classes: int, labels: Tensor) -> Any:
    """The margin of these rows: each tensor [C] in it, however deep, as one value a label.

    labels [B, L], negative: nothing there. The tensors keep their gradients, averages their
    buffers; a margin without such tensors is returned itself. Time and memory O(B L). Every rank
    must call it, with the labels of all.
    """
    ids = labels.flatten().clamp_min(0)

    def picked(value: Any) -> Any:
        if isinstance(value, ShardNumbers):
            return value.of(ids)
        return value[ids.to(value.device)].to(ids.device) if _is_whole(value, classes) else value

    return _changed(margin, picked)


def _is_whole(value: Any, classes: int) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == (classes,)


def _changed(margin: Any, change: Callable[[Any], Any]) -> Any:
    """The margin with each number in it, however deep, as `change` has it; itself where alike."""
    found: dict[str, Any] = {}
    for name, value in _numbers(margin).items():
        leaf = isinstance(value, Tensor | ShardNumbers)
        new = change(value) if leaf else _changed(value, change)
        if new is not value:
            found[name] = new
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
        if isinstance(value, ShardNumbers):
            continue
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

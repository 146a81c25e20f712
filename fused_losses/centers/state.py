"""What a head saves and loads: its table, its optimiser's states and its margin's averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.base.validation import describe
from fused_losses.centers.collectives import Ranks

BEGUN = "momentum_begun"  # whether a step with momentum has been, of the whole table


def named_tensors(
    weight: Tensor, states: dict[str, Tensor], margin: object, ranks: Ranks, num_classes: int
) -> dict[str, Tensor]:
    """ "weight", "optimizer.<name>" and "margin.<name>"; they share the memory of what is given."""
    tables = {"weight": weight.detach()}
    tables |= {f"optimizer.{name}": t for name, t in states.items()}
    kept = margin.state_dict() if isinstance(margin, nn.Module) else {}
    return {
        **{name: _over_ranks(t, ranks, num_classes) for name, t in tables.items()},
        **{f"margin.{name}": t for name, t in kept.items()},
    }


def _over_ranks(local: Tensor, ranks: Ranks, num_classes: int) -> Tensor:
    """A shard's rows as a part of the whole, a DTensor where there are ranks."""
    if ranks.group is None:
        return local
    # loading DTensor takes half as long as loading torch, and one process has no use for it
    from torch.distributed import tensor as distributed  # noqa: PLC0415

    shape = torch.Size((num_classes, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    mesh, rows = ranks.device_mesh(local.device), [distributed.Shard(0)]
    return distributed.DTensor.from_local(local, mesh, rows, shape=shape, stride=stride)


class TableState(dict[str, Tensor]):
    """What `named_tensors` gave; a checkpoint that has more of the optimiser's states adds them."""

    make: Callable[[str], Any] | None = None  # makes one of the optimiser's states
    named: Callable[[], dict[str, Tensor]] | None = None

    def expect(self, names: Iterable[str]) -> None:
        """Fits itself to a checkpoint that has these."""
        names = set(names)
        self.add(names)
        if BEGUN in self and BEGUN not in names:  # an older one, which does not say
            self.pop(BEGUN).zero_()

    def add(self, names: Iterable[str]) -> None:
        """Makes the states that others have beside these, such as a scheduled momentum's."""
        if self.make is None or self.named is None:
            return
        more = [name for name in names if name.startswith("optimizer.") and name not in self]
        for name in more:
            self.make(name.removeprefix("optimizer."))
        if more:
            self.update(self.named())


def read(
    extra: Tensor | dict[str, Any] | None, named: dict[str, Tensor]
) -> tuple[dict[str, Tensor], int, bool | None]:
    """The optimiser's states, the steps and whether momentum has begun; older ones do not say."""
    if isinstance(extra, dict):
        return extra["optimizer"], int(extra["steps"]), None
    if extra is None:
        return named, 0, None
    steps, *begun = extra.flatten().tolist()
    return named, steps, bool(begun[0]) if begun else None


def anothers(
    extra: Tensor | dict[str, Any] | None, ranks: Ranks, first: int, count: int
) -> str | None:
    """What a shard of so many classes says of another rank's, which may have this one's shape."""
    if not isinstance(extra, Tensor) or extra.numel() < 3:  # of earlier versions
        return None
    begins = int(extra.flatten()[2])
    if begins == first or count == 0:
        return None
    return (
        f"expected the shard of rank {ranks.rank} of {ranks.world}, classes {first} to "
        f"{first + count - 1}, got one that begins at class {begins}: a state dict that one rank "
        "writes has that rank's rows alone; Checkpoints saves head.state() of all"
    )


def misshapen(given: Tensor, table: Tensor, ranks: Ranks, num_classes: int) -> str:
    """What a table of another shape is told; one of other classes, how it goes over."""
    expected = tuple(table.shape)
    if given.shape[1:] != expected[1:] or given.dim() < 2:
        return f"expected shape {expected}, got {describe(given)}"
    classes, found = f"{expected[0]} classes", f"{given.shape[0]}"
    if ranks.world > 1:
        classes += f" (of {num_classes}, the shard of rank {ranks.rank})"
    return (
        f"expected shape {expected}, that is {classes}, got {describe(given)}, that is "
        f"{found}; rows go over to another number of classes by a head of that number, old, "
        "which loads them: ClassCenters(..., grow_from=old) or centers.carry_over(old, new); "
        "from files by Checkpoints.load(..., resize=True)"
    )

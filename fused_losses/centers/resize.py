"""Another number of classes: the rows in common go over from one head to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_losses.base.validation import describe
from fused_losses.centers.collectives import gather_rows, local_rows

if TYPE_CHECKING:
    from fused_losses.centers.table import TableModule

ROWS = 1 << 16  # that move at once


def carry_over(old: TableModule, new: TableModule, *, optimizer: bool = True) -> None:
    """Go on in `new` where `old` stands: its first rows, their optimiser's states, steps, margin.

    new: a head of the same process group, D and sub-centres, with more classes or fewer, other
    settings as one likes. Rows of classes that `old` does not have stay as `new` drew them (see
    `set_rows`), with states of 0. optimizer=False: the rows alone, as of an optimiser of another
    kind, whose steps start anew. Waiting backwards of both are lost.
    Every rank must call it. ValueError, before anything is written, for heads that do not fit.
    Time and traffic O(C D).
    """
    tables = {name: local_rows(t) for name, t in old.state().items()}
    if not optimizer:
        tables = {"weight": tables["weight"]}
    carry_tables(old, tables, new)


def carry_tables(old: TableModule, tables: Mapping[str, Tensor], new: TableModule) -> None:
    """`carry_over` of these tables, [c, ...] with the rows of old's classes, and plain tensors."""
    if old.ranks.group is not new.ranks.group:
        raise ValueError("new: expected a head over the ranks of the old one")
    there = new.state()
    try:
        there.add(tables)
    except ValueError as error:
        raise ValueError(f"new: expected the states of the old head; {error}") from None
    state = {name: local_rows(t) for name, t in there.items()}
    for name, table in tables.items():
        rows = is_table(name)
        skip = int(rows or table.shape == (old.num_classes,))  # of a margin's tensor [C], too
        if name not in state or state[name].shape[skip:] != table.shape[skip:]:
            expected = f"[..., {', '.join(map(str, table.shape[1:]))}]" if rows else describe(table)
            got = describe(state[name]) if name in state else f"none among {sorted(state)}"
            raise ValueError(f"new: expected {name} {expected} as the old head has, got {got}")
    starts = _starts(old)
    common = min(old.num_classes, new.num_classes)
    with torch.no_grad():
        for name, table in tables.items():
            if not is_table(name):
                both = slice(min(table.shape[0], state[name].shape[0])) if table.dim() else ...
                state[name][both].copy_(table[both])
                continue
            for rank, (begin, end) in enumerate(_spans(new)):
                for first in range(begin, min(end, common), ROWS):
                    last = min(first + ROWS, end, common)
                    rows = gather_rows(
                        table, starts, first, last, old.ranks.rank, rank, old.ranks.group
                    )
                    if rows is not None:
                        state[name][first - begin : last - begin].copy_(rows)
    new.load()


def set_rows(head: TableModule, rows: Tensor, first: int) -> None:
    """Classes first, first + 1, ... get these rows, [m, D] or [m, K, D], with states of 0.

    Class means for classes that are new, say; [m, D] goes to every centre of a class, and to a head
    with a bias (rows [m, D + 1]) with a bias of 0. Alike on
    every rank, each of which must call it. Waiting backwards are lost. IndexError, ValueError: bad
    arguments.
    """
    state = {name: local_rows(t) for name, t in head.state().items()}
    weight = state["weight"]
    if not 0 <= first <= head.num_classes - len(rows):
        raise IndexError(
            f"first: expected at least 0 and at most {head.num_classes - len(rows)}, of which on "
            f"{len(rows)} rows are classes, got {first}"
        )
    if head.has_bias and rows.dim() == 2 and rows.shape[1] == head.embedding_dim:
        rows = torch.nn.functional.pad(rows, (0, 1))
    if weight.dim() == 3 and rows.dim() == 2:
        rows = rows[:, None].expand(-1, weight.shape[1], -1)
    if rows.shape[1:] != weight.shape[1:]:
        raise ValueError(f"rows: expected [m, *{tuple(weight.shape[1:])}], got {describe(rows)}")
    begin = max(first, head.class_start)
    end = min(first + len(rows), head.class_start + head.num_local)
    if begin < end:
        own = slice(begin - head.class_start, end - head.class_start)
        with torch.no_grad():
            weight[own].copy_(rows[begin - first : end - first])
            for name, table in state.items():
                if name != "weight" and is_table(name):
                    table[own].zero_()
    head.load()


def is_table(name: str) -> bool:
    """Of what `ClassCenters.state()` names: whether it has a row a class."""
    return name == "weight" or name.startswith("optimizer.")


def _spans(head: TableModule) -> list[tuple[int, int]]:
    """[first, last) of every rank's classes."""
    return [head.ranks.shard(head.num_classes, rank) for rank in range(head.ranks.world)]


def _starts(head: TableModule) -> list[int]:
    return [*(begin for begin, _ in _spans(head)), head.num_classes]

"""A query's own columns of the gallery: lists of unlike length, as one padded tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.validation import check_integers

QueryLists = Tensor | Sequence[Any]  # [N, L] padded with -1, or N lists or tensors [L_i]


def check_lists(name: str, lists: QueryLists | None, n: int, m: int, like: Tensor) -> Tensor:
    """Columns in [0, m), -1 where a list has ended. [N, L] int64; None: no column at all."""
    if lists is None:
        return torch.zeros((n, 0), dtype=torch.int64, device=like.device)
    if isinstance(lists, Tensor):
        check_integers(name, lists, (n, None), like)
        told = lists.long()
    elif isinstance(lists, list | tuple):
        if len(lists) != n:
            raise ValueError(f"{name}: expected a list for each of {n} queries, got {len(lists)}")
        rows = [_row(f"{name}[{i}]", one, like) for i, one in enumerate(lists)]
        wide = max((len(row) for row in rows), default=0)
        told = torch.full((n, wide), -1, dtype=torch.int64, device=like.device)
        for i, row in enumerate(rows):
            told[i, : len(row)] = row
    else:
        raise TypeError(
            f"{name}: expected integers [N, L] or a list of N lists, got {type(lists).__name__}"
        )
    if told.numel() and (int(told.min()) < -1 or int(told.max()) >= m):
        raise IndexError(
            f"{name}: expected columns in [0, {m}), or -1 for none, got values from "
            f"{int(told.min())} to {int(told.max())}"
        )
    return told


def _row(name: str, one: Any, like: Tensor) -> Tensor:
    if not isinstance(one, Tensor):
        try:
            one = torch.as_tensor(one, device=like.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: expected integers, got {one!r}") from None
        if not one.numel():
            one = one.long()
    check_integers(name, one, (None,), like)
    return one.long()


def check_once(names: str, columns: Tensor) -> None:
    """No column stands twice in a query's list. columns: [N, L], -1: none."""
    ordered = columns.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        query, at = twice.nonzero()[0].tolist()
        raise ValueError(
            f"{names}: expected each column at most once for a query, got column "
            f"{int(ordered[query, at])} twice for query {query}"
        )

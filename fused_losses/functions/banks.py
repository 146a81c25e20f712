"""Further columns: banks with what is known of their rows, and negatives of a row's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.integers import dense_together
from fused_losses.base.sides import Bank


def own_negatives(negatives: Tensor, query: Tensor) -> Tensor:
    """[N, K, D], checked."""
    n, d = query.shape
    if not isinstance(negatives, Tensor):
        raise TypeError(f"negatives: expected a tensor [N, K, D], got {type(negatives).__name__}")
    if negatives.dim() != 3 or negatives.shape[0] != n or negatives.shape[2] != d:
        raise ValueError(
            f"negatives: expected shape ({n}, K, {d}), got {validation.describe(negatives)}"
        )
    return validation.beside("query", query, "negatives", negatives)


def banks_of(
    queue: Tensor | Sequence[Tensor] | None,
    queue_labels: Tensor | Sequence[Tensor] | None,
    labels: Tensor | None,
) -> list[Bank]:
    """The banks with their labels."""
    if queue is None:
        if queue_labels is not None:
            raise ValueError("queue_labels: expected None without a queue, got labels")
        return []
    banks = [queue] if isinstance(queue, Tensor) else list(queue)
    if queue_labels is None:
        told: list[Tensor | None] = [None] * len(banks)
    else:
        if labels is None:
            raise ValueError("queue_labels: expected labels for the queries too, got labels=None")
        told = [queue_labels] if isinstance(queue_labels, Tensor) else list(queue_labels)
    if len(told) != len(banks):
        raise ValueError(
            f"queue_labels: expected one tensor a bank ({len(banks)}), got {len(told)}"
        )
    return list(zip(banks, told, strict=True))


def numbered(
    name: str,
    of_rows: Tensor | None,
    bank_name: str,
    given: Tensor | Sequence[Tensor] | None,
    banks: list[Bank],
    query: Tensor,
) -> list[tuple[Tensor | None, Tensor | None]]:
    """The rows' ids or groups and each bank's, as numbers that are equal where these are."""
    if given is None:
        return [(None, None)] * len(banks)
    told = [given] if isinstance(given, Tensor) else list(given)
    if of_rows is None:
        raise ValueError(f"{bank_name}: expected {name} for the queries too, got {name}=None")
    validation.check_integers(name, of_rows, (query.shape[0],), query)
    if len(told) != len(banks):
        raise ValueError(f"{bank_name}: expected one tensor a bank ({len(banks)}), got {len(told)}")
    out: list[tuple[Tensor | None, Tensor | None]] = []
    for of_bank, (bank, _) in zip(told, banks, strict=True):
        validation.check_integers(bank_name, of_bank, (bank.shape[0],), query)
        x, y = dense_together(of_rows, of_bank)
        out.append((x, y))
    return out

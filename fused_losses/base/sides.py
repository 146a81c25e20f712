"""The front of a call over pairs of rows: its sides, checked, of one dtype and numbered, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base.compiled import offered
from fused_losses.base.indices import ListedPairs, miner_pairs
from fused_losses.base.integers import count_up, dense_together
from fused_losses.base.memory_budget import MemoryBudget, Room, budget_of, room_of
from fused_losses.base.validation import (
    PRECISIONS,
    REDUCTIONS,
    check_both,
    check_choice,
    check_class_ids,
    check_columns,
    check_diagonal,
    check_integer_pair,
    check_integers,
    check_rows,
    check_same_dtype,
    in_one_dtype,
)

Both = tuple[Tensor | None, Tensor | None]  # the rows' integers and the columns'
Bank = tuple[Tensor, Tensor | None]  # further columns [Q, D] and their labels [Q]

NEITHER: Both = (None, None)


def same_rows(x: Tensor, y: Tensor | None) -> bool:
    """Whether y is x once more: no y, the same tensor, or a view of the same memory.

    Then a batch meets itself, and no row meets itself. Compiled code and `torch.func`, whose
    tensors have no memory, know the same tensor alone.
    """
    if y is None or y is x:
        return True
    if torch.compiler.is_compiling() or not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return False
    if (x.dtype, x.device, x.shape, x.stride()) != (y.dtype, y.device, y.shape, y.stride()):
        return False
    try:
        one, other = x.untyped_storage(), y.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return one._cdata == other._cdata and x.storage_offset() == y.storage_offset()


def both_of(of_x: Tensor | None, of_y: Tensor | None) -> Both:
    """The rows' and the columns', which have the rows' where theirs are not given."""
    return NEITHER if of_x is of_y is None else (of_x, of_x if of_y is None else of_y)


class Integers(NamedTuple):
    """What is known of both sides, as int32 numbers that are equal where the given ones are.

    Its fields are fields of `PairInputs` too.
    """

    x_labels: Tensor | None = None  # [N]
    y_labels: Tensor | None = None  # [M]
    x_ids: Tensor | None = None  # [N]
    y_ids: Tensor | None = None  # [M]
    x_groups: Tensor | None = None  # [N]
    y_groups: Tensor | None = None  # [M]
    exclude: Tensor | None = None  # [N, E] columns, -1: none


_NOTHING = Integers()


def integers(
    rows: Tensor,  # [N, D]
    columns: Tensor,  # [M, D]
    prefixes: tuple[str, str],
    *,
    alone: bool = False,
    labels: Both = NEITHER,
    ids: Both = NEITHER,
    groups: Both = NEITHER,
    exclude: Tensor | None = None,
    labelled: bool = False,
) -> Integers:
    """Each kind of both sides or of neither, checked and numbered; one tensor twice stays one.

    prefixes: of the arguments' names in errors. alone: the columns have the rows' integers where
    theirs are not given. labelled: labels must be there.
    """
    (a, b), (c, d), (e, f) = labels, ids, groups
    if a is b is c is d is e is f is exclude is None and not labelled:
        return _NOTHING  # most calls
    numbers: list[Tensor | None] = []
    for kind, given in (("labels", labels), ("ids", ids), ("groups", groups)):
        if given[0] is None and given[1] is None and not (labelled and kind == "labels"):
            numbers += NEITHER
            continue
        of_x, of_y = (given[0], given[0]) if alone and given[1] is None else given
        x_name, y_name = (f"{prefix}{kind}" for prefix in prefixes)
        if labelled and kind == "labels":
            check_integers(x_name, of_x, (rows.shape[0],), rows)
            check_integers(y_name, of_y, (columns.shape[0],), rows)
        else:
            sizes = rows.shape[0], columns.shape[0]
            check_integer_pair(x_name, of_x, y_name, of_y, sizes, rows)
        once = of_x is None or same_rows(of_x, of_y)
        numbers += dense_together(of_x) * 2 if once else dense_together(of_x, of_y)
    if exclude is not None:
        check_integers("exclude", exclude, (rows.shape[0], None), rows)
        exclude = check_columns("exclude", exclude, columns.shape[0])
    return Integers(*numbers)._replace(exclude=exclude)


class Sides(NamedTuple):
    """Rows and columns of one call, and what is known of them."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D], x itself where there is one tensor
    alone: bool  # the batch meets itself (`same_rows`): pairs i == j are left out
    numbers: Integers
    banks: Sequence[Bank] = ()
    listed: ListedPairs | None = None  # a miner's pairs: no others take part
    room: Room | None = None  # for scores that sweeps keep

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """Of a call that has them, numbered: [N] and [M]."""
        x_labels, y_labels = self.numbers[:2]
        assert x_labels is not None and y_labels is not None
        return x_labels, y_labels

    @property
    def other(self) -> Tensor | None:
        """The second set of rows, None where it is the first."""
        return None if self.y is self.x else self.y

    @property
    def mirrored(self) -> bool:
        """Whether half of the pairs tell all: one tensor, whose rows have one label each."""
        return self.alone and self.y is self.x and self.labels[0] is self.labels[1]


def sides(
    x: Tensor,
    y: Tensor | None,
    precision: str,
    *,
    alone: bool = False,
    names: tuple[str, str] = ("embeddings", "ref_embeddings"),
    prefixes: tuple[str, str] = ("", "ref_"),
    offset: int | None = None,
    banks: Sequence[Bank] = (),
    labels: Both = NEITHER,
    memory_budget: MemoryBudget = 0,
    **known: Any,
) -> Sides:
    """Raises ValueError, TypeError that name the argument; known: as in `integers`.

    alone: the batch meets itself, y has its memory. offset: without labels, column offset + i is
    row i's positive. banks: of a call whose banks are its `queue`; their labels are numbered with
    the rest.
    """
    given = x  # autocast may change it
    compiled = None if alone else offered()
    if compiled is not None and not compiled.rows_meet(x, y):
        compiled = None
    if alone:
        check_rows(names[0], x, precision)
    elif compiled is None or precision not in PRECISIONS:
        x = check_both(names[0], x, names[1], y, precision)
    columns = x if y is None or (alone and y is given) else y
    numbers = integers(x, columns, prefixes, alone=alone, labels=labels, **known)
    if labels[0] is None and offset is not None:
        n, m = x.shape[0], columns.shape[0]
        check_diagonal(names[1], columns, n, offset)
        of_y = count_up(m, x) if compiled is None else compiled.counted_up(m, 0)
        # of sizes that are symbols it is not asked
        one = not torch.compiler.is_compiling() and n == m
        of_x = of_y if one else count_up(n, x, offset)
        numbers = Integers(of_x, of_y, *numbers[2:])
    for bank, told in banks:
        check_both(names[0], x, "queue", bank, precision, rows="Q")
        check_same_dtype(names[0], x, "queue", *in_one_dtype(x, bank))
        if told is not None:
            check_integers("queue_labels", told, (bank.shape[0],), x)
    if banks and any(told is not None for _, told in banks):
        of_x, of_y, *told = dense_together(*labels, *(told for _, told in banks))
        numbers = numbers._replace(x_labels=of_x, y_labels=of_y)
        banks = [(bank, of_bank) for (bank, _), of_bank in zip(banks, told, strict=True)]
    banks = [(in_one_dtype(x, bank)[0], told) for bank, told in banks] if banks else ()
    return Sides(x, columns, alone, numbers, banks, room=room_of(memory_budget, x))


def ref_sides(
    embeddings: Tensor,
    labels: Tensor | None,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    precision: str,
    ids: Both = NEITHER,
    memory_budget: MemoryBudget = 0,
) -> Sides:
    """A batch [N, D] with labels [N] against a second, whose labels and ids may be the batch's own.

    Where there is no second, or it has the batch's memory, the batch meets itself.
    """
    alone = same_rows(embeddings, ref_embeddings)
    if ref_embeddings is None and ref_labels is not None:
        raise _alone("ref_embeddings", "ref_labels")
    if ref_labels is None and not alone:
        raise _alone("ref_labels", "ref_embeddings")
    return sides(
        embeddings,
        ref_embeddings,
        precision,
        alone=alone,
        labels=(labels, ref_labels),
        ids=ids,
        labelled=True,
        memory_budget=memory_budget,
    )


def _alone(missing: str, given: str) -> ValueError:
    return ValueError(f"{missing}: expected a tensor beside {given}, got None")


def batch_sides(
    embeddings: Tensor,
    labels: Tensor | None,
    reduction: str,
    precision: str,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices: Any = None,
    *,
    weighted: bool = False,
    memory_budget: MemoryBudget = 0,
) -> Sides:
    """A batch [N, D] with labels [N], alone or against a second; the same rows are no second.

    indices: of a miner (`base.indices`); no label is then asked for. weighted: of a loss that
    weighs pairs.
    """
    if indices is not None:
        others = ref_embeddings, ref_labels
        both = _listed_sides(embeddings, labels, precision, *others, indices, weighted)
        budget_of(memory_budget, embeddings)  # the sum over a list keeps nothing
    else:
        if ref_embeddings is not None and ref_labels is None:
            raise _alone("ref_labels", "ref_embeddings")
        refs = ref_embeddings, ref_labels, precision
        both = ref_sides(embeddings, labels, *refs, memory_budget=memory_budget)
    check_choice("reduction", reduction, REDUCTIONS)
    return both


def _listed_sides(
    embeddings: Tensor,
    labels: Tensor | None,
    precision: str,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    indices: Any,
    weighted: bool,
) -> Sides:
    """The rows of listed pairs; labels that are given fit, and are not read."""
    if ref_embeddings is None and ref_labels is not None:
        raise _alone("ref_embeddings", "ref_labels")
    alone = same_rows(embeddings, ref_embeddings)
    both = sides(embeddings, ref_embeddings, precision, alone=alone)
    for name, told, rows in (("labels", labels, both.x), ("ref_labels", ref_labels, both.y)):
        if told is not None:
            check_integers(name, told, (rows.shape[0],), embeddings)
    sizes = both.x.shape[0], both.y.shape[0]
    listed = miner_pairs(indices, *sizes, both.x, weighted=weighted)
    return both._replace(listed=listed)


def class_sides(
    embeddings: Tensor,
    name: str,
    weight: Tensor,
    labels: Tensor,
    reduction: str,
    precision: str,
    memory_budget: MemoryBudget = 0,
) -> Sides:
    """A batch [N, D] with labels [N] in [0, C) against a row a class [C, D]."""
    embeddings = check_both("embeddings", embeddings, name, weight, precision, rows="C")
    check_integers("labels", labels, (embeddings.shape[0],), embeddings)
    check_choice("reduction", reduction, REDUCTIONS)
    check_class_ids("labels", labels, weight.shape[0])
    classes = count_up(weight.shape[0], embeddings)
    numbers = Integers(labels.int(), classes)
    room = room_of(memory_budget, embeddings)
    return Sides(embeddings, weight, False, numbers, room=room)

"""InfoNCE's sums where more than labels says what a pair counts for: a guide, a rank, weights.

Each is a rule over whole rows of products (`primitives/row_rules/joint.py`), over all columns at
once: keys, then the banks' rows. Rows come in the accumulation dtype: nothing is won by rounding
before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, row_dtype
from fused_losses.base.sides import Sides
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_device, check_plain, describe
from fused_losses.functions.pair_sums import PairSums
from fused_losses.primitives.row_rules.inputs import RowInputs
from fused_losses.primitives.row_rules.op import row_losses

STRATEGIES = ("absolute", "relative")


class ChosenPairs(NamedTuple):
    """A rule, and what it knows of each row and column beside the scores."""

    rule: str
    params: tuple[float, ...] = ()
    x_second: Tensor | None = None  # [N, E]
    y_second: Tensor | None = None  # [M, E] of the keys
    further: tuple[Tensor, ...] = ()  # [Q, E] of each bank


def beside_rows(
    name: str, rows: object, count: int, width: int | None, like: Tensor, letter: str = "E"
) -> Tensor:
    """Rows [count, width] of a second product, widened; what would be narrowed is refused."""
    wanted = f"[{count}, {letter if width is None else width}]"
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name}: expected a tensor {wanted}, got {type(rows).__name__}")
    validation.check_matrix(name, rows, f"[N, {letter}]")
    check_device("the embeddings", like, name, rows)
    if rows.shape[0] != count or (width is not None and rows.shape[1] != width):
        raise ValueError(f"{name}: expected shape {wanted}, got {describe(rows)}")
    dtype = accumulate_dtype(like.dtype)
    if torch.promote_types(rows.dtype, dtype) != dtype:
        raise TypeError(f"{name}: expected at most {dtype}, got {describe(rows)}")
    return rows.to(dtype)


def by_guide(
    named: Sequence[tuple[str, object, int]],  # of rows, of columns, of each bank
    margin: float,
    strategy: str,
    like: Tensor,
    names: tuple[str, str] = ("guide_margin", "guide_strategy"),
) -> ChosenPairs:
    """Negatives that a guide finds no nearer than the row's best positive, less a margin."""
    check_plain(**{names[0]: margin})
    validation.check_choice(names[1], strategy, STRATEGIES)
    validation.check_number(names[0], margin)
    found: list[Tensor] = []
    for name, rows, count in named:
        width = found[0].shape[1] if found else None
        found.append(beside_rows(name, rows, count, width, like, "G"))
    params = (margin, 0.0) if strategy == "absolute" else (0.0, margin)
    return ChosenPairs("guided", params, found[0], found[1], tuple(found[2:]))


def by_share(share: float) -> ChosenPairs:
    """The hardest share of a row's negatives, by rank."""
    check_plain(share=share)
    validation.check_number("share", share)
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a value in (0, 1], got {share}")
    return ChosenPairs("hardest", (share,))


def by_weight(weights: object, both: Sides) -> ChosenPairs:
    """A pair is w = <u_i, v_j> of a positive and the rest of a negative; a bank's is a negative."""
    name = "positive_weight"
    if not isinstance(weights, tuple | list) or len(weights) != 2:
        got = describe(weights) if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{name}: expected two tensors ([N, E], [M, E]), got {got}")
    u = beside_rows(f"{name}[0]", weights[0], both.x.shape[0], None, both.x)
    v = beside_rows(f"{name}[1]", weights[1], both.y.shape[0], u.shape[1], both.x)
    banks = tuple(v.new_zeros(bank.shape[0], v.shape[1]) for bank, _ in both.banks)
    return ChosenPairs("weighted", (), u, v, banks)


def refuse_beside(choice: str, why: str, **given: object) -> None:
    """What a choice cannot be given with."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}: expected none beside {choice}, {why}")


def chosen_sums(given: RowInputs, scale: Tensor, backend: str | None) -> tuple[PairSums, Tensor]:
    """A row's sums by a rule whose first value is the scale; and all statistics of the rule."""
    of_row = scale.to(row_dtype(given.x.device)).expand(given.x.shape[0], 1).contiguous()
    values = of_row if given.values is None else torch.cat([of_row, given.values], dim=1)
    found = row_losses(given._replace(values=values), backend=backend)
    return PairSums.of(found), found


def chosen_ways(
    both: Sides,
    choice: ChosenPairs,
    scale: Tensor,
    symmetric: bool,
    own: Tensor | None,  # [N] z of each row's own key, which stands apart from the columns
    *,
    normalize: bool,
    precision: str,
    backend: str | None,
) -> tuple[PairSums, PairSums | None]:
    """The sums of the queries over keys and banks, and with symmetric those of the keys."""
    dtype = accumulate_dtype(both.x.dtype)
    x, y, *banks = (t.to(dtype) for t in (both.x, both.y, *(bank for bank, _ in both.banks)))
    seconds = [t for t in (choice.x_second, choice.y_second, *choice.further) if t is not None]
    if normalize:
        x, y, *banks = (unit(t) for t in (x, y, *banks))
        if choice.rule == "guided":
            seconds = [unit(t) for t in seconds]
    if choice.rule == "weighted":
        x_labels, y_labels = (t.new_zeros(t.shape[0], dtype=torch.int32) for t in (x, y))
    else:
        x_labels, y_labels = both.labels
    x_second, y_second, *further = seconds or (None, None)
    given = RowInputs(
        x.contiguous(), y.contiguous(), x_labels, y_labels, rule=choice.rule,
        params=choice.params, score="dot", precision=precision,
        x_second=x_second, y_second=y_second,
    )  # fmt: skip
    columns = None
    if symmetric:
        turned = given._replace(
            x=given.y, y=given.x, x_labels=y_labels, y_labels=x_labels,
            x_second=y_second, y_second=x_second,
        )  # fmt: skip
        columns, _ = chosen_sums(turned, scale, backend)
    told = [
        torch.full((bank.shape[0],), -1, dtype=torch.int32, device=x.device)
        if of_bank is None
        else of_bank
        for bank, of_bank in both.banks
    ]
    if choice.rule == "weighted":
        told = [torch.zeros_like(t) for t in told]
    if own is None:
        if banks:
            given = given._replace(
                y=torch.cat([given.y, *banks]), y_labels=torch.cat([y_labels, *told])
            )
            if y_second is not None:
                given = given._replace(y_second=torch.cat([y_second, *further]))
        return chosen_sums(given, scale, backend)[0], columns
    nothing = torch.full_like(own, -torch.inf)
    rows = PairSums(torch.stack([own, nothing]), None, torch.zeros_like(own))
    if not banks:
        return rows, None
    if choice.rule == "guided":
        # the sweep's own, so that no rounding parts a copy of the key from it
        bound = chosen_sums(given, scale, backend)[1][:, 4:].detach()
        given = given._replace(values=bound, y_second=torch.cat(further))
    given = given._replace(y=torch.cat(banks), y_labels=torch.cat(told))
    return rows.joined(chosen_sums(given, scale, backend)[0]), None

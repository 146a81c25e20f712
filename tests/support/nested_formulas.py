"""A formula of the first coordinates, at each width: one after another, nothing shared."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from nce_formulas import decoupled_nce, groups_nce
from pair_formulas import (
    diagonal_nce,
    exclude_nce,
    gathered_nce,
    ids_nce,
    labelled_ids_nce,
    labelled_nce,
    learned_nce,
)
from pair_rows import Inputs, eye, lse, nce_rows, proxies, towers, unit
from torch import Tensor

Formula = Callable[[Inputs], Tensor]


def widths(d: int) -> list[int]:
    """The examples' own."""
    return [d] if d == 1 else [d, (d + 1) // 2]


def nested(formula: Formula, normalize: bool = False) -> Formula:
    """[W]; normalize: each width's rows are divided by norms of their own first."""

    def at_widths(t: Inputs) -> Tensor:
        found = []
        for w in widths(t.x.shape[1]):
            sides = {k: v[:, :w] for k, v in vars(t).items() if k in ("x", "y", "w")}
            sides = {k: unit(v) if normalize else v for k, v in sides.items()}
            found.append(formula(Inputs(**{**vars(t), **sides})))
        return torch.stack(found)

    return at_widths


def rows_nce(t: Inputs) -> Tensor:
    own = eye(len(t.x), len(t.y))
    return nce_rows(t.x @ t.y.T / 0.2, own, ~own)[0]


def softmax(t: Inputs, scale: float | Tensor, margin: float = 0.0) -> Tensor:
    """Cross entropy a row, the target's cosine less a margin. [N]"""
    own = t.targets[:, None] == torch.arange(len(t.w))
    z = scale * (t.x @ t.w.T - margin * own.to(t.x.dtype))
    positive, negative = lse(z, own), lse(z, ~own)
    some = negative > -torch.inf
    above = torch.where(some, negative, 0) - positive
    return torch.where(some, F.softplus(above, threshold=600), 0)


def some_rows(t: Inputs) -> Tensor:
    """Those of class 1 are ignored."""
    return torch.where(t.targets == 1, 0, softmax(t, 4.0, 0.35))


def counts(t: Inputs) -> Tensor:
    """What a row counts for: its class modulo 3."""
    return (t.targets % 3).to(t.x.dtype)


def weighted_rows(t: Inputs) -> Tensor:
    weight = counts(t)
    loss = torch.where(weight > 0, softmax(t, 4.0), 0)
    return (loss * weight).sum() / weight.sum().clamp_min(1)


# by the example: the inputs, the formula, and what has a gradient
NCE, OF_CLASSES = "nested_info_nce", "nested_margin_softmax"
BOTH, CENTERS = ("x", "y"), ("x", "w")
Row = tuple[Callable[[int, int, int], Inputs], Formula, tuple[str, ...]]
NESTED: dict[str, Row] = {
    f"{NCE}": (towers, nested(diagonal_nce), BOTH),
    f"{NCE}, normalized": (towers, nested(lambda t: diagonal_nce(t, True), True), BOTH),
    f"{NCE}, gathered": (towers, nested(gathered_nce), BOTH),
    f"{NCE}, labels, symmetric": (towers, nested(lambda t: labelled_nce(t, True)), BOTH),
    f"{NCE}, ids": (towers, nested(ids_nce), BOTH),
    f"{NCE}, labels, ids": (towers, nested(labelled_ids_nce), BOTH),
    f"{NCE}, exclude": (towers, nested(exclude_nce), BOTH),
    f"{NCE}, groups": (towers, nested(groups_nce), BOTH),
    f"{NCE}, decoupled": (towers, nested(decoupled_nce), BOTH),
    f"{NCE}, rows": (towers, nested(rows_nce), BOTH),
    f"{NCE}, learned temperature": (towers, nested(learned_nce), (*BOTH, "temperature")),
    f"{OF_CLASSES}": (proxies, nested(lambda t: softmax(t, 16.0, 0.35).mean(), True), CENTERS),
    f"{OF_CLASSES}, products": (proxies, nested(lambda t: softmax(t, 1.0).sum()), CENTERS),
    f"{OF_CLASSES}, some rows": (proxies, nested(some_rows, True), CENTERS),
    f"{OF_CLASSES}, learned scale": (
        proxies,
        nested(lambda t: softmax(t, t.scale).mean(), True),
        (*CENTERS, "scale"),
    ),
}

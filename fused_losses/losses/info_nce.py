"""InfoNCE over in-batch keys, banks and hard negatives: each a segment of one row's sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import JUMPS, examples
from fused_losses.base.numerics import (
    accumulate_dtype,
    merged,
    no_autocast,
    over_last,
    reduced,
    softplus,
)
from fused_losses.base.sides import Bank, sides
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_at_least, number
from fused_losses.losses.scored_pairs import scored
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, PairInputs, Rule
from fused_losses.primitives.pairs.op import PairStatistics, pair_statistics


def info_nce(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    *,
    temperature: float | Tensor = 0.07,
    labels: Tensor | None = None,  # [N]
    key_labels: Tensor | None = None,  # [M]
    offset: int = 0,
    symmetric: bool = False,
    negatives: Tensor | None = None,  # [N, K, D]
    queue: Tensor | Sequence[Tensor] | None = None,  # [Q, D]
    queue_labels: Tensor | Sequence[Tensor] | None = None,  # [Q]
    hardness: float = 0.0,
    false_negative_margin: float | None = None,
    ids: Tensor | None = None,  # [N]
    key_ids: Tensor | None = None,  # [M]
    exclude: Tensor | None = None,  # [N, E]
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """InfoNCE (CLIP, MoCo, N-pairs) over every pair of a query and a key, never held at once.

        z_ij = <q_i, k_j> / temperature
        loss_i = log(sum_P e^z + sum_N e^z) - log sum_P e^z

    Args:
        query, key: [N, D] and [M, D], float32, bfloat16, float16 or float64; may be one tensor.
        temperature: > 0; a float or a scalar tensor, which may need a gradient.
        labels, key_labels: integers; equal labels are positives, several of which form one sum
            (the "in" form). Without key_labels the keys have the queries' labels. None: key
            offset + i is the positive of query i.
        offset: where this rank's queries stand among gathered keys (no labels).
        symmetric: the mean of this loss and of the one with rows and columns exchanged (CLIP),
            from one sweep. `negatives` and `queue` stand in the rows' denominators alone.
        negatives: [N, K, D], further negatives of each query; O(N K D) work and memory.
        queue: one or more banks [Q, D] of further keys (MoCo, XBM), swept where they lie, without
            concatenation; negatives, or with queue_labels what the labels say.
        hardness: beta >= 0 of Robinson et al.: the negatives' sum becomes
            count * sum_N e^((1 + beta) z) / sum_N e^(beta z). Twice the work.
        false_negative_margin: a negative with s_ij > s_i + margin is left out, s = <q, k> and s_i
            that of the row's (column's) best positive; not differentiated.
        ids, key_ids: integers; pairs with equal ids are left out, but for the positive on the
            diagonal where there are no labels. Without key_ids the keys have the queries' ids.
        exclude: [N, E] columns left out of each row, -1 for none.
        normalize: divide rows by their norms (in float32, rounded to the inputs' dtype).
        reduction: "mean" over the rows with a positive, "sum", or "none" [N]; symmetric: half the
            rows' and half the columns' (column offset + i for row i).

    A row without positives has loss 0 and is not in the mean; one without negatives has loss 0.
    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N M D); memory O((N + M) D). Papers: van den Oord et al., 2018; Radford et al., 2021; He
    et al., 2020 (queue); Robinson et al., 2021 (hardness); Khosla et al., 2020 ("in").
    """
    both = sides(
        query,
        key,
        precision,
        names=("query", "key"),
        prefixes=("", "key_"),
        labels=(labels, labels if key_labels is None else key_labels),
        ids=(ids, ids if key_ids is None else key_ids),
        exclude=exclude,
        offset=offset,
        banks=_banks(queue, queue_labels, labels),
    )
    query, (n, m) = both.x, (query.shape[0], key.shape[0])
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    scale = 1 / number("temperature", temperature, query)
    check_at_least("hardness", hardness, 0.0)
    if symmetric and reduction == "none" and labels is not None and n != m:
        raise ValueError(
            f"reduction: expected 'mean' or 'sum' for symmetric=True with labels and N={n} != "
            f"M={m}, got 'none'"
        )
    if negatives is not None:
        _check_negatives(negatives, query)

    with no_autocast(query.device):
        inputs = scored(query, key, scale, normalize=normalize, precision=precision)
        inputs = inputs._replace(**both.numbers._asdict())
        # the sweep leaves equal ids out, so the diagonal is put back beside it
        diagonal = None
        if labels is None and (ids is not None or false_negative_margin is not None):
            diagonal = _diagonal(inputs, offset)
        if false_negative_margin is not None:
            inputs = _with_windows(
                inputs, diagonal, offset, false_negative_margin, symmetric, backend
            )
        rows, columns = _both_ways(inputs, hardness, symmetric, backend)
        if diagonal is not None and ids is not None:
            rows = rows._replace(positive=diagonal)
            if columns is not None:
                columns = columns._replace(positive=_on_columns(diagonal, offset, m))
        for bank, bank_number in both.banks:
            bank = unit(bank) if normalize else bank
            further = inputs._replace(
                y=bank.contiguous(),
                x_labels=None if bank_number is None else inputs.x_labels,
                y_labels=bank_number,
                x_ids=None,
                y_ids=None,
                exclude=None,
                y_window=None,
            )
            rows = rows.joined(_both_ways(further, hardness, False, backend)[0])
        if negatives is not None and negatives.shape[1] > 0:
            negatives = unit(negatives) if normalize else negatives
            rows = rows.joined(_own_negatives(inputs, negatives, hardness))

        loss, counted = rows.loss()
        dtype = accumulate_dtype(query.dtype)
        out = reduced(loss, counted, reduction, dtype)
        if columns is None:
            return out
        loss, counted = columns.loss()
        if reduction == "none" and labels is None:
            loss, counted = loss[offset : offset + n], counted[offset : offset + n]
        return (out + reduced(loss, counted, reduction, dtype)) / 2


class _Sums(NamedTuple):
    """What InfoNCE knows of each row (or column), whatever segments its columns came in."""

    positive: Tensor  # [N] lse of the positives' z
    negative: Tensor  # of the negatives' z, with hardness of (1 + beta) z
    tilt: Tensor | None  # with hardness: of beta z
    count: Tensor  # negatives

    def joined(self, other: _Sums) -> _Sums:
        return _Sums(
            merged(self.positive, other.positive),
            merged(self.negative, other.negative),
            None if self.tilt is None or other.tilt is None else merged(self.tilt, other.tilt),
            self.count + other.count,
        )

    def loss(self) -> tuple[Tensor, Tensor]:
        """The loss [N], and which rows have a positive."""
        negative, any_negative = self.negative, self.count > 0
        if self.tilt is not None:
            negative = torch.where(any_negative, self.count, 1).log() + negative - self.tilt
        # `!=` and not `>`: a NaN must show
        counted = self.positive != -torch.inf
        both = counted & any_negative
        gap = torch.where(both, negative - self.positive, 0)
        return torch.where(both, softplus(gap), 0), counted


def _both_ways(
    inputs: PairInputs, hardness: float, cols: bool, backend: str | None
) -> tuple[_Sums, _Sums | None]:
    first = pair_statistics(
        inputs._replace(negative=Rule(1 + hardness)), cols=cols, backend=backend
    )
    second: tuple[PairStatistics | None, ...] = (None, None)
    if hardness:
        second = pair_statistics(
            inputs._replace(negative=Rule(hardness)), cols=cols, backend=backend
        )

    def sums(s: PairStatistics, t: PairStatistics | None) -> _Sums:
        tilt = None if t is None else t.value[NEGATIVE]
        return _Sums(s.value[POSITIVE], s.value[NEGATIVE], tilt, s.count[NEGATIVE])

    rows, columns = first
    return sums(rows, second[0]), None if columns is None else sums(columns, second[1])


def _own_negatives(inputs: PairInputs, negatives: Tensor, hardness: float) -> _Sums:
    """The side of negatives [N, K, D] that each row has to itself."""
    narrow = accumulate_dtype(inputs.x.dtype)
    product = torch.einsum("nd,nkd->nk", inputs.x.to(narrow), negatives.to(narrow))
    z = product.double() * inputs.scale
    kept = torch.ones_like(z, dtype=torch.bool)
    if inputs.x_window is not None:
        kept = ~(z >= inputs.x_window[3, :, None])
    tilt = over_last(hardness * z, kept) if hardness else None
    return _Sums(
        torch.full_like(z[:, 0], -torch.inf),
        over_last((1 + hardness) * z, kept),
        tilt,
        kept.sum(dim=1).double(),
    )


def _diagonal(inputs: PairInputs, offset: int) -> Tensor:
    """z of query i and key offset + i, [N]."""
    narrow = accumulate_dtype(inputs.x.dtype)
    x, y = inputs.x.to(narrow), inputs.y[offset : offset + inputs.x.shape[0]].to(narrow)
    return torch.einsum("nd,nd->n", x, y).double() * inputs.scale


def _on_columns(diagonal: Tensor, offset: int, m: int) -> Tensor:
    after = m - offset - diagonal.shape[0]
    return torch.nn.functional.pad(diagonal, (offset, after), value=-torch.inf)


@torch.no_grad()
def _with_windows(
    inputs: PairInputs,
    diagonal: Tensor | None,
    offset: int,
    margin: float,
    symmetric: bool,
    backend: str | None,
) -> PairInputs:
    """Leaves out the negatives above the best positive of their row (column) plus the margin."""
    if diagonal is None:
        rows, columns = pair_statistics(inputs, cols=symmetric, backend=backend)
        of_rows = rows.best[POSITIVE]
        of_columns = None if columns is None else columns.best[POSITIVE]
    else:
        m = inputs.y.shape[0]
        of_rows, of_columns = diagonal, _on_columns(diagonal, offset, m) if symmetric else None

    def window(top: Tensor) -> Tensor:
        high = torch.where(top == -torch.inf, torch.inf, top + margin * inputs.scale)
        out = torch.full((4, top.shape[0]), torch.inf, dtype=high.dtype, device=high.device)
        out[0], out[2], out[3] = -torch.inf, -torch.inf, high
        return out.to(accumulate_dtype(inputs.x.dtype))

    return inputs._replace(
        x_window=window(of_rows), y_window=None if of_columns is None else window(of_columns)
    )


def _check_negatives(negatives: Tensor, query: Tensor) -> None:
    n, d = query.shape
    if not isinstance(negatives, Tensor):
        raise TypeError(f"negatives: expected a tensor [N, K, D], got {type(negatives).__name__}")
    if negatives.dim() != 3 or negatives.shape[0] != n or negatives.shape[2] != d:
        raise ValueError(
            f"negatives: expected shape ({n}, K, {d}), got {validation.describe(negatives)}"
        )
    validation.check_device("query", query, "negatives", negatives)
    validation.check_same_dtype("query", query, "negatives", negatives)


def _banks(
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


_labelled = lambda t: dict(labels=t.labels, key_labels=t.y_labels)


_with_ids = lambda t: dict(ids=t.ids, key_ids=t.y_ids)


_queue_and_more = lambda t: dict(queue=[t.first_bank, t.second_bank], negatives=t.negatives)


_labelled_queue = lambda t: dict(
    queue=[t.first_bank, t.second_bank], queue_labels=[t.first_labels, t.second_labels]
)


examples(
    info_nce,
    lambda f, t: f(t.x, t.y, temperature=0.2),
    {
        "": {},
        "symmetric": dict(symmetric=True),
        "gathered": lambda t: dict(offset=len(t.y) - len(t.x), symmetric=True),
        "labels": _labelled,
        "labels, symmetric": lambda t: dict(symmetric=True, **_labelled(t)),
        "banks and negatives": _queue_and_more,
        "labelled banks": lambda t: _labelled(t) | _labelled_queue(t),
        "hardness": dict(hardness=0.7, symmetric=True),
        "hardness, banks": lambda t: dict(hardness=0.7, **_queue_and_more(t)),
        "ids": lambda t: dict(symmetric=True, **_with_ids(t)),
        "labels, ids": lambda t: _labelled(t) | _with_ids(t),
        "exclude": lambda t: dict(exclude=t.exclude),
    },
)
examples(
    info_nce,
    lambda f, t: f(t.x, t.y, temperature=t.temperature, symmetric=True),
    {"warm": {}, "learned temperature": dict(normalize=True)},
)
examples(info_nce, lambda f, t: f(t.x, t.x, symmetric=True), {"one tensor": {}})
examples(
    info_nce,
    lambda f, t: f(t.x, t.y, temperature=0.2, false_negative_margin=0.1),
    {
        "false negatives": dict(symmetric=True),
        "false negatives, banks": _queue_and_more,
        "false negatives, labels": _labelled,
        "hard false negatives": lambda t: dict(hardness=0.5, negatives=t.negatives),
    },
    bound=JUMPS,
)

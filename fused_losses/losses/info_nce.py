"""InfoNCE over in-batch keys, banks and hard negatives: each a segment of one row's sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.integers import count_up
from fused_losses.base.numerics import (
    accumulate_dtype,
    merged,
    nan_where_infinite,
    no_autocast,
    over_last,
    reduced,
    softplus,
)
from fused_losses.base.products import product
from fused_losses.base.sides import Bank, sides
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_at_least, check_plain, number
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
    own_key: bool = False,
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
            from one sweep. `negatives` and `queue` stand in the rows' denominators alone. Not with
            an offset: global CLIP is the mean over ranks and over two calls,
            info_nce(query, all_keys, offset=o) and info_nce(key, all_queries, offset=o).
        own_key: MoCo: key offset + i is query i's positive and no other query's negative; the
            negatives are `queue` and `negatives` (no labels, ids, exclude nor symmetric).
        negatives: [N, K, D], further negatives of each query; O(N K D) work and memory.
        queue: one or more banks [Q, D] of further keys (MoCo, XBM), swept where they lie, without
            concatenation; negatives, or with queue_labels what the labels say.
        hardness: beta >= 0 of Robinson et al.: the negatives' sum becomes
            count * sum_N e^((1 + beta) z) / sum_N e^(beta z). Twice the work.
        false_negative_margin: a negative with s_ij > s_i + margin is left out, s = <q, k> and s_i
            that of the row's (column's) best positive, a bank's too; not differentiated.
        ids, key_ids: integers; pairs with equal ids are left out, but for the positive on the
            diagonal where there are no labels. Without key_ids the keys have the queries' ids.
            What `exclude` lists stays left out.
        exclude: [N, E] columns left out of each row, -1 for none.
        normalize: divide rows by their norms (in float32, rounded to the inputs' dtype).
        reduction: "mean" over the rows with a positive, "sum", or "none" [N]; symmetric: half the
            rows' and half the columns' (column i for row i).

    A row without positives has loss 0 and is not in the mean; one without negatives has loss 0.
    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N M D); memory O((N + M) D). Papers: van den Oord et al., 2018; Radford et al., 2021; He
    et al., 2020 (queue); Robinson et al., 2021 (hardness); Khosla et al., 2020 ("in").
    """
    check_plain(hardness=hardness, false_negative_margin=false_negative_margin)
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
    if symmetric and offset:
        raise ValueError(
            f"symmetric: expected False with offset={offset}: the columns' half would miss the "
            "other ranks' queries; take the mean of info_nce(query, all_keys, offset=offset) and "
            "info_nce(key, all_queries, offset=offset)"
        )
    if own_key:
        given = dict(labels=labels, ids=ids, exclude=exclude, symmetric=symmetric or None)
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: expected none with own_key=True, got one")
    if negatives is not None:
        negatives = _negatives(negatives, query)

    with no_autocast(query.device):
        inputs = scored(query, key, scale, normalize=normalize, precision=precision)
        inputs = inputs._replace(**both.numbers._asdict())
        further = [_against(bank, number_, inputs, normalize) for bank, number_ in both.banks]
        if own_key:
            rows, columns = _alone(_diagonal(inputs, offset), hardness), None
            if false_negative_margin is not None:
                best = rows.positive.detach()
                inputs = inputs._replace(x_window=_window(best, inputs, false_negative_margin))
        else:
            if false_negative_margin is not None:
                inputs = _with_windows(
                    inputs, further, labels is None, false_negative_margin, symmetric, backend
                )
            rows, columns = _both_ways(inputs, hardness, symmetric, backend)
        if labels is None and ids is not None:
            # the sweep leaves equal ids out, so the diagonal is put back beside it
            rows = rows._replace(positive=_diagonal(inputs, offset))
            if columns is not None:
                further_keys = (0, m - n)
                own = torch.nn.functional.pad(rows.positive, further_keys, value=-torch.inf)
                columns = columns._replace(positive=own)
        for bank in further:
            bank = bank._replace(x_window=inputs.x_window)
            rows = rows.joined(_both_ways(bank, hardness, False, backend)[0])
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
            loss, counted = loss[:n], counted[:n]
        return (out + reduced(loss, counted, reduction, dtype)) / 2


class _PairSums(NamedTuple):
    """What InfoNCE knows of each row (or column), whatever segments its columns came in."""

    positive: Tensor  # [N] lse of the positives' z
    negative: Tensor  # of the negatives' z, with hardness of (1 + beta) z
    tilt: Tensor | None  # with hardness: of beta z
    count: Tensor  # negatives

    def joined(self, other: _PairSums) -> _PairSums:
        return _PairSums(
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
        both = counted & (any_negative | self.positive.isnan())
        gap = torch.where(both, negative - self.positive, 0)
        return torch.where(both, softplus(gap), 0), counted


def _both_ways(
    inputs: PairInputs, hardness: float, cols: bool, backend: str | None
) -> tuple[_PairSums, _PairSums | None]:
    first = pair_statistics(
        inputs._replace(negative=Rule(1 + hardness)), cols=cols, backend=backend
    )
    second: tuple[PairStatistics | None, ...] = (None, None)
    if hardness:
        second = pair_statistics(
            inputs._replace(negative=Rule(hardness)), cols=cols, backend=backend
        )

    def sums(s: PairStatistics, t: PairStatistics | None) -> _PairSums:
        tilt = None if t is None else t.value[NEGATIVE]
        return _PairSums(s.value[POSITIVE], s.value[NEGATIVE], tilt, s.count[NEGATIVE])

    rows, columns = first
    return sums(rows, second[0]), None if columns is None else sums(columns, second[1])


def _own_negatives(inputs: PairInputs, negatives: Tensor, hardness: float) -> _PairSums:
    """The side of negatives [N, K, D] that each row has to itself."""
    narrow = accumulate_dtype(inputs.x.dtype)
    found = product(inputs.x.to(narrow)[:, None], negatives.to(narrow))[:, 0]
    bad = nan_where_infinite(inputs.x)[:, None] + nan_where_infinite(negatives)
    z = found.double() * inputs.scale + bad
    kept = torch.ones_like(z, dtype=torch.bool)
    if inputs.x_window is not None:
        kept = ~(z.to(narrow) >= inputs.x_window[3, :, None])
    tilt = over_last(hardness * z, kept) if hardness else None
    return _PairSums(
        torch.full_like(z[:, 0], -torch.inf),
        over_last((1 + hardness) * z, kept),
        tilt,
        kept.sum(dim=1).double(),
    )


def _diagonal(inputs: PairInputs, offset: int) -> Tensor:
    """z of query i and key offset + i, -inf where it is excluded. [N]"""
    n, narrow = inputs.x.shape[0], accumulate_dtype(inputs.x.dtype)
    x, y = inputs.x.to(narrow), inputs.y[offset : offset + n].to(narrow)
    z = product(x[:, None], y[:, None])[:, 0, 0].double() * inputs.scale
    z = z + nan_where_infinite(x) + nan_where_infinite(y)
    if inputs.exclude is None:
        return z
    out = (inputs.exclude == count_up(n, x, offset)[:, None]).any(dim=1)
    return torch.where(out, -torch.inf, z)


def _alone(positive: Tensor, hardness: float) -> _PairSums:
    """Positives without a negative."""
    nothing = torch.full_like(positive, -torch.inf)
    return _PairSums(positive, nothing, nothing if hardness else None, torch.zeros_like(positive))


def _against(
    bank: Tensor, bank_labels: Tensor | None, inputs: PairInputs, normalize: bool
) -> PairInputs:
    """The pairs of the queries and a bank."""
    return inputs._replace(
        y=(unit(bank) if normalize else bank).contiguous(),
        x_labels=None if bank_labels is None else inputs.x_labels,
        y_labels=bank_labels,
        x_ids=None,
        y_ids=None,
        exclude=None,
    )


@torch.no_grad()
def _with_windows(
    inputs: PairInputs,
    further: list[PairInputs],
    on_diagonal: bool,
    margin: float,
    symmetric: bool,
    backend: str | None,
) -> PairInputs:
    """Leaves out the negatives above the best positive of their row (column) plus the margin.

    The positives' scores are the sweep's own: another sum's rounding would part equal scores.
    """
    # ids leave no positive of the diagonal out
    seen = inputs._replace(x_ids=None, y_ids=None) if on_diagonal else inputs
    rows, columns = pair_statistics(seen, cols=symmetric, backend=backend)
    best = [rows.best[POSITIVE]]
    labelled = [bank for bank in further if bank.x_labels is not None]
    best += [pair_statistics(bank, backend=backend)[0].best[POSITIVE] for bank in labelled]
    return inputs._replace(
        x_window=_window(torch.stack(best).amax(dim=0), inputs, margin),
        y_window=None if columns is None else _window(columns.best[POSITIVE], inputs, margin),
    )


def _window(best: Tensor, inputs: PairInputs, margin: float) -> Tensor:
    """No negative above best + margin; a row without a positive keeps all. [4, N]"""
    narrow = accumulate_dtype(inputs.x.dtype)
    top = torch.where(best == -torch.inf, torch.inf, best + margin * inputs.scale).to(narrow)
    # a window leaves out its end, and equal to the limit is not above it
    high = top.nextafter(torch.full_like(top, torch.inf))
    endless = torch.full_like(top, torch.inf)
    return torch.stack([-endless, endless, -endless, high])


def _negatives(negatives: Tensor, query: Tensor) -> Tensor:
    """[N, K, D], checked."""
    n, d = query.shape
    if not isinstance(negatives, Tensor):
        raise TypeError(f"negatives: expected a tensor [N, K, D], got {type(negatives).__name__}")
    if negatives.dim() != 3 or negatives.shape[0] != n or negatives.shape[2] != d:
        raise ValueError(
            f"negatives: expected shape ({n}, K, {d}), got {validation.describe(negatives)}"
        )
    return validation.beside("query", query, "negatives", negatives)


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
        "gathered": lambda t: dict(offset=len(t.y) - len(t.x)),
        "labels": _labelled,
        "labels, symmetric": lambda t: dict(symmetric=True, **_labelled(t)),
        "banks and negatives": _queue_and_more,
        "own key": lambda t: dict(own_key=True, **_queue_and_more(t)),
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
)

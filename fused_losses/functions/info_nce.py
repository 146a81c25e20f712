"""InfoNCE over in-batch keys, banks and hard negatives: each a segment of one row's sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import PRECISIONS, examples, few
from fused_losses.base.memory_budget import MemoryBudget
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced
from fused_losses.base.scalars import inverse
from fused_losses.base.sides import NEITHER, both_of, sides
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_at_least, check_plain
from fused_losses.functions.banks import banks_of, numbered, own_negatives
from fused_losses.functions.chosen_pairs import chosen_ways
from fused_losses.functions.nce_options import (
    Targets,
    chosen_by,
    target_scores,
    told_targets,
    toward,
)
from fused_losses.functions.nce_sums import (
    against,
    alone,
    both_ways,
    diagonal,
    of_own_negatives,
    window,
    with_windows,
)
from fused_losses.functions.pair_sums import PairSums, reduced_shares
from fused_losses.functions.scored_pairs import scored


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
    guide: Tensor | None = None,  # [N, G]
    key_guide: Tensor | None = None,  # [M, G]
    queue_guide: Tensor | Sequence[Tensor] | None = None,  # [Q, G]
    guide_margin: float = 0.0,
    guide_strategy: str = "absolute",
    share: float | None = None,
    positive_weight: tuple[Tensor, Tensor] | None = None,  # [N, E], [M, E]
    targets: Targets | None = None,  # [P], [P], [P]
    ids: Tensor | None = None,  # [N]
    key_ids: Tensor | None = None,  # [M]
    queue_ids: Tensor | Sequence[Tensor] | None = None,  # [Q]
    groups: Tensor | None = None,  # [N]
    key_groups: Tensor | None = None,  # [M]
    queue_groups: Tensor | Sequence[Tensor] | None = None,  # [Q]
    exclude: Tensor | None = None,  # [N, E]
    decoupled: bool = False,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE (CLIP, MoCo, N-pairs) of rows as they are (`InfoNCELoss`: normalize=True).

    Over every pair of a query and a key, never held at once.

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
        guide, key_guide, queue_guide: rows of another model of the same inputs, g their products
            (with normalize cosines), no gradient: a negative counts where g is not above the row's
            own, the largest g of its positives, less guide_margin ("absolute") or less
            guide_margin |g| ("relative", guide_strategy). GISTEmbed.
        share: in (0, 1]: the hardest ceil(share n) of a row's n negatives, banks' too, count, by
            rank, of equal scores those of the lowest columns.
        positive_weight: (u, v), w_ij = <u_i, v_j> in [0, 1] without an [N, M]: a pair counts w_ij
            as a positive and 1 - w_ij as a negative, a bank's as a negative. Labels mixed by
            lambda: u = lambda onehot(a) + (1 - lambda) onehot(b), v = onehot(keys'); a weight of
            each two classes, W: u = W[labels], v = onehot(keys'). Differentiable (no labels).
        targets: (rows, columns, weight): soft targets, a cross entropy, loss_i = sum_t w_t (log
            sum_j e^z_ij - z_it) over the listed pairs t of row i, int64 rows and columns; others
            are negatives. The weight may need a gradient; what is listed twice counts twice.
        ids, key_ids: integers; pairs with equal ids are left out, but for the positive on the
            diagonal where there are no labels. Without key_ids the keys have the queries' ids.
            What `exclude` lists stays left out. queue_ids: one tensor a bank; with own_key, ids are
            of use with them alone.
        groups, key_groups, queue_groups: integers, as ids; pairs of different groups are left out,
            positives too (MCL: the anchors' clusters).
        exclude: [N, E] columns left out of each row, -1 for none.
        decoupled: the positives are not in their own denominator, log sum_N e^z - log sum_P e^z.
        normalize: divide rows by their norms (in float32, rounded to the inputs' dtype).
        memory_budget: at most so many bytes of scores the forward keeps to spare the backward their
            products, the keys' before the banks', or "auto": an eighth of the memory that is free
            on a CPU (docs/pairs.md). The "cpu" and "bounded" backends keep them, others none, and
            nothing with a guide, share or positive_weight. The results are the same bits.
        reduction: "mean" over the rows with a positive, "sum", or "none" [N]; symmetric: half the
            rows' and half the columns' (column i for row i).

    A row without positives has loss 0 and is not in the mean; one without negatives has loss 0.
    guide, share and positive_weight exclude one another and ids, groups, exclude, negatives,
    hardness, false_negative_margin; banks are then beside the keys in one copy, and second
    derivatives are of "reference" alone (else NotImplementedError).
    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. Time O(N M D), with a guide O(N M (D + G)), with share O(N M (D + log M)); memory
    O((N + M) D), plus memory_budget. Papers: van den Oord et al., 2018; Radford et al., 2021; He
    et al., 2020 (queue); Robinson et al., 2021 (hardness); Khosla et al., 2020 ("in");
    Zhang et al., Learning the Unlearned, 2024 (groups); Yeh et al., 2022 (decoupled);
    Solatorio, 2024 (guide); Wang and Liu, 2021 (share); Venkataramanan et al., 2022
    (positive_weight); Lee et al., i-Mix, 2021 (targets).
    """
    if not (type(hardness) is float and false_negative_margin is None):
        check_plain(hardness=hardness, false_negative_margin=false_negative_margin)
    banks = [] if queue is queue_labels is None else banks_of(queue, queue_labels, labels)
    both = sides(
        query,
        key,
        precision,
        names=("query", "key"),
        prefixes=("", "key_"),
        labels=both_of(labels, key_labels),
        # of queries with a key of their own, ids and groups are compared with the banks' alone
        ids=NEITHER if own_key else both_of(ids, key_ids),
        groups=NEITHER if own_key else both_of(groups, key_groups),
        exclude=exclude,
        # who belongs to whom may be told otherwise
        offset=offset if positive_weight is None and targets is None else None,
        banks=banks,
        memory_budget=memory_budget,
    )
    query, (n, m) = both.x, (query.shape[0], key.shape[0])
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    scale = inverse("temperature", temperature, query)
    check_at_least("hardness", hardness, 0.0)
    told = not (labels is positive_weight is targets is None)
    if symmetric and reduction == "none" and told and n != m:
        raise ValueError(
            f"reduction: expected 'mean' or 'sum' for symmetric=True with labels, positive_weight "
            f"or targets and N={n} != M={m}, got 'none'"
        )
    if symmetric and offset:
        raise ValueError(
            f"symmetric: expected False with offset={offset}: the columns' half would miss the "
            "other ranks' queries; take the mean of info_nce(query, all_keys, offset=offset) and "
            "info_nce(key, all_queries, offset=offset)"
        )
    if own_key:
        given = dict(labels=labels, exclude=exclude, symmetric=symmetric or None)
        given |= dict(ids=None if queue_ids is not None else ids)
        given |= dict(groups=None if queue_groups is not None else groups)
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: expected none with own_key=True, got one")
    if negatives is not None:
        negatives = own_negatives(negatives, query)
    beside: dict[str, object] = {}
    if not (guide is share is positive_weight is targets is None):
        beside = dict(ids=ids, groups=groups, exclude=exclude, negatives=negatives)
        beside |= dict(hardness=hardness or None, false_negative_margin=false_negative_margin)
    alike = guide is key_guide is queue_guide is share is positive_weight is None
    alike = alike and type(guide_margin) is float and guide_margin == 0
    alike = alike and guide_strategy == "absolute"
    choice = (
        None
        if alike
        else chosen_by(
            both,
            guides=(guide, key_guide, queue_guide),
            guide_options=(guide_margin, guide_strategy),
            share=share,
            positive_weight=positive_weight,
            labels=labels,
            own_key=own_key,
            beside=beside if positive_weight is None else beside | dict(offset=offset or None),
        )
    )
    aimed = weight = None
    if targets is not None:
        beside |= dict(guide=guide, share=share, positive_weight=positive_weight)
        beside |= dict(labels=labels, own_key=own_key or None, offset=offset or None)
        beside |= dict(decoupled=decoupled or None, negatives=None)
        aimed, weight = told_targets(targets, both, beside)

    ids_of_banks, groups_of_banks = [], []
    if banks or not (queue_ids is queue_groups is None):
        ids_of_banks = numbered("ids", ids, "queue_ids", queue_ids, banks, query)
        groups_of_banks = numbered("groups", groups, "queue_groups", queue_groups, banks, query)
    with no_autocast(query.device):
        inputs = scored(query, key, scale, normalize=normalize, precision=precision)
        inputs = inputs.known(both.numbers)
        further = []
        for bank, of_ids, of_groups in zip(both.banks, ids_of_banks, groups_of_banks, strict=True):
            known: dict[str, Any] = dict(x_ids=of_ids[0], y_ids=of_ids[1])
            known |= dict(x_groups=of_groups[0], y_groups=of_groups[1])
            further.append(against(*bank, inputs, normalize)._replace(**known))
        if own_key:
            rows, columns = alone(diagonal(inputs, offset), hardness), None
            if false_negative_margin is not None:
                best = rows.positive.detach()
                inputs = inputs._replace(x_window=window(best, inputs, false_negative_margin))
        elif choice is None:
            if aimed is not None:
                inputs = inputs._replace(x_labels=None, y_labels=None)
            if false_negative_margin is not None:
                inputs = with_windows(
                    inputs, further, labels is None, false_negative_margin, symmetric, backend
                )
            rows, columns = both_ways(inputs, hardness, symmetric, backend, both.room)
        if choice is not None:
            own = rows.positive if own_key else None
            options: dict[str, Any] = dict(
                normalize=normalize, precision=precision, backend=backend
            )
            rows, columns = chosen_ways(both, choice, scale, symmetric, own, **options)
            further = []
        if labels is None and ids is not None:
            # the sweep leaves equal ids out, so the diagonal is put back beside it
            rows = rows.with_positive(diagonal(inputs, offset))
            if columns is not None:
                further_keys = (0, m - n)
                own = torch.nn.functional.pad(rows.positive, further_keys, value=-torch.inf)
                columns = columns.with_positive(own)
        for bank in further:
            bank = bank._replace(x_window=inputs.x_window)
            rows = rows.joined(both_ways(bank, hardness, False, backend, both.room)[0])
        if negatives is not None and negatives.shape[1] > 0:
            negatives = unit(negatives) if normalize else negatives
            rows = rows.joined(of_own_negatives(inputs, negatives, hardness))

        dtype = accumulate_dtype(query.dtype)
        if aimed is None and rows.tilt is None and not decoupled and reduction != "none":
            of_columns = None if columns is None else columns.shares
            return reduced_shares(rows.shares, of_columns, reduction, dtype)
        z = None if aimed is None else target_scores(inputs, aimed, backend)

        def part(sums: PairSums, at: Tensor | None) -> tuple[Tensor, Tensor]:
            if z is None or weight is None or at is None:
                return sums.loss(decoupled)
            return toward(z, weight, at, sums)

        out = reduced(*part(rows, aimed and aimed.rows), reduction, dtype)
        if columns is None:
            return out
        loss, counted = part(columns, aimed and aimed.columns)
        if reduction == "none" and labels is None:
            loss, counted = loss[:n], counted[:n]
        return (out + reduced(loss, counted, reduction, dtype)) / 2


_labelled = lambda t: dict(labels=t.labels, key_labels=t.y_labels)


_with_ids = lambda t: dict(ids=t.ids, key_ids=t.y_ids)


_with_groups = lambda t: dict(groups=t.ids, key_groups=t.y_ids)


_told_banks = lambda t: dict(
    queue=[t.first_bank, t.second_bank],
    ids=t.labels,
    queue_ids=[t.first_labels, t.second_labels],
    groups=t.ids,
    queue_groups=[t.first_labels, t.second_labels],
    own_key=True,
)


_queue_and_more = lambda t: dict(queue=[t.first_bank, t.second_bank], negatives=t.negatives)


_labelled_queue = lambda t: dict(
    queue=[t.first_bank, t.second_bank], queue_labels=[t.first_labels, t.second_labels]
)


_guided = lambda t: dict(guide=few(t.ids, t.x), key_guide=few(t.y_ids, t.x))


_guided_banks = lambda t: (
    _labelled_queue(t)
    | dict(
        queue_guide=[few(t.first_labels, t.x), few(t.second_labels, t.x)],
        labels=t.labels,
        key_labels=t.y_labels,
        guide_margin=0.5,
        guide_strategy="relative",
        **_guided(t),
    )
)


def _weighted(t: Any) -> dict[str, Any]:
    """Of two sets of labels, a quarter and the rest."""
    one, other, of_keys = (
        (labels[:, None] % 3 == torch.arange(3, device=labels.device)).to(t.x.dtype)
        for labels in (t.labels, t.ids, t.y_labels)
    )
    return dict(positive_weight=(one / 4 + other * 0.75, of_keys))


def _mixed(t: Any) -> dict[str, Any]:
    """Of each row its own key and the one after it."""
    rows = torch.arange(len(t.x), device=t.x.device)
    weight = torch.full_like(rows, 0.75, dtype=t.x.dtype)
    both = torch.cat([rows, (rows + 1) % len(t.x)])
    return dict(targets=(rows.repeat(2), both, torch.cat([weight, 1 - weight])))


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
        "groups": lambda t: _labelled(t) | _with_groups(t),
        "told banks": _told_banks,
        "decoupled": dict(symmetric=True, decoupled=True),
        "kept": lambda t: dict(symmetric=True, memory_budget=1 << 20, queue=t.first_bank),
        "guide": lambda t: dict(symmetric=True, **_guided(t)),
        "guide, banks": _guided_banks,
        "weights": lambda t: dict(symmetric=True, **_weighted(t)),
        "targets": lambda t: dict(symmetric=True, queue=t.first_bank, **_mixed(t)),
    },
)
examples(
    info_nce,
    lambda f, t: f(t.x, t.y, temperature=t.temperature, symmetric=True),
    {"warm": {}, "learned temperature": dict(normalize=True)},
)
examples(
    info_nce,
    lambda f, t: f(t.x, t.y, temperature=0.2, share=0.4, queue=t.first_bank),
    {"share": dict(symmetric=True), "share, labels": _labelled},
    precisions=PRECISIONS[:3],  # rounded scores choose other negatives
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

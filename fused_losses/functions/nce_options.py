"""What says of InfoNCE's pairs more than labels do, checked: a guide, a share, weights, targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_losses.base.indices import PairList, check_index
from fused_losses.base.numerics import nan_where_infinite, row_dtype
from fused_losses.base.sides import Sides
from fused_losses.base.validation import check_device, check_plain, describe
from fused_losses.functions.chosen_pairs import (
    ChosenPairs,
    by_guide,
    by_share,
    by_weight,
    refuse_beside,
)
from fused_losses.functions.pair_sums import PairSums
from fused_losses.primitives.listed.op import listed_scores
from fused_losses.primitives.pairs.inputs import PairInputs

Targets = tuple[Tensor, Tensor, Tensor]  # rows, columns, weight
Guide = Tensor | Sequence[Tensor] | None


def chosen_by(
    both: Sides,
    guides: tuple[Guide, Guide, Guide],  # of queries, keys and banks
    guide_options: tuple[float, str],
    share: float | None,
    positive_weight: object,
    labels: Tensor | None,
    own_key: bool,
    beside: dict[str, object],
) -> ChosenPairs | None:
    """The rule of a call, if it has one; beside: options that it then cannot have."""
    guide, key_guide, queue_guide = guides
    margin, strategy = guide_options
    check_plain(guide_margin=margin, share=share)
    if guide is None:
        for name, value in (
            ("key_guide", key_guide),
            ("queue_guide", queue_guide),
            ("guide_margin", margin or None),
            ("guide_strategy", None if strategy == "absolute" else strategy),
        ):
            if value is not None:
                raise ValueError(f"{name}: expected none without a guide, got one")
    elif key_guide is None:
        raise ValueError("key_guide: expected a tensor [M, G] beside guide, got None")
    if guide is not None:
        others = dict(share=share, positive_weight=positive_weight)
        refuse_beside("guide", "which chooses the negatives by its own rule", **others, **beside)
        banks = _of_banks(queue_guide, both)
        named = [("guide", guide, both.x.shape[0]), ("key_guide", key_guide, both.y.shape[0])]
        named += [("queue_guide", rows, n) for rows, n in banks]
        return by_guide(named, margin, strategy, both.x)
    if share is not None:
        others = dict(positive_weight=positive_weight)
        refuse_beside("share", "which chooses the negatives by their rank", **others, **beside)
        return by_share(share)
    if positive_weight is None:
        return None
    told = dict(labels=labels, own_key=own_key or None)
    told |= dict(queue_labels=next((t for _, t in both.banks if t is not None), None))
    why = "which says by itself what a pair counts for"
    refuse_beside("positive_weight", why, **told, **beside)
    return by_weight(positive_weight, both)


def _of_banks(given: Guide, both: Sides) -> list[tuple[Tensor, int]]:
    rows = [] if given is None else [given] if isinstance(given, Tensor) else list(given)
    if len(rows) != len(both.banks):
        raise ValueError(
            f"queue_guide: expected one tensor a bank ({len(both.banks)}), got {len(rows)}"
        )
    return [(r, bank.shape[0]) for r, (bank, _) in zip(rows, both.banks, strict=True)]


def told_targets(
    targets: object, both: Sides, beside: dict[str, object]
) -> tuple[PairList, Tensor]:
    """The listed pairs and their weights [P]; beside: options that cannot be there."""
    refuse_beside("targets", "which say by themselves what a pair counts for", **beside)
    if not isinstance(targets, tuple | list) or len(targets) != 3:
        got = describe(targets) if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets: expected (rows, columns, weight), three tensors [P], got {got}")
    rows, columns, weight = targets
    check_index("targets[0]", rows, both.x.shape[0], "query", both.x)
    check_index("targets[1]", columns, both.y.shape[0], "key", both.x)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = describe(weight) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"targets[2]: expected a floating point tensor [P], got {got}")
    check_device("query", both.x, "targets[2]", weight)
    for at, t in ((1, columns), (2, weight)):
        if t.shape != rows.shape:
            raise ValueError(
                f"targets[{at}]: expected shape {tuple(rows.shape)} as targets[0] has, got "
                f"{describe(t)}"
            )
    return PairList(rows, columns), weight.to(row_dtype(both.x.device))


def target_scores(inputs: PairInputs, pairs: PairList, backend: str | None) -> Tensor:
    """z of the listed pairs, [P] in `row_dtype`."""
    found = listed_scores(inputs.x, inputs.y, pairs, precision=inputs.precision, backend=backend)
    z = found.to(row_dtype(found.device)) * inputs.scale
    for t, at in ((inputs.x, pairs.rows), (inputs.y, pairs.columns)):
        z = z + nan_where_infinite(t).index_select(0, at).to(z)
    return z


def toward(z: Tensor, weight: Tensor, at: Tensor, sums: PairSums) -> tuple[Tensor, Tensor]:
    """The cross entropy of each row [N] with its targets, lines `at` of it, and who has some."""
    gap = weight * (sums.negative.index_select(0, at) - z)
    nothing = torch.zeros_like(sums.negative)
    count = nothing.detach().index_add(0, at, torch.ones_like(gap))
    return nothing.index_add(0, at, gap), count > 0

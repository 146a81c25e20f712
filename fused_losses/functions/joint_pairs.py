"""Contrastive losses whose rows weigh or choose their pairs: by a guide, a mask, a rank, a scale.

Each is a rule over whole rows of products (`primitives/row_rules/joint.py`), and ordinary autograd
on what that gives. Rows come in the accumulation dtype: nothing is won by rounding before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import PRECISIONS, examples, few
from fused_losses.base.integers import count_up
from fused_losses.base.numerics import (
    accumulate_dtype,
    logistic,
    nan_where_infinite,
    no_autocast,
    reduced,
    row_dtype,
)
from fused_losses.base.scalars import inverse
from fused_losses.base.sides import Sides, both_of, sides
from fused_losses.base.unit_norm import unit, wide_unit
from fused_losses.base.validation import check_plain
from fused_losses.functions.chosen_pairs import beside_rows, by_guide, chosen_sums
from fused_losses.functions.info_nce import info_nce
from fused_losses.functions.pair_sums import PairSums
from fused_losses.primitives.row_rules.inputs import RowInputs
from fused_losses.primitives.row_rules.op import row_losses


def guided_contrastive(
    anchor: Tensor,  # [N, D]
    positive: Tensor,  # [M, D]
    anchor_guide: Tensor,  # [N, G]
    positive_guide: Tensor,  # [M, G]
    *,
    negatives: Tensor | None = None,  # [K, D]
    negatives_guide: Tensor | None = None,  # [K, G]
    temperature: float | Tensor = 0.01,
    margin: float = 0.0,
    strategy: str = "absolute",
    anchors: bool = True,
    positives: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """InfoNCE whose negatives a guide's scores choose: no pair that it finds nearer than its own.

        loss_i = log(e^(s(a_i, p_i)) + sum_kept e^s) - s(a_i, p_i)

    over the pairs (a_i, p_j), (a_i, a_j), (p_i, p_j), j != i, and (a_i, n_k). A pair is kept where
    its guide's score is not above g(a_i, p_i) - margin ("absolute") or g(a_i, p_i) - margin
    |g(a_i, p_i)| ("relative"); the guide has no gradient.

    Args:
        anchor, positive: [N, D], [M, D]; positive i is anchor i's, the rest are negatives.
        anchor_guide, positive_guide, negatives_guide: the guide's rows of the same inputs.
        temperature: > 0; a float or a scalar tensor, which may need a gradient.
        anchors, positives: whether pairs of two anchors, of two positives are negatives too.
        normalize: divide all rows by their norms. reduction: "mean", "sum" or "none" [N].

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments;
    NotImplementedError for a second derivative, but on "reference". Time O(N (M + N + K) (D + G));
    memory O((N + M + K) (D + G)) and a few blocks. Paper: Solatorio, GISTEmbed, 2024.
    """
    both = sides(anchor, positive, precision, names=("anchor", "positive"), offset=0)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    scale = inverse("temperature", temperature, both.x)
    n, dtype = anchor.shape[0], accumulate_dtype(both.x.dtype)
    if (negatives is None) != (negatives_guide is None):
        raise ValueError("negatives, negatives_guide: expected both or neither, got one")
    told: list[tuple[str, object, int]] = [
        ("anchor_guide", anchor_guide, n),
        ("positive_guide", positive_guide, len(both.y)),
    ]
    if negatives is not None:
        validation.check_both("anchor", both.x, "negatives", negatives, precision, rows="K")
        told.append(("negatives_guide", negatives_guide, negatives.shape[0]))
    choice = by_guide(told, margin, strategy, both.x, ("margin", "strategy"))
    rows = [both.x, both.y, *([] if negatives is None else [negatives])]
    guides = [choice.x_second, choice.y_second, *choice.further]
    with no_autocast(anchor.device):
        rows = [t.to(dtype) for t in rows]
        if normalize:
            rows, guides = [unit(t) for t in rows], [unit(g) for g in guides if g is not None]
        a, p, *far = rows
        ids, others = count_up(n, a), count_up(p.shape[0], p)
        given = RowInputs(
            a, p, ids, others, rule=choice.rule, params=choice.params, score="dot",
            precision=precision, x_second=guides[0], y_second=guides[1],
        )  # fmt: skip
        sums, found = chosen_sums(given, scale, backend)
        # where the other pairs are cut is known by the first sweep
        given = given._replace(values=found[:, 4:].detach())
        more = []
        if anchors:
            more.append(given._replace(y=a, y_labels=ids, y_second=guides[0], skip_self=True))
        if positives:
            own = given._replace(x=p[:n], skip_self=True)
            more.append(own._replace(x_second=None if guides[1] is None else guides[1][:n]))
        for rows_of, guided in zip(far, guides[2:], strict=True):
            none = torch.full((rows_of.shape[0],), -1, dtype=torch.int32, device=a.device)
            more.append(given._replace(y=rows_of, y_labels=none, y_second=guided))
        for pairs in more:
            sums = sums.joined(chosen_sums(pairs, scale, backend)[0])
        return reduced(*sums.loss(), reduction, dtype)


def masked_contrastive(
    query: Tensor,  # [N, C, P]
    key: Tensor,  # [M, C, P]
    mask: Tensor,  # [N, P]
    *,
    temperature: float | Tensor = 0.07,
    labels: Tensor | None = None,  # [N]
    key_labels: Tensor | None = None,  # [M]
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of maps of features, each query compared at the places that its mask shows.

        s_ij = <m_i q_i, k_j> / (|m_i q_i| |m_i k_j|),   |m k|^2 = sum_p m_p sum_c k_cp^2
        loss_i = log sum_j e^(s_ij / temperature) - log sum_P e^(s_ij / temperature)

    Args:
        query, key: [N, C, P], [M, C, P] of C channels at P places. mask: [N, P] bool.
        temperature: > 0; a float or a scalar tensor, which may need a gradient.
        labels, key_labels: integers, equal ones are positives; None: key i is query i's.
        reduction: "mean" over the rows with a positive, "sum" or "none" [N].

    A key of zeros where the mask shows has s = 0. Returns float32 (float64 for float64 inputs).
    Raises ValueError, TypeError for bad arguments; NotImplementedError for a second derivative, but
    on "reference". Time O(N M C P); memory O((N + M) C P) and a few blocks. Paper: Shafique et al.,
    CriSp, 2024.
    """
    for name, maps in (("query", query), ("key", key)):
        if not isinstance(maps, Tensor) or maps.dim() != 3:
            got = validation.describe(maps) if isinstance(maps, Tensor) else type(maps).__name__
            raise ValueError(f"{name}: expected a tensor [N, C, P], got {got}")
    if query.shape[1:] != key.shape[1:]:
        raise ValueError(
            f"key: expected [M, {query.shape[1]}, {query.shape[2]}] to match query, got "
            f"{validation.describe(key)}"
        )
    (n, channels, places), m = query.shape, key.shape[0]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (n, places):
        got = validation.describe(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected a bool tensor [{n}, {places}], got {got}")
    both = _labelled(query.flatten(1), key.flatten(1), precision, labels, key_labels)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    scale = inverse("temperature", temperature, both.x)
    with no_autocast(query.device):
        dtype = accumulate_dtype(both.x.dtype)
        shown = torch.where(mask[:, None], both.x.to(dtype).view(n, channels, places), 0)
        x = unit(shown.reshape(n, channels * places))
        # the ratio does not know a key's length, which might overflow its square
        y = wide_unit(both.y)
        given = RowInputs(
            x, y, *both.labels,
            values=scale.to(row_dtype(x.device)).expand(n, 1).contiguous(),
            rule="ratio", score="dot", precision=precision,
            x_second=mask.to(dtype),
            y_second=y.view(m, channels, places).square().sum(dim=1),
        )  # fmt: skip
        sums = PairSums.of(row_losses(given, backend=backend))
        return reduced(*sums.loss(), reduction, dtype)


def hard_contrastive(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    *,
    share: float = 0.1,
    temperature: float | Tensor = 0.07,
    labels: Tensor | None = None,  # [N]
    key_labels: Tensor | None = None,  # [M]
    normalize: bool = True,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """`info_nce(share=)`: InfoNCE against exactly the ceil(share n) hardest of n negatives a row.

        loss_i = log(sum_P e^z + sum_hardest e^z) - log sum_P e^z,   z = <q_i, k_j> / temperature

    Args:
        query, key: [N, D], [M, D]. share: in (0, 1]; the negatives are taken by rank, of equal
            scores those of the lowest columns first.
        temperature: > 0; a float or a scalar tensor, which may need a gradient.
        labels, key_labels: integers, equal ones are positives; None: key i is query i's.
        normalize: divide rows by their norms. reduction: "mean" over the rows with a positive,
            "sum" or "none" [N].

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments;
    NotImplementedError for a second derivative, but on "reference". Time O(N M (D + log M)); memory
    O((N + M) D) and a few blocks. Paper: Wang and Liu, Understanding the Behaviour of Contrastive
    Loss, 2021.
    """
    return info_nce(
        query,
        key,
        share=share,
        temperature=temperature,
        labels=labels,
        key_labels=key_labels,
        normalize=normalize,
        reduction=reduction,
        precision=precision,
        backend=backend,
    )


def adaptive_temperature(
    first: Tensor,  # [N, D]
    second: Tensor,  # [N, D]
    first_factors: Tensor,  # [N, E]
    second_factors: Tensor,  # [N, E]
    *,
    nearest: int = 100,
    beta: float = 1e-4,
    bounds: tuple[float, float] = (1e-5, 2.0),
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Two views whose pairs each have a temperature of their own, made of a second product.

        t_ab = low + (high - low) sigmoid(-<f_a, f_b>)
        loss_i = -s_ip / t_ip + mean_near s_in / t_in
               + beta (D / 2 log t_ip + 1 / t_ip - sum_near (log t_in + 1 / t_in))

    over the 2 N rows of both views, p the other view of i, near the `nearest` rows of largest s
    among the rest, which are chosen without a gradient.

    Args:
        first, second: [N, D], of norm 1 in the paper. first_factors, second_factors: [N, E], f.
        nearest: how many negatives a row has; 0: all. beta: >= 0. bounds: 0 < low < high.
        reduction: "mean" over the 2 N rows, "sum" or "none" [2 N].

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments;
    NotImplementedError for a second derivative, but on "reference". Time O(N^2 (D + E)); memory
    O(N (D + E)) and a few blocks. Paper: Wang et al., Adaptive Multi-head Contrastive Learning,
    2023.
    """
    check_plain(beta=beta, bounds=bounds)
    first = validation.check_both("first", first, "second", second, precision)
    if first.shape != second.shape:
        raise ValueError(
            f"second: expected shape {tuple(first.shape)} as first has, got "
            f"{validation.describe(second)}"
        )
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    validation.check_at_least("beta", beta, 0.0)
    validation.check_at_least("nearest", nearest, 0)
    low, high = bounds
    if not 0 < low < high:
        raise ValueError(f"bounds: expected 0 < low < high, got {bounds}")
    (n, d), dtype = first.shape, accumulate_dtype(first.dtype)
    f = [beside_rows("first_factors", first_factors, n, None, first)]
    f.append(beside_rows("second_factors", second_factors, n, f[0].shape[1], first))
    with no_autocast(first.device):
        # a row with inf is one with NaN
        x, factors = (
            rows + nan_where_infinite(rows)[:, None]
            for rows in (torch.cat([first, second]).to(dtype), torch.cat(f))
        )
        ids = count_up(n, x).repeat(2)
        given = RowInputs(
            x, x, ids, ids, rule="tempered", params=(nearest, low, high), score="dot",
            skip_self=True, precision=precision, x_second=factors, y_second=factors,
        )  # fmt: skip
        near, spread, count = row_losses(given, backend=backend).unbind(dim=1)
        wide = near.dtype
        own = (x[:n].to(wide) * x[n:].to(wide)).sum(dim=1)
        t = low + (high - low) * logistic(-(factors[:n].to(wide) * factors[n:].to(wide)).sum(dim=1))
        pull = -own / t + beta * (d / 2 * t.log() + 1 / t)
        loss = pull.repeat(2) + near / count.clamp_min(1) - beta * spread
        return reduced(loss, torch.ones_like(loss, dtype=torch.bool), reduction, dtype)


def _labelled(
    query: Tensor, key: Tensor, precision: str, labels: Tensor | None, key_labels: Tensor | None
) -> Sides:
    """Both sides and which pairs are positive."""
    told = both_of(labels, key_labels)
    return sides(
        query, key, precision, names=("query", "key"), prefixes=("", "key_"), labels=told, offset=0
    )


def _guides(t: Any) -> dict[str, Any]:
    return dict(
        anchor_guide=few(t.ids, t.x),
        positive_guide=few(t.y_ids, t.x),
        negatives=t.first_bank,
        negatives_guide=few(t.first_labels, t.x),
    )


_shown = lambda t: (t.ids[:, None] + torch.arange(t.x.shape[1], device=t.x.device)) % 3 > 0
_labels = lambda t: dict(labels=t.labels, key_labels=t.y_labels)


examples(
    guided_contrastive,
    lambda f, t: f(t.x, t.y, temperature=0.2, **_guides(t)),
    {"": {}, "relative": dict(margin=0.5, strategy="relative", positives=False, normalize=False)},
)
examples(
    masked_contrastive,
    lambda f, t: f(t.x[:, None], t.y[:, None], _shown(t), temperature=0.2),
    {"": {}, "labels": _labels},
)
examples(
    hard_contrastive,
    lambda f, t: f(t.x, t.y, temperature=0.2, share=0.4),
    {"": _labels},
    precisions=PRECISIONS[:3],  # rounded scores choose other negatives
)
examples(
    adaptive_temperature,
    lambda f, t: f(t.x, t.y[: len(t.x)], t.z[: len(t.x)], t.z.flip(0)[: len(t.x)]),
    {"": dict(nearest=0, beta=0.01, bounds=(0.25, 2.0))},
)

"""Losses that choose, gate or mask the pairs of rows and keys, for the draws; literal formulas."""

from __future__ import annotations

from typing import Any

import torch
from nce_formulas import bounded_by, few, hardest
from pair_cases import TOWERS, case
from pair_rows import Inputs, equal, eye, lse, nce_rows, towers, towers_and_more, unit
from row_option_draws import row
from torch import Tensor

import fused_losses.functional as fl


def guided_rows(t: Inputs, margin: float, both: bool, made: Any) -> Tensor:
    x, y, far = (made(r) for r in (t.x, t.y, t.first_bank))
    g, h, f = (made(few(i, t.x)) for i in (t.ids, t.y_ids, t.first_labels))
    n, own = len(x), eye(len(x), len(y))
    best = torch.where(own, g @ h.T, -torch.inf).amax(1, keepdim=True)
    limit = best - margin * best.abs()
    parts = [(x @ y.T, own | (g @ h.T <= limit)), (x @ x.T, (g @ g.T <= limit) & ~eye(n))]
    if both:
        parts.append((y[:n] @ y.T, (h[:n] @ h.T <= limit) & ~own))
    parts.append((x @ far.T, g @ f.T <= limit))
    z, kept = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
    return lse(z / 0.2, kept) - z.diagonal() / 0.2


def masked(t: Inputs) -> tuple[Tensor, Tensor]:
    """z, and the cosines' own zero where nothing is seen."""
    shown = ((t.ids[:, None] + torch.arange(t.x.shape[1])) % 3 > 0).to(t.x.dtype)
    q, k = unit(shown * t.x), unit(t.y)
    square = shown @ k.square().T
    some = square > 0
    return torch.where(some, q @ k.T / torch.where(some, square, 1).sqrt(), 0) / 0.2, shown


def masked_rows(t: Inputs, labelled: bool) -> Tensor:
    z, _ = masked(t)
    same = equal(t.labels, t.y_labels) if labelled else eye(*z.shape)
    return nce_rows(z, same, ~same)[0]


def heads(n: int, m: int, d: int) -> Inputs:
    """Two views and what their temperatures are made of."""
    t = towers(n, m, d)
    t.z = torch.randn(len(t.y), d) / d**0.5
    return t


def tempered(t: Inputs) -> Tensor:
    n, d = t.x.shape
    x, f = torch.cat([t.x, t.y[:n]]), torch.cat([t.z[:n], t.z.flip(0)[:n]])
    s, heat = x @ x.T, 0.25 + 1.75 * torch.sigmoid(-f @ f.T)
    ids = torch.arange(n).repeat(2)
    own = equal(ids, ids) & ~eye(2 * n)
    far = ~equal(ids, ids)
    pull = torch.where(own, -s / heat + 0.01 * (d / 2 * heat.log() + 1 / heat), 0).sum(1)
    count = far.sum(1).clamp_min(1)
    push = torch.where(far, s / heat, 0).sum(1) / count
    return pull + push - 0.01 * torch.where(far, heat.log() + 1 / heat, 0).sum(1)


def gated(n: int, m: int, d: int) -> Inputs:
    t = towers(n, m, d)
    t.few = torch.rand(8, d)
    return t


def gated_rows(t: Inputs, made: Any) -> Tensor:
    gates = t.few[:6].view(2, 3, -1)[(t.labels % 2)[:, None], t.y_labels % 3]
    z = torch.einsum("nd,md,nmd->nm", made(t.x), made(t.y), gates) / 0.2
    return z.logsumexp(1) - z.diagonal()


def documents(n: int, m: int, d: int) -> Inputs:
    t = towers_and_more(n, m, d)
    t.scale = torch.tensor(1.5)
    return t


def ranked(t: Inputs, per_direction: bool) -> Tensor:
    """All four directions, of which one without pairs adds nothing."""
    made = (lambda r: r) if per_direction else unit
    n, x, y = len(t.x), made(t.x), made(t.y[: len(t.x)])
    documents = torch.cat([y, made(t.negatives.flatten(0, 1))])
    of = torch.cat([torch.arange(n), torch.arange(n).repeat_interleave(4)])
    others = ~equal(torch.arange(n), of)
    parts = [
        (x @ documents.T, torch.ones_like(others)),
        (x @ x.T, ~eye(n)),
        (y @ x.T, torch.ones(n, n, dtype=torch.bool)),
        (y @ documents.T, others),
    ]
    own = t.scale * (x * y).sum(1)
    if not per_direction:
        z, kept = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
        return lse(t.scale * z, kept) - own
    shares = []
    for z, kept in parts:
        some = kept.any(1)
        shares.append(torch.where(some, torch.where(some, lse(t.scale * z, kept), 0) - own, 0))
    return torch.stack(shares).mean(0)


def plain(x: Tensor) -> Tensor:
    return x


def hard(t: Inputs, labelled: bool) -> Tensor:
    z = unit(t.x) @ unit(t.y).T / 0.2
    same = equal(t.labels, t.y_labels) if labelled else eye(*z.shape)
    return nce_rows(z, same, hardest(z, ~same, 0.4))[0]


def mean(rows: Tensor) -> Tensor:
    return rows.mean()


def over_positives(rows: Tensor, t: Inputs) -> Tensor:
    some = equal(t.labels, t.y_labels).any(1)
    return rows.sum() / some.sum().clamp_min(1)


NONE: dict[str, Any] = dict(reduction="none")
BANKED = ("x", "y", "first_bank")
RANKED = ("x", "y", "negatives", "scale")


def guided_call(t: Inputs, **more: Any) -> Tensor:
    guides = (few(i, t.x) for i in (t.ids, t.y_ids))
    options: dict[str, Any] = dict(temperature=0.2, anchors=False, **NONE)
    return fl.guided_contrastive(t.x, t.y, *guides, **options, **more)


def near_call(t: Inputs, **more: Any) -> Tensor:
    n = len(t.x)
    given: dict[str, Any] = dict(nearest=2 * n, bounds=(0.25, 2.0), beta=0.01, **NONE)
    return fl.adaptive_temperature(t.x, t.y[:n], t.z[:n], t.z.flip(0)[:n], **given, **more)


def guided_alone(t: Inputs) -> Tensor:
    x, y, g, h = (unit(r) for r in (t.x, t.y, few(t.ids, t.x), few(t.y_ids, t.x)))
    own, n = eye(len(x), len(y)), len(x)
    best = torch.where(own, g @ h.T, -torch.inf).amax(1, keepdim=True)
    z = torch.cat([x @ y.T, y[:n] @ y.T], dim=1) / 0.2
    kept = torch.cat([own | bounded_by(g @ h.T, own), (h[:n] @ h.T <= best) & ~own], dim=1)
    return lse(z, kept) - z.diagonal()


DRAWN = [
    case(
        "guided_contrastive", towers_and_more, lambda t: mean(guided_rows(t, 0, True, unit)), BANKED
    ),
    case(
        "guided_contrastive, relative",
        towers_and_more,
        lambda t: mean(guided_rows(t, 0.5, False, plain)),
        BANKED,
    ),
    row(fl.guided_contrastive, "none", guided_alone, towers, TOWERS, call=guided_call),
    case("masked_contrastive", towers, lambda t: mean(masked_rows(t, False)), TOWERS),
    case(
        "masked_contrastive, labels",
        towers,
        lambda t: over_positives(masked_rows(t, True), t),
        TOWERS,
    ),
    row(
        fl.masked_contrastive,
        "none",
        lambda t: masked_rows(t, False),
        towers,
        TOWERS,
        call=lambda t, **more: fl.masked_contrastive(
            t.x[:, None],
            t.y[:, None],
            (t.ids[:, None] + torch.arange(t.x.shape[1])) % 3 > 0,
            temperature=0.2,
            **NONE,
            **more,
        ),
    ),
    case("hard_contrastive", towers, lambda t: over_positives(hard(t, True), t), TOWERS),
    row(
        fl.hard_contrastive,
        "none",
        lambda t: nce_rows(z := t.x @ t.y.T / 0.2, own := eye(*z.shape), hardest(z, ~own, 0.4))[0],
        towers,
        TOWERS,
        call=lambda t, **more: fl.hard_contrastive(
            t.x, t.y, share=0.4, temperature=0.2, normalize=False, **NONE, **more
        ),
    ),
    case("adaptive_temperature", heads, lambda t: mean(tempered(t)), ("x", "y", "z")),
    row(fl.adaptive_temperature, "none", tempered, heads, ("x", "y", "z"), call=near_call),
    case("gated_contrastive", gated, lambda t: mean(gated_rows(t, unit)), ("x", "y", "few")),
    row(
        fl.gated_contrastive,
        "none",
        lambda t: gated_rows(t, plain),
        gated,
        ("x", "y", "few"),
        call=lambda t, **more: fl.gated_contrastive(
            t.x,
            t.y,
            t.few[:6].view(2, 3, -1),
            t.labels % 2,
            t.y_labels % 3,
            temperature=0.2,
            normalize=False,
            **NONE,
            **more,
        ),
    ),
    case("multiple_negatives", documents, lambda t: mean(ranked(t, False)), RANKED),
    case("multiple_negatives, per direction", documents, lambda t: mean(ranked(t, True)), RANKED),
    row(
        fl.multiple_negatives,
        "none",
        lambda t: ranked(t, True),
        documents,
        RANKED,
        call=lambda t, **more: fl.multiple_negatives(
            t.x,
            t.y[: len(t.x)],
            t.negatives,
            scale=t.scale,
            directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
            partition="per_direction",
            normalize=False,
            **NONE,
            **more,
        ),
    ),
]

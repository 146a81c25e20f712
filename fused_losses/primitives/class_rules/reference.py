"""Folds over classes, materialised."""

from __future__ import annotations

import torch

from fused_losses.base.numerics import over_last, row_dtype, unit_rows
from fused_losses.base.products import product
from fused_losses.primitives.class_rules.inputs import (
    ClassInputs,
    ClassStatistics,
    check_ids,
    places,
    rule_values,
    weight_rows,
)
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS, pool


def reference(p: ClassInputs) -> ClassStatistics:
    """The same from the whole N x M matrix, in PyTorch that any order of autograd follows."""
    check_ids(p)
    rule, wide = CLASS_FOLDS[p.rule], row_dtype(p.x.device)
    rows = weight_rows(p, slice(0, p.taking_part))
    weight = unit_rows(p.weight[rows]) if p.normalize else p.weight[rows]
    found = product(p.x.to(weight.dtype), weight)
    cosine = pool(found.unflatten(1, (p.taking_part, p.centers)), p.softness)
    place = places(p)
    ids = torch.arange(p.taking_part, device=p.x.device)
    positive = (place[:, :, None] == ids).any(dim=1)
    terms = rule.terms(cosine, rule_values(p, cosine.dtype), list(p.params))
    statistics = []
    for kind, term in zip(rule.kinds, terms, strict=True):
        term = term.to(wide).masked_fill(positive, -torch.inf if kind == "lse" else 0)
        statistics.append(over_last(term) if kind == "lse" else term.sum(dim=1))
    found = cosine.gather(1, place.clamp_min(0)) if p.taking_part else torch.zeros_like(place)
    with torch.no_grad():
        others = torch.cat([torch.full_like(cosine[:, :1], -torch.inf), cosine], dim=1)
        others[:, 1:].masked_fill_(positive, -torch.inf)
        best = others.max(dim=1)
        hardest = ids if p.classes is None else p.classes
        hardest = torch.cat([hardest.new_full((1,), -1), hardest])[best.indices]
    targets = torch.where(place < 0, 0, found.to(wide))
    return ClassStatistics(torch.stack(statistics), targets, hardest, best.values)

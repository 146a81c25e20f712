"""Forward mode over classes: what folds move by, in one sweep of dual tiles."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fused_losses.primitives.class_rules.bounded import _tiles, targets
from fused_losses.primitives.class_rules.inputs import ClassInputs, rule_values
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS


def statistics(p: ClassInputs, found: Tensor) -> tuple[Tensor, Tensor]:
    """Tangents of the statistics [S, N], found of the dual p, and of the targets [N, L]."""
    rule, params = CLASS_FOLDS[p.rule], list(p.params)
    x = p.x.to(p.dtype)
    values, out = rule_values(p, x.dtype), torch.zeros_like(found)
    safe = torch.where(found == -torch.inf, 0, found).to(x.dtype)
    for tile in _tiles("bounded", p, x):
        positive = tile.positive
        for s, term in enumerate(rule.terms(tile.cosine, values, params)):
            term, moved = forward_ad.unpack_dual(term)
            moved = torch.zeros_like(term) if moved is None else moved
            moved = moved.masked_fill(positive, 0)
            if rule.kinds[s] == "lse":
                moved = torch.where(moved == 0, 0, (term - safe[s, :, None]).exp() * moved)
            out[s] += moved.sum(dim=1).to(out)
    given = p.x, p.weight, p.labels, p.centers, p.softness, p.normalize
    of_targets = forward_ad.unpack_dual(targets(*given)).tangent
    if of_targets is None:
        of_targets = torch.zeros(p.labels.shape, dtype=found.dtype, device=found.device)
    return out, of_targets

"""Rows of the catalogue: a loss with mixed rows beside the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from catalogue_table import Call, Case
from torch import Tensor, nn

from fused_losses import losses

BASE, BETA = 0.5, 20.0


def shared(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """A batch and the share of the positive in what is mixed."""
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    share = torch.rand((), generator=generator, dtype=torch.float64)
    return Call((x, labels), dict(share=share))


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T


def metrix(_: nn.Module, x: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """Multi-similarity of a batch, and of positives mixed with their anchor's nearest negative."""
    s, total = cosines(x, x), x.sum() * 0
    n, same = len(x), labels[:, None] == labels
    for a in range(n):
        negatives = (~same[a]).nonzero()[:, 0].tolist()
        positives = [p for p in same[a].nonzero()[:, 0].tolist() if p != a]
        near, far = [s[a, p] for p in positives], [s[a, k] for k in negatives]
        total = total + similarity(near, far, [1.0] * len(near), [1.0] * len(far), x)
        if not (positives and negatives):
            continue
        nearest = max(negatives, key=lambda k: float(s[a, k].detach()))
        mixed = [share * x[p] + (1 - share) * x[nearest] for p in positives]
        met = [cosines(x[a, None], v[None])[0, 0] for v in mixed]
        shares, rest = [share] * len(met), [1 - share] * len(met)
        total = total + 0.4 * similarity(met, met, shares, rest, x)
    return total / max(n, 1)


def similarity(near: list, far: list, by: list, rest: list, x: Tensor) -> Tensor:
    nothing = x.sum() * 0
    attract = sum((w * (-2 * (s - BASE)).exp() for s, w in zip(near, by, strict=True)), nothing)
    repel = sum((w * (BETA * (s - BASE)).exp() for s, w in zip(far, rest, strict=True)), nothing)
    return (1 + attract).log() / 2 + (1 + repel).log() / BETA


def build(d: int) -> nn.Module:
    return losses.MetrixLoss(losses.MultiSimilarityLoss(beta=BETA, base=BASE))


CASES = {"MetrixLoss": Case(build, metrix, shared, compiles=False, explains=False)}

"""Rows of the catalogue: losses of a softmax's probabilities and of differences of scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from catalogue_classes_cases import C, classed, head, own
from catalogue_table import Call
from torch import Tensor, nn

from fused_losses import losses

Each = Callable[[Tensor, Tensor], Tensor]  # scores [N, C], labels -> a loss a row


def scored(each: Each) -> Callable[..., Tensor]:
    """The mean over the rows of a loss of plain scores."""
    return lambda module, x, labels: each(x @ module.weight.T, labels).mean()


def probable(end: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A loss of the label's probability."""
    return scored(lambda z, labels: end(own(z.softmax(dim=1), labels)))


def hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, C)


def normalized(z: Tensor, labels: Tensor) -> Tensor:
    log_p = z.log_softmax(dim=1)
    return own(log_p, labels) / log_p.sum(dim=1)


def active_passive(z: Tensor, labels: Tensor) -> Tensor:
    return normalized(z, labels) + 4 * (1 - own(z.softmax(dim=1), labels))


def apart(z: Tensor, labels: Tensor, threshold: float) -> Tensor:
    return z - own(z, labels)[:, None] + threshold * (1 - hot(labels))


def crammer_singer(z: Tensor, labels: Tensor) -> Tensor:
    others = z.masked_fill(hot(labels).bool(), -torch.inf).amax(dim=1)
    return (1 + others - own(z, labels)).relu()


def weston_watkins(z: Tensor, labels: Tensor) -> Tensor:
    return ((1 - hot(labels)) * apart(z, labels, 1.0).relu()).sum(dim=1) / C


def ldr(z: Tensor, labels: Tensor) -> Tensor:
    soft = F.softplus(z)
    u = soft / soft.mean(dim=1, keepdim=True)
    return apart(u, labels, 2.0).logsumexp(dim=1) - math.log(C)


def aldr(module: nn.Module, x: Tensor, labels: Tensor, samples: Tensor) -> Tensor:
    z = x @ module.weight.T
    u = z / z.abs().mean(dim=1, keepdim=True)
    known = module.table.lams[samples].to(z)
    q = (u / known[:, None]).softmax(dim=1) + 1e-5
    q = (q / q.sum(dim=1, keepdim=True)).detach()
    divergence = (q * (q * C).log()).sum(dim=1)
    lam = (1 - divergence / (2 * math.log(C)))[:, None]
    each = lam[:, 0] * ((apart(u, labels, 1.0) / lam).logsumexp(dim=1) - math.log(C))
    return (each - 2 * math.log(C) / 2 * (lam[:, 0] - 1) ** 2).mean()


def sampled(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows and which samples they are."""
    arguments = classed(n, d, labels, generator).arguments
    return Call(arguments, dict(samples=torch.randperm(2048, generator=generator)[:n]))


def bias(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    v = x.detach().var(dim=1)
    low = torch.minimum(module.weights.low.to(v), v.min())
    span = v.max() - v.min()
    share = (v - low) / span if span > 0 else torch.zeros_like(v)
    each = F.cross_entropy(x @ module.weight.T, labels, reduction="none")
    return (((0.3 * share).exp() - 0.3) * each).mean()


def equity(module: nn.Module, x: Tensor, labels: Tensor, likelihood: Tensor) -> Tensor:
    each = F.cross_entropy(x @ module.weight.T, labels, reduction="none")
    return ((1 + (1 - likelihood.detach()) ** 5) / 2 * each).mean()


def likely(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows and how likely each is in its data set."""
    arguments = classed(n, d, labels, generator).arguments
    return Call(arguments, dict(likelihood=torch.rand(n, generator=generator, dtype=torch.float64)))


def sampled_head(c: int, d: int) -> nn.Module:
    return losses.ALDRLoss(c, d, 2048)


HELD: dict[str, Any] = dict(gradcheck=False)
CASES = {
    "CompSumLoss": head(losses.CompSumLoss, scored(lambda z, y: -own(z.log_softmax(1), y))),
    "GCELoss": head(losses.GCELoss, probable(lambda p: (1 - p**0.7) / 0.7)),
    "TruncatedGCELoss": head(
        losses.TruncatedGCELoss, probable(lambda p: (1 - p.clamp_min(0.5) ** 0.7) / 0.7)
    ),
    "AGCELoss": head(losses.AGCELoss, probable(lambda p: (4 - (1 + p) ** 2) / 2)),
    "AULLoss": head(losses.AULLoss, probable(lambda p: ((2 - p) ** 2 - 1) / 2)),
    "SCELoss": head(losses.SCELoss, probable(lambda p: -0.1 * p.log() + 4 * (1 - p))),
    "ReverseCELoss": head(losses.ReverseCELoss, probable(lambda p: 4 * (1 - p))),
    "MAELoss": head(losses.MAELoss, scored(lambda z, y: (z.softmax(1) - hot(y)).abs().sum(dim=1))),
    "MSELoss": head(
        losses.MSELoss, scored(lambda z, y: (z.softmax(1) - hot(y)).square().sum(dim=1))
    ),
    "NCELoss": head(losses.NCELoss, scored(normalized)),
    "ActivePassiveLoss": head(losses.ActivePassiveLoss, scored(active_passive)),
    "FocalLoss": head(losses.FocalLoss, probable(lambda p: -((1 - p) ** 2) * p.log())),
    "Poly1Loss": head(losses.Poly1Loss, probable(lambda p: 1 - p - p.log())),
    "CrammerSingerLoss": head(losses.CrammerSingerLoss, scored(crammer_singer)),
    "WestonWatkinsLoss": head(losses.WestonWatkinsLoss, scored(weston_watkins)),
    "LDRLoss": head(losses.LDRLoss, scored(ldr)),
    "ALDRLoss": head(
        sampled_head, aldr, call=sampled, compiles=False, explains=False, wide=512, **HELD
    ),
    "BiasLoss": head(losses.BiasLoss, bias, **HELD),
    "DatasetEquityLoss": head(losses.DatasetEquityLoss, equity, call=likely, **HELD),
}

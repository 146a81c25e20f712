"""Rows of the catalogue: proxies, centres, fixed classifiers and D x D products."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from catalogue_classes_cases import C, classed, cosines, head, moved, own
from catalogue_table import Call
from torch import Tensor, nn

from fused_losses import losses


def proxy_nca(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    away = F.normalize(x, dim=1)[:, None] - F.normalize(module.weight, dim=1)
    return F.cross_entropy(-away.square().sum(dim=2), labels)


def proxy_anchor(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s = cosines(module, x)
    hot = F.one_hot(labels, C).bool()
    near = torch.where(hot, (-32 * (s - 0.1)).exp(), 0).sum(dim=0).log1p()
    far = torch.where(hot, 0, (32 * (s + 0.1)).exp()).sum(dim=0).log1p()
    return near.sum() / hot.any(dim=0).sum() + far.mean()


def soft_triple(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s = cosines(module, x).view(len(x), C, 10)
    s = ((s / 0.1).softmax(dim=2) * s).sum(dim=2)
    return F.cross_entropy(20 * moved(s, labels, own(s, labels) - 0.01), labels)


def several(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows of three different classes, or two."""
    x, labels = classed(n, d, labels, generator).arguments
    all_three = torch.stack([labels, (labels + 3) % C, (labels + 7) % C], dim=1)
    all_three[::3, 2] = -100
    return Call((x, all_three))


def mlcd(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, rows = cosines(module, x), []
    for row, mine in zip(s, labels, strict=True):
        mine = mine[mine >= 0]
        others = torch.ones(C, dtype=torch.bool).index_fill(0, mine, False)
        near, far = (-64 * row[mine]).exp().sum(), (64 * row[others]).exp().sum()
        rows.append(near.log1p() + far.log1p())
    return torch.stack(rows).mean()


def center(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return ((x - module.weight[labels]) ** 2).sum(dim=1).mean() / 2


def p2s_grad(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return ((cosines(module, x) - F.one_hot(labels, C)) ** 2).mean()


def z_loss(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    o = x @ module.weight.T
    z = (own(o, labels) - o.mean(dim=1)) / (o.var(dim=1, unbiased=False).sqrt() + 1e-12)
    return F.softplus(-z).mean()


def d_simplex(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    n = C - 1
    last = torch.full((1, n), (1 - math.sqrt(1 + n)) / n, dtype=torch.float64)
    points = torch.cat([torch.eye(n, dtype=torch.float64), last])
    vertices = F.normalize(points - points.mean(dim=0)).to(x)
    return F.cross_entropy(x @ vertices.T, labels)


def narrow(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows in as many dimensions as a simplex of C vertices has."""
    return classed(n, C - 1, labels, generator)


def oca(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    f, d = F.normalize(x, dim=1), module.prototypes.shape[1]
    rotation = torch.linalg.matrix_exp(((module.turn - module.turn.T) / 2).double()).to(f)
    old = F.normalize(f[:, :d], dim=1)
    new = F.cross_entropy(f @ rotation.T @ module.weight.T, labels)
    near = F.cross_entropy(old @ module.prototypes.T, labels)
    pull = 1 - F.cosine_similarity(module.prototypes[labels], old)
    return 5 * new + 10 * near + 5 * pull.mean()


def turned(c: int, d: int) -> nn.Module:
    """A head whose rotation is none of zero."""
    generator = torch.Generator().manual_seed(3)
    found = losses.OCALoss(c, d, torch.randn(c, d - 1, generator=generator))
    nn.init.normal_(found.turn, generator=generator)
    return found


CASES = {
    "ProxyNCALoss": head(losses.ProxyNCALoss, proxy_nca),
    "ProxyAnchorLoss": head(losses.ProxyAnchorLoss, proxy_anchor),
    "SoftTripleLoss": head(losses.SoftTripleLoss, soft_triple),
    "MLCDLoss": head(losses.MLCDLoss, mlcd, call=several),
    "CenterLoss": head(losses.CenterLoss, center),
    "P2SGradLoss": head(lambda c, d: losses.P2SGradLoss(d, c), p2s_grad),
    "ZLoss": head(losses.ZLoss, z_loss),
    "DSimplexLoss": head(lambda c, d: losses.DSimplexLoss(c), d_simplex, call=narrow),
    "OCALoss": head(turned, oca),
}

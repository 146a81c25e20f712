"""Rows of the catalogue: losses over the pairs of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from catalogue_table import Case
from torch import Tensor, nn

from fused_losses import losses


def cosines(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All cosines of a batch, and which pairs are positive and negative."""
    unit = F.normalize(x, dim=1)
    same = labels[:, None] == labels[None]
    return unit @ unit.T, same & ~torch.eye(len(x), dtype=torch.bool), ~same


def log_sum(z: Tensor, where: Tensor) -> Tensor:
    return z.masked_fill(~where, -torch.inf).logsumexp(dim=1)


def multi_similarity(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, positive, negative = cosines(x, labels)
    near = torch.where(positive, (-2 * (s - 0.5)).exp(), 0).sum(dim=1)
    far = torch.where(negative, (50 * (s - 0.5)).exp(), 0).sum(dim=1)
    return ((1 + near).log() / 2 + (1 + far).log() / 50).mean()


def circle(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, positive, negative = cosines(x, labels)
    near = log_sum(-80 * (1.4 - s.detach()).relu() * (s - 0.6), positive)
    far = log_sum(80 * (s.detach() + 0.4).relu() * (s - 0.4), negative)
    counted = positive.any(dim=1) & negative.any(dim=1)
    if not counted.any():
        return (x * 0).sum()
    return F.softplus((near + far)[counted]).mean()


def distances(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances of unit rows, 0 with slope 0 from a row to itself, and the pairs."""
    _, positive, negative = cosines(x, labels)
    unit = F.normalize(x, dim=1)
    square = (unit[:, None] - unit).square().sum(dim=2)
    pairs = positive | negative
    return torch.where(pairs, torch.where(pairs, square, 1).sqrt(), 0), positive, negative


def over_nonzero(terms: Tensor) -> Tensor:
    return terms.sum() / (terms > 0).sum().clamp_min(1)


def contrastive(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    d, positive, negative = distances(x, labels)
    return over_nonzero((d - 0.1).relu() * positive) + over_nonzero((1.2 - d).relu() * negative)


def snr(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    _, positive, negative = cosines(x, labels)
    unit = F.normalize(x, dim=1)
    d = (unit - unit[:, None]).var(dim=2) / unit.var(dim=1)[:, None]
    return over_nonzero(d * positive) + over_nonzero((1 - d).relu() * negative)


def margin(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Every triplet, and its two hinges."""
    d, positive, negative = distances(x, labels)
    triplets = positive[:, :, None] & negative[:, None]
    assert isinstance(module.beta, Tensor)
    attract = (d - module.beta + 0.2).relu()[:, :, None] * triplets
    repel = (module.beta + 0.2 - d).relu()[:, None] * triplets
    count = ((attract > 0).sum() + (repel > 0).sum()).clamp_min(1)
    return (attract.sum() + repel.sum() + 0.1 * module.beta * len(x)) / count


def lifted(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    d, positive, negative = distances(x, labels)
    mass = torch.where(negative, (0.9 - d).exp(), 0).sum(dim=1)
    both = mass[:, None] + mass
    some = positive & (both > 0)
    terms = (torch.where(some, both, 1).log() + d).relu().square() / 2
    return (terms * some).sum() / positive.sum().clamp_min(1)


def generalized_lifted(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    d, positive, negative = distances(x, labels)
    counted = positive.any(dim=1) & negative.any(dim=1)
    if not counted.any():
        return (x * 0).sum()
    sums = log_sum(d - 0.1, positive)[counted] + log_sum(1 - d, negative)[counted]
    return sums.relu().mean()


def intra_pair_variance(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, positive, negative = cosines(x, labels)
    near, far = s[positive], s[negative]
    loss = (x * 0).sum()
    if len(near):
        loss = loss + (0.99 * near.mean() - near).relu().square().mean()
    if len(far):
        loss = loss + (far - 1.01 * far.mean()).relu().square().mean()
    return loss


def orthogonal(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, positive, negative = cosines(x, labels)
    near = (s * positive).sum() / (positive.sum().double() + 1e-6)
    return 1 - near + 0.5 * (s * negative).sum() / (negative.sum().double() + 1e-6)


def threshold_consistent(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, positive, negative = cosines(x, labels)
    near, far = over_nonzero((0.9 - s).relu() * positive), over_nonzero((s - 0.5).relu() * negative)
    return near + 2 * far


CASES = {
    "MultiSimilarityLoss": Case(lambda d: losses.MultiSimilarityLoss(), multi_similarity),
    "CircleLoss": Case(lambda d: losses.CircleLoss(), circle, gradcheck=False),
    "ContrastiveLoss": Case(
        lambda d: losses.ContrastiveLoss(pos_margin=0.1, neg_margin=1.2), contrastive
    ),
    "SignalToNoiseRatioContrastiveLoss": Case(
        lambda d: losses.SignalToNoiseRatioContrastiveLoss(), snr
    ),
    "MarginLoss": Case(lambda d: losses.MarginLoss(nu=0.1, learn_beta=True), margin),
    "LiftedStructureLoss": Case(
        lambda d: losses.LiftedStructureLoss(neg_margin=1.0, pos_margin=0.1), lifted
    ),
    "GeneralizedLiftedStructureLoss": Case(
        lambda d: losses.GeneralizedLiftedStructureLoss(pos_margin=0.1), generalized_lifted
    ),
    "IntraPairVarianceLoss": Case(lambda d: losses.IntraPairVarianceLoss(), intra_pair_variance),
    "ThresholdConsistentMarginLoss": Case(
        lambda d: losses.ThresholdConsistentMarginLoss(lambda_minus=2.0),
        threshold_consistent,
    ),
    "OrthogonalProjectionLoss": Case(lambda d: losses.OrthogonalProjectionLoss(), orthogonal),
}

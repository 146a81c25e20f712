"""Rows of the catalogue: a student drawn to a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from catalogue_table import Call, Case
from distillation_formulas import of_scores
from torch import Tensor, nn

from fused_losses import losses

C, A = 11, 5


def both(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows and weights of a student and of a teacher of another width."""
    sizes = (n, d), (C, d), (n, d + 2), (C, d + 2)
    sides = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in sizes)
    return Call((*sides,), dict(labels=labels % C, teacher_grad=True))


def of_kind(kind: str, t: float, **own: float) -> Callable[..., Tensor]:
    def loss(
        _: nn.Module, x: Tensor, w: Tensor, y: Tensor, v: Tensor, *, labels: Tensor, **__: Any
    ) -> Tensor:
        return of_scores(kind, x @ w.T / t, y @ v.T / t, labels, t, **own).mean()

    return loss


def features(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows of two widths."""
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return Call((x, torch.randn(n, d + 2, generator=generator, dtype=torch.float64)))


def alike(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows of one width."""
    return Call((*torch.randn(2, n, d, generator=generator, dtype=torch.float64),))


def rkd(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def distances(t: Tensor) -> Tensor:
        off = ~torch.eye(len(t), dtype=torch.bool)
        square = (t[:, None] - t).square().sum(dim=2)
        found = torch.where(off, torch.where(off, square, 1).sqrt(), 0)
        return found / found[off].mean() if len(t) > 1 else found

    def angles(t: Tensor) -> Tensor:
        apart = F.normalize(t[None] - t[:, None], dim=2)
        return apart @ apart.mT

    away = F.smooth_l1_loss(distances(x), distances(y))
    return away + 2 * F.smooth_l1_loss(angles(x), angles(y))


def cc(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    return (x @ x.T - y @ y.T).square().mean()


def similarity_preserving(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (F.normalize(x @ x.T, dim=1) - F.normalize(y @ y.T, dim=1)).square().mean()


def with_centers(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows of a student and a teacher, and the teacher's class means."""
    means = torch.randn(C, d, generator=generator, dtype=torch.float64)
    return Call((*alike(n, d, labels, generator).arguments, means, labels % C))


def nd(_: nn.Module, x: Tensor, y: Tensor, means: Tensor, labels: Tensor) -> Tensor:
    along = (x * F.normalize(means, dim=1)[labels]).sum(dim=1)
    mine, theirs = x.norm(dim=1), y.norm(dim=1)
    return (1 - along / torch.where(mine > theirs, mine, theirs)).mean()


def with_questions(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows, classes, questions and their answers."""
    sizes = (n, d), (C, d), (A, d)
    sides = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in sizes)
    answers = torch.rand(n, A, generator=generator, dtype=torch.float64)
    return Call((*sides, labels % C, answers))


def multi_aspect(
    _: nn.Module, x: Tensor, w: Tensor, q: Tensor, labels: Tensor, answers: Tensor
) -> Tensor:
    z = x @ q.T
    asked = answers * F.logsigmoid(z) + (1 - answers) * F.logsigmoid(-z)
    return F.cross_entropy(x @ w.T, labels) - asked.mean()


def dcc(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    lengths = x.norm(dim=1) * y.norm(dim=1)
    return (1 - (x * y).sum(dim=1) / (lengths + 1e-6)).sum()


def queue(module: nn.Module, x: Tensor, y: Tensor, **_: Any) -> Tensor:
    of = F.normalize(module.queue, dim=1)
    u, v = (F.normalize(t, dim=1) @ of.T / 0.07 for t in (x, y))
    return of_scores("kl", u, v, torch.zeros(len(x), dtype=torch.int64), 0.07).mean()


def queued(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows of one width, both with a gradient."""
    return Call(alike(n, d, labels, generator).arguments, dict(teacher_grad=True))


def distilled(module: Callable[[], nn.Module], formula: Callable[..., Tensor]) -> Case:
    return Case(lambda d: module(), formula, both)


CASES = {
    "KDLoss": distilled(losses.KDLoss, of_kind("kl", 4.0)),
    "JSDLoss": distilled(losses.JSDLoss, of_kind("jsd", 1.0)),
    "TotalVariationLoss": distilled(losses.TotalVariationLoss, of_kind("tv", 1.0)),
    "LogitMSELoss": distilled(losses.LogitMSELoss, of_kind("mse", 1.0)),
    "DKDLoss": distilled(losses.DKDLoss, of_kind("dkd", 4.0)),
    "OFALoss": distilled(losses.OFALoss, of_kind("ofa", 1.0)),
    "PSKDLoss": distilled(losses.PSKDLoss, of_kind("pskd", 1.0)),
    "DHKDLoss": distilled(losses.DHKDLoss, of_kind("bernoulli", 2.0)),
    "RKDLoss": Case(lambda d: losses.RKDLoss(), rkd, features, wide=64),
    "CCLoss": Case(lambda d: losses.CCLoss(), cc, features),
    "SimilarityPreservingLoss": Case(
        lambda d: losses.SimilarityPreservingLoss(), similarity_preserving, features
    ),
    "NDLoss": Case(lambda d: losses.NDLoss(), nd, with_centers),
    "MultiAspectKDLoss": Case(lambda d: losses.MultiAspectKDLoss(), multi_aspect, with_questions),
    "DCCLoss": Case(lambda d: losses.DCCLoss(), dcc, alike),
    "FeatureQueueKDLoss": Case(
        lambda d: losses.FeatureQueueKDLoss(d, 29), queue, queued, gradcheck=False
    ),
}

"""Rows of the catalogue: losses of sets of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from catalogue_table import Call, Case, labelled
from pair_formulas import divergence, gaussian, hsic, qmi
from pair_rows import Inputs, distance, square_distance, unit
from set_draws import alignment, covariances, diagonal, rate
from torch import Tensor, nn
from transport_formulas import debiased, foa, plan, potentials

from fused_losses import losses


def two(n: int, d: int, _: Tensor, generator: torch.Generator) -> Call:
    """Samples of two sizes."""
    x, y = (torch.randn(k, d, generator=generator).double() for k in (n, n + 3))
    return Call((x / d**0.5, (y + 0.3) / d**0.5))


def paired(n: int, d: int, _: Tensor, generator: torch.Generator) -> Call:
    """Two features of the same samples."""
    x, y = (torch.randn(n, k, generator=generator).double() for k in (d, 2))
    return Call((x, x[:, :1] + 0.3 * y))


def predicted(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    x, y = paired(n, d, labels, generator).arguments
    return Call((x, y, y + 0.2 * torch.randn(y.shape, generator=generator).double()))


def transport(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    c = square_distance(x, y)
    f, g = potentials(c, 0.5, 20)
    return (plan(c.detach(), 0.5, f, g).to(c.dtype) * c).sum()


def median(*rows: Tensor) -> float:
    """Of the distances of all rows of these together."""
    x = torch.cat(rows).detach()
    i, j = torch.triu_indices(len(x), len(x), 1)
    return float(distance(x, x)[i, j].median())


def median_mmd(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    width = median(x, y)
    k = [gaussian(a, b, width) for a, b in ((x, x), (y, y), (x, y))]
    return k[0].mean() + k[1].mean() - 2 * k[2].mean()


def modulo(classes: int) -> Callable[..., Call]:
    """A batch whose labels are of so few classes."""

    def call(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
        return labelled(n, d, labels % classes, generator)

    return call


def reduction(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    x = unit(x)
    parts = sum(rate(x, (labels == k).to(x)) for k in labels.unique())
    return (parts - rate(x, torch.ones_like(x[:, 0]))) / len(x)


def alignment_to_classes(m: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    apart = x[:, None] - m.means.to(x)
    inverse = m.covariance.double().inverse().to(x)
    d = torch.einsum("ncd,cde,nce->nc", apart, inverse, apart)
    return (d[torch.arange(len(d)), labels] / d.sum(1)).log().mean()


def naive_bayes(m: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(diagonal(x, m.means, m.log_variance.exp()), labels)


def spread_classes(d: int) -> nn.Module:
    means = torch.randn(4, d)
    return losses.ClassAwareFeatureAlignmentLoss(means, covariances(means).float())


CASES = {
    "CKALoss": Case(
        lambda d: losses.CKALoss(), lambda _, x, y: 1 - alignment(Inputs(x=x, y=y)), paired
    ),
    "CodingRateLoss": Case(
        # how many classes there are, and of how many rows, is read on the host
        lambda d: losses.CodingRateLoss(),
        reduction,
        modulo(5),
        compiles=False,
    ),
    "ClassAwareFeatureAlignmentLoss": Case(spread_classes, alignment_to_classes, modulo(4)),
    "GaussianNaiveBayesLoss": Case(
        lambda d: losses.GaussianNaiveBayesLoss(5, d), naive_bayes, modulo(5)
    ),
    "MMDLoss": Case(
        lambda d: losses.MMDLoss(bandwidth="median"),
        median_mmd,
        two,
        gradcheck=False,
        compiles=False,  # a median reads its counts on the host
    ),
    "HSICLoss": Case(
        lambda d: losses.HSICLoss(1.3, 0.8),
        lambda _, x, y: hsic(Inputs(x=x, y=y)),
        paired,
        float64=1e-8,
    ),
    "CSQMILoss": Case(
        lambda d: losses.CSQMILoss(1.3, 0.8), lambda _, x, y: qmi(Inputs(x=x, y=y)), paired
    ),
    "CauchySchwarzDivergenceLoss": Case(
        lambda d: losses.CauchySchwarzDivergenceLoss(1.3, 0.8),
        lambda _, x, y, z: divergence(Inputs(x=x, y=y, z=z)),
        predicted,
    ),
    "SinkhornLoss": Case(lambda d: losses.SinkhornLoss(0.5, 20), transport, two, gradcheck=False),
    "SinkhornDivergenceLoss": Case(
        lambda d: losses.SinkhornDivergenceLoss(0.5, 20),
        lambda _, x, y: debiased(Inputs(x=x, y=y), "sqeuclidean"),
        two,
    ),
    "FeatureOptimalAlignmentLoss": Case(
        lambda d: losses.FeatureOptimalAlignmentLoss(),
        lambda _, x, y: 1 - foa(x, y)[0],
        two,
        gradcheck=False,
        compiles=False,  # the host reads when to stop
    ),
}

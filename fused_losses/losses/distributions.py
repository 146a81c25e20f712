"""Losses of sets of rows: kernels, transport, spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.base import plans
from fused_losses.functions.gaussian_classes import class_aware_alignment, gaussian_cross_entropy
from fused_losses.losses.module import Loss
from fused_losses.losses.registry import entry
from fused_losses.similarity.bandwidth import median_bandwidth
from fused_losses.similarity.grams import cka, coding_rate
from fused_losses.similarity.kernel_means import (
    cauchy_schwarz_divergence,
    cauchy_schwarz_qmi,
    hsic,
    mmd,
)
from fused_losses.similarity.sinkhorn import sinkhorn
from fused_losses.similarity.sinkhorn_divergence import sinkhorn_divergence


class SetLoss(Loss):
    """One number of whole sets of rows: precision and backend, and no reduction."""

    def __init__(self, *, precision: str = "fp32", backend: str | None = None) -> None:
        super().__init__(precision=precision, backend=backend)

    def common(self) -> dict[str, Any]:
        return dict(precision=self.precision, backend=self.backend)


Width = float | Tensor | str


def _width(given: Width, backend: str | None, *rows: Tensor) -> float | Tensor:
    """A bandwidth; "median": that of the distances of these rows, a constant of the call."""
    if not isinstance(given, str):
        return given
    if given != "median":
        raise ValueError(f"bandwidth: expected a number, a tensor or 'median', got {given!r}")
    found = median_bandwidth(torch.cat([r.detach() for r in rows]), backend=backend)
    return 1.0 if plans.explaining() else float(found)


@entry("Gretton et al., A Kernel Two-Sample Test", 2012, block="distributions", primitive="pairs")
class MMDLoss(SetLoss):
    """`mmd` of two samples, squared: mean k(x, x') + mean k(y, y') - 2 mean k(x, y).

    loss(x [N, D], y [M, D]). Args: kernel "gaussian" or "laplacian", bandwidth > 0 (a number, a
    tensor, or "median": the exact median distance of both samples together), unbiased. Time
    O((N + M)^2 D), memory O((N + M) D).
    """

    def __init__(
        self,
        kernel: str = "gaussian",
        bandwidth: Width = 1.0,
        *,
        unbiased: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.kernel, self.bandwidth, self.unbiased = kernel, bandwidth, unbiased

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        width = _width(self.bandwidth, self.backend, x, y)
        return mmd(x, y, self.kernel, width, unbiased=self.unbiased, **self.common())


class PairedKernels(SetLoss):
    """Gaussian kernels of two features of the same samples.

    Args: x_bandwidth, y_bandwidth > 0, numbers, tensors or "median", the exact median distance.
    """

    def __init__(
        self,
        x_bandwidth: Width = 1.0,
        y_bandwidth: Width = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.x_bandwidth, self.y_bandwidth = x_bandwidth, y_bandwidth

    def widths(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        own = dict(x_bandwidth=_width(self.x_bandwidth, self.backend, x))
        return own | dict(y_bandwidth=_width(self.y_bandwidth, self.backend, y)) | self.common()


@entry(
    "Gretton et al., Measuring Statistical Dependence with Hilbert-Schmidt Norms",
    2005,
    block="distributions",
    primitive="pairs",
)
class HSICLoss(PairedKernels):
    """`hsic`, biased: tr(K H L H) / N^2 of Gaussian kernels, 0 of independent features.

    loss(x [N, Dx], y [N, Dy]). Args: bandwidths > 0, numbers, tensors or "median". Time
    O(N^2 (Dx + Dy)), memory O(N (Dx + Dy)).
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return hsic(x, y, **self.widths(x, y))


@entry(
    "Yu et al., Cauchy-Schwarz Divergence Information Bottleneck for Regression",
    2024,
    block="distributions",
    primitive="pairs",
)
class CSQMILoss(PairedKernels):
    """`cauchy_schwarz_qmi` in nats (the authors' code is in bits): what two features tell.

    loss(x [N, Dx], y [N, Dy]). Args: bandwidths > 0, numbers, tensors or "median". Time
    O(N^2 (Dx + Dy)), memory O(N (Dx + Dy)).
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cauchy_schwarz_qmi(x, y, **self.widths(x, y))


@entry(
    "Yu et al., Cauchy-Schwarz Divergence Information Bottleneck for Regression",
    2024,
    block="distributions",
    primitive="pairs",
    golden=("cs_div",),
)
class CauchySchwarzDivergenceLoss(SetLoss):
    """`cauchy_schwarz_divergence` of p(target | x) and p(predicted | x), in nats.

    loss(x [N, Dx], target [N, Dy], predicted [N, Dy]). Args: bandwidth of x and, unless
    target_bandwidth is given, of targets; the authors' code has 1 and is in bits (1 / ln 2 of
    this). Time O(N^2 (Dx + Dy)), memory O(N (Dx + Dy)).
    """

    def __init__(
        self,
        bandwidth: float | Tensor = 1.0,
        target_bandwidth: float | Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.bandwidth, self.target_bandwidth = bandwidth, target_bandwidth

    def forward(self, x: Tensor, target: Tensor, predicted: Tensor) -> Tensor:
        own = dict(bandwidth=self.bandwidth, target_bandwidth=self.target_bandwidth)
        return cauchy_schwarz_divergence(x, target, predicted, **own, **self.common())


class TransportLoss(SetLoss):
    """What the losses of an entropic transport share.

    Args: as in `sinkhorn`.
    """

    def __init__(
        self,
        eps: float = 0.1,
        iterations: int = 100,
        tolerance: float | None = None,
        *,
        cost: str = "sqeuclidean",
        unbalanced: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.eps, self.iterations, self.tolerance = eps, iterations, tolerance
        self.cost, self.unbalanced = cost, unbalanced

    def common(self) -> dict[str, Any]:
        own = dict(eps=self.eps, iterations=self.iterations, tolerance=self.tolerance)
        return own | dict(cost=self.cost, unbalanced=self.unbalanced) | super().common()


@entry(
    "Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport",
    2013,
    block="distributions",
    primitive="pairs",
)
class SinkhornLoss(TransportLoss):
    """`sinkhorn`'s cost sum T C, with the gradient of T held fixed.

    loss(x [N, D], y [M, D]) of equal masses. Args: eps, iterations, tolerance, cost, unbalanced as
    in the function. Time O(iterations N M D), memory O((N + M) D).
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn(x, y, **self.common()).cost


@entry(
    "Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn Divergences",
    2019,
    block="distributions",
    primitive="pairs",
)
class SinkhornDivergenceLoss(TransportLoss):
    """`sinkhorn_divergence`: OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, 0 where both agree.

    loss(x [N, D], y [M, D]) of equal masses. Args: as in the function, here |x - y|^2 the cost.
    Time O(iterations (N + M)^2 D), memory O((N + M) D).
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, **self.common())


@entry(
    "Jia et al., Adversarial Attacks against Closed-Source MLLMs via Feature Optimal Alignment",
    2025,
    block="distributions",
    primitive="pairs",
)
class FeatureOptimalAlignmentLoss(TransportLoss):
    """FOA-Attack's local term, `sinkhorn` of cosines with the authors' stop: sum T (1 - cos).

    loss(features [N, D], target [M, D]), both centres of k-means there. 1 less the authors' score
    sum T cos, which they raise (weight 0.2, beside a cosine of global features). T is held fixed.
    Args: eps, iterations, tolerance (of the mean change of the scalings) are theirs. Time
    O(iterations N M D), memory O((N + M) D).
    """

    def __init__(
        self,
        eps: float = 0.1,
        iterations: int = 100,
        tolerance: float | None = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(eps, iterations, tolerance, cost="cosine", **options)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return sinkhorn(features, target, stop="scalings", **self.common()).cost


@entry(
    "Kornblith et al., Similarity of Neural Network Representations Revisited",
    2019,
    block="distributions",
    primitive="rows",
)
class CKALoss(nn.Module):
    """1 - `cka`, linear: features drawn to those of another layer or model, of any width.

    loss(x [N, Dx], y [N, Dy]) of the same samples. Time O(N (Dx + Dy)^2), memory
    O(N (Dx + Dy) + (Dx + Dy)^2): D x D Grams alone.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - cka(x, y)


@entry(
    "Yu et al., Learning Diverse and Discriminative Representations via Maximal Coding Rate "
    "Reduction",
    2020,
    block="distributions",
    primitive="rows",
)
class CodingRateLoss(nn.Module):
    """Less the rate reduction of MCR^2: R_c - R by `coding_rate`, classes short, all of them wide.

    loss(x [N, D], labels [N]), or loss(x, membership=[N, K] >= 0), soft (Ding et al., 2023, make
    it doubly stochastic: `sinkhorn(...).apply`). Args: eps (0.5 in the paper), normalize: rows of
    norm 1, as there. Time O(N D^2 + K D^3), memory O(N D + K D^2).
    """

    def __init__(self, eps: float | Tensor = 0.5, *, normalize: bool = True) -> None:
        super().__init__()
        self.eps, self.normalize = eps, normalize

    def forward(
        self, x: Tensor, labels: Tensor | None = None, membership: Tensor | None = None
    ) -> Tensor:
        if (labels is None) == (membership is None):
            raise ValueError("labels, membership: expected one of them, got both or neither")
        own: dict[str, Any] = dict(eps=self.eps, normalize=self.normalize)
        parts = coding_rate(x, labels=labels, membership=membership, **own)
        return parts - coding_rate(x, **own)


@entry(
    "Jung et al., CAFA: Class-Aware Feature Alignment for Test-Time Adaptation",
    2022,
    block="distributions",
    primitive="rows",
)
class ClassAwareFeatureAlignmentLoss(Loss):
    """`class_aware_alignment`: log of the squared Mahalanobis distance to the predicted class'
    Gaussian, less that of the sum over all classes.

    As the loss is remembered, not verified: the authors' code was not at hand.
    loss(x [N, D], labels [N], the model's predictions). Args: means [C, D], covariance [C, D, D]
    of the source's features, buffers. Time O(C D^3 + N C D^2), memory O(N D + C D^2).
    """

    def __init__(self, means: Tensor, covariance: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.means: Tensor
        self.covariance: Tensor
        self.register_buffer("means", means)
        self.register_buffer("covariance", covariance)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return class_aware_alignment(x, labels, self.means, self.covariance, **self.common())


@entry(
    "Zheng et al., Revisiting Discriminative vs. Generative Classifiers: Theory and Implications",
    2023,
    block="distributions",
    primitive="distances",
)
class GaussianNaiveBayesLoss(Loss):
    """`gaussian_cross_entropy` of classes with a mean and a diagonal variance that learn.

        loss_i = log sum_c e^(score_ic) - score_i,label,    score = log N(x; mean_c, variance_c)

    loss(x [N, D], labels [N]). Args: num_classes, dim. Parameters: means [C, D] (standard normal),
    log_variance [C, D] (0). Time O(N C D), memory O(N D + C D) and a block.
    """

    def __init__(self, num_classes: int, dim: int, **options: Any) -> None:
        super().__init__(**options)
        self.means = nn.Parameter(torch.randn(num_classes, dim))
        self.log_variance = nn.Parameter(torch.zeros(num_classes, dim))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        variance = self.log_variance.exp()
        return gaussian_cross_entropy(x, labels, self.means, variance=variance, **self.common())

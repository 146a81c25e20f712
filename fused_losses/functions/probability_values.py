"""Losses of the label's probability alone, p of a softmax over all classes: robust and focal ones.

Each is a way for `Softmax` to end, so that it goes wherever that goes: margins, sub-centres,
several labels a row, samples of the classes, shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_losses.base.parameters import check_above, check_parameter
from fused_losses.functions.class_values import Softmax, check_floats
from fused_losses.margins import Margin


@dataclass(frozen=True)
class OfProbability(Softmax):
    """What they share: p = e^{z_y} / sum_j e^{z_j}, z = scale <x, w>, z_y after the margin.

    margin: None or as in `Softmax`. scale: > 0; 1 and `normalize=False` for plain logits.
    """

    margin: Margin | None = field(default=None, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    gradient: str = field(default="exact", kw_only=True)


@dataclass(frozen=True)
class CompSum(OfProbability):
    """(p^{tau - 1} - 1) / (1 - tau): comp-sum losses (Mao, Mohri, Zhong, 2023).

    tau >= 0: 0 sum-exponential, 1 cross entropy, between 1 and 2 generalised cross entropy, 2 mean
    absolute error. Below 1 the loss has no bound, and float32 none where p < 1e-38.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_floats(check_parameter, tau=self.tau)
        check_parameter("tau", self.tau, 0)

    def end(self, log_p: Tensor, log_rest: Tensor) -> Tensor:  # noqa: ARG002 (a hook)
        return _box_cox(log_p, self.tau - 1)


@dataclass(frozen=True)
class GCE(OfProbability):
    """(1 - p^q) / q: generalised cross entropy (Zhang, Sabuncu, 2018).

    q in (0, 1]; near 0 cross entropy, at 1 mean absolute error. k in [0, 1): truncated, the loss of
    a smaller p is that of k, and has no gradient. The authors' are q = 0.7, k = 0.5.
    """

    q: float = 0.7
    k: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_floats(check_above, q=self.q)
        check_floats(check_parameter, k=self.k)
        check_parameter("q", self.q, 0, 1)
        if not 0 <= self.k < 1:
            raise ValueError(f"k: expected a value in [0, 1), got {self.k}")

    def end(self, log_p: Tensor, log_rest: Tensor) -> Tensor:  # noqa: ARG002 (a hook)
        floor = math.log(self.k) if self.k else -math.inf
        return _box_cox(torch.where(log_p < floor, floor, log_p), self.q)


@dataclass(frozen=True)
class MAE(OfProbability):
    """sum_j |p_j - [j = y]| = 2 (1 - p): mean absolute error (Ghosh, Kumar, Sastry, 2017)."""

    def end(self, log_p: Tensor, log_rest: Tensor) -> Tensor:  # noqa: ARG002 (a hook)
        return 2 * log_rest.exp()


@dataclass(frozen=True)
class AGCE(OfProbability):
    """((a + 1)^q - (a + p)^q) / q: asymmetric generalised cross entropy (Zhou et al., 2021).

    a > 0, q > 0.
    """

    a: float = 1.0
    q: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_floats(check_above, a=self.a, q=self.q)

    def end(self, log_p: Tensor, log_rest: Tensor) -> Tensor:  # noqa: ARG002 (a hook)
        # of 1 - p, so that near p = 1 nothing cancels
        return _power_below(self.a + 1, -log_rest.exp(), self.q)


@dataclass(frozen=True)
class AUL(OfProbability):
    """((a - p)^q - (a - 1)^q) / q: asymmetric unhinged loss (Zhou et al., 2021).

    a > 1, q > 0.
    """

    a: float = 2.0
    q: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_floats(check_above, a=self.a, q=self.q)
        if not self.a > 1:
            raise ValueError(f"a: expected a value > 1, got {self.a}")

    def end(self, log_p: Tensor, log_rest: Tensor) -> Tensor:  # noqa: ARG002 (a hook)
        return -_power_below(self.a - 1, log_rest.exp(), self.q)


@dataclass(frozen=True)
class SCE(OfProbability):
    """-alpha log p + beta A (1 - p): symmetric cross entropy (Wang et al., 2019).

    The second term is the cross entropy of the other direction, in which log 0 counts as -A. alpha,
    beta >= 0, A > 0; the authors' logarithm of 1e-4 is A = 9.21.
    """

    alpha: float = 0.1
    beta: float = 1.0
    A: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_floats(check_parameter, alpha=self.alpha, beta=self.beta)
        check_floats(check_above, A=self.A)
        for name in ("alpha", "beta"):
            check_parameter(name, getattr(self, name), 0)

    def end(self, log_p: Tensor, log_rest: Tensor) -> Tensor:
        return -self.alpha * log_p + self.beta * self.A * log_rest.exp()


@dataclass(frozen=True)
class Focal(OfProbability):
    """-(1 - p)^gamma log p: focal loss of a softmax (Lin et al., 2017). gamma >= 0."""

    gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_floats(check_parameter, gamma=self.gamma)
        check_parameter("gamma", self.gamma, 0)

    def end(self, log_p: Tensor, log_rest: Tensor) -> Tensor:
        return -(self.gamma * log_rest).exp() * log_p if self.gamma else -log_p


@dataclass(frozen=True)
class Poly1(OfProbability):
    """-log p + epsilon (1 - p): PolyLoss of degree one (Leng et al., 2022). epsilon >= -1."""

    epsilon: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_floats(check_parameter, epsilon=self.epsilon)
        check_parameter("epsilon", self.epsilon, -1)

    def end(self, log_p: Tensor, log_rest: Tensor) -> Tensor:
        return -log_p + self.epsilon * log_rest.exp()


def _box_cox(log_p: Tensor, power: float) -> Tensor:
    """(1 - p^power) / power, -log p at 0; exact near p = 1."""
    return -_expm1(power * log_p) / power if power else -log_p


def _power_below(base: float, step: Tensor, q: float) -> Tensor:
    """(base^q - (base + step)^q) / q, without cancellation where the step is small."""
    return -(base**q) * _expm1(q * torch.log1p(step / base)) / q


def _expm1(z: Tensor) -> Tensor:
    """torch's takes its slope for 1 + its value, which below has no digits."""
    return torch.where(z < -1, z.exp() - 1, z.expm1())

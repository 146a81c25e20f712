"""Margins: what a head does to the cosine of the target class, as small functions of that cosine.

Every margin maps the target cosine t = cos(theta) to the cosine that enters the softmax:
    z_y = scale * margin(t),    z_j = scale * cos(theta_j) for the other classes.
Any callable on an [N] tensor is a margin; those of this file are the field's own. Their numbers are
checked when they are made (ValueError, TypeError); `margin`, `std`, `h`, MagFace's two margins and
its penalty's weight, m1, m2 and m3 may be tensors, scalar or one value a row, and get a gradient.

A margin with `uses_norm` is called with the embeddings' norms [N] besides, one with `uses_present`
also with present [N] bool, False where a row has no target.

A margin with a method `bend` also moves the other classes: bend(target cosines [N]) -> [4, N] gives
each row a threshold and a polynomial, (t_i, p_i, q_i, r_i), with which a cosine c > t_i of another
class becomes p_i + q_i c + r_i c^2. It is called once a loss, before the margin itself, with NaN
for a row without a target; neither its argument nor what it returns has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.base.angles import BEYOND_PI as BEYOND_PI
from fused_losses.base.angles import angle as angle
from fused_losses.base.angles import check_convention, combined_margin
from fused_losses.base.parameters import check_above, check_angle, check_margin, check_parameter

Margin = Callable[..., Tensor]


def _check_cosine(name: str, value: float | Tensor) -> None:
    """That it can be taken from a cosine, which is 2 wide."""
    check_parameter(name, value, 0, 2, carries=True)


@dataclass(frozen=True)
class CombinedMargin:
    """cos(m1 theta + m2) - m3, all three at once (Deng et al., ArcFace, 2019, section 2.3).

    m1 >= 1 multiplies the angle, m2 in [0, pi] is added to it (radians), m3 in [0, 2] is taken from
    the cosine.
    """

    m1: float | Tensor = 1.0
    m2: float | Tensor = 0.3
    m3: float | Tensor = 0.2
    beyond_pi: str = "monotone"
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_parameter("m1", self.m1, 1, carries=True)
        check_angle("m2", self.m2)
        _check_cosine("m3", self.m3)
        check_parameter("eps", self.eps, 0, 1)
        check_convention(self.beyond_pi, self.m1)

    def __call__(self, cosine: Tensor) -> Tensor:
        return combined_margin(cosine, self.m1, self.m2, self.m3, self.beyond_pi, self.eps)


@dataclass(frozen=True)
class ArcFace:
    """cos(theta + margin), margin in radians, [0, pi] (Deng et al., 2019)."""

    margin: float | Tensor = 0.5
    beyond_pi: str = "linear"
    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_angle("margin", self.margin)
        check_parameter("eps", self.eps, 0, 1)
        check_convention(self.beyond_pi, 1.0)

    def __call__(self, cosine: Tensor) -> Tensor:
        return combined_margin(cosine, 1.0, self.margin, 0.0, self.beyond_pi, self.eps)


@dataclass(frozen=True)
class CosFace:
    """cos(theta) - margin, margin in [0, 2] (Wang et al., 2018; AM-softmax)."""

    margin: float | Tensor = 0.35

    def __post_init__(self) -> None:
        _check_cosine("margin", self.margin)

    def __call__(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin


@dataclass(frozen=True)
class SphereFace:
    """(-1)^k cos(m theta) - 2k, k = floor(m theta / pi), margin m >= 1 (Liu et al., 2017).

    The paper's scale is the norm of the embedding: give it as `scale=embeddings.norm(dim=1)`.
    """

    margin: float | Tensor = 4.0
    beyond_pi: str = "monotone"

    def __post_init__(self) -> None:
        check_parameter("margin", self.margin, 1, carries=True)
        check_convention(self.beyond_pi, self.margin)

    def __call__(self, cosine: Tensor) -> Tensor:
        return combined_margin(cosine, self.margin, 0.0, 0.0, self.beyond_pi)


def assign_margins(draws: Tensor, cosine: Tensor, plus: str | None) -> Tensor:
    """Give each row its margin: as drawn, or by how close the row is to its centre.

    `rank`: the closer to the centre the smaller the margin (the paper's text). `reference`: the
    authors' code, which gathers with the permutation where its inverse was meant. draws [N].
    """
    if plus is None:
        return draws
    order = torch.argsort(cosine.detach(), descending=True, stable=True)
    ascending = torch.sort(draws).values
    if plus == "reference":
        return ascending[order]
    return torch.empty_like(ascending).scatter(0, order, ascending)


@dataclass(frozen=True)
class _Elastic:
    """Margins drawn per row from N(margin, std^2), once a call (Boutros et al., 2022)."""

    margin: float | Tensor
    std: float | Tensor
    plus: str | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.plus not in (None, "rank", "reference"):
            raise ValueError(f"plus: expected None, 'rank' or 'reference', got {self.plus!r}")
        check_parameter("std", self.std, 0, carries=True)

    def draw(self, cosine: Tensor) -> Tensor:
        """One margin a row, before `plus` reassigns them. [N]"""
        if self.generator is None:
            noise = torch.randn_like(cosine)  # torch.compile traces it for any N
        else:
            noise = torch.randn(
                cosine.shape, generator=self.generator, dtype=cosine.dtype, device=cosine.device
            )
        return self.margin + self.std * noise

    def margins(self, cosine: Tensor) -> Tensor:
        return assign_margins(self.draw(cosine), cosine, self.plus)


@dataclass(frozen=True)
class ElasticArcFace(_Elastic):
    """ArcFace with a margin drawn per row; `plus` as in `assign_margins`."""

    margin: float | Tensor = 0.5
    std: float | Tensor = 0.0125
    beyond_pi: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_angle("margin", self.margin)
        check_convention(self.beyond_pi, 1.0)

    def __call__(self, cosine: Tensor) -> Tensor:
        return combined_margin(cosine, 1.0, self.margins(cosine), 0.0, self.beyond_pi)


@dataclass(frozen=True)
class ElasticCosFace(_Elastic):
    """CosFace with a margin drawn per row; `plus` as in `assign_margins`."""

    margin: float | Tensor = 0.35
    std: float | Tensor = 0.0125

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_cosine("margin", self.margin)

    def __call__(self, cosine: Tensor) -> Tensor:
        return cosine - self.margins(cosine)


class AdaFace(nn.Module):
    """Margin by image quality, read off the embedding's norm (Kim et al., 2022).

    zhat = clip(h (|x| - mean) / (std + 1e-3), -1, 1), detached; the target becomes
    cos(clip(theta - margin zhat, eps, pi - eps)) - margin (1 + zhat).
    Batch mean and (unbiased) std of the norm are moving averages with weight `momentum`, updated
    before use while training, by the rows that are present and no NaN; a batch of one such row
    leaves the std as it was. They are buffers. margin in [0, 1], h >= 0.
    """

    uses_norm = uses_present = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        margin: float | Tensor = 0.4,
        h: float | Tensor = 0.333,
        momentum: float = 0.01,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        check_parameter("margin", margin, 0, 1, carries=True)
        check_parameter("h", h, 0, carries=True)
        check_parameter("momentum", momentum, 0, 1)
        check_above("eps", eps)
        self.margin, self.h, self.momentum, self.eps = margin, h, momentum, eps
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def forward(  # [N], [N], [N] bool -> [N]
        self, cosine: Tensor, norm: Tensor, present: Tensor | None = None
    ) -> Tensor:
        norm = norm.detach().clamp(0.001, 100)
        if self.training:
            self._observe(norm, ~norm.isnan() if present is None else present & ~norm.isnan())
        mean, std = self.mean.to(norm), self.std.to(norm)
        zhat = (self.h * (norm - mean) / (std + self.eps)).clamp(-1, 1)
        shifted = combined_margin(cosine, 1.0, -self.margin * zhat, 0.0, "clip", self.eps)
        return shifted - self.margin * (1 + zhat)

    @torch.no_grad()
    def _observe(self, norm: Tensor, counted: Tensor) -> None:
        n = counted.sum()
        mean = torch.where(counted, norm, 0).sum() / n
        square = torch.where(counted, norm - mean, 0).square().sum() / (n - 1)
        for average, seen, enough in ((self.mean, mean, n > 0), (self.std, square.sqrt(), n > 1)):
            seen = torch.where(enough, seen.to(average), average)  # 0 / 0 must not stay for good
            average.lerp_(seen, self.momentum)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, h={self.h}, momentum={self.momentum}"


@dataclass(frozen=True)
class MagFace:
    """ArcFace with a margin that grows with |x|, and a penalty that rewards long embeddings.

    m(a) rises linearly from l_margin at a = l_a to u_margin at a = u_a, a = clamp(|x|, l_a, u_a);
    penalty(a) = penalty_weight (a / u_a^2 + 1 / a), added to each row's loss. Both send their
    gradient to |x| inside the clamp (Meng et al., 2021). In a loss with class weights a row's
    penalty counts with its class's weight, as its cross entropy does. 0 < l_a < u_a.
    """

    l_a: float = 10.0
    u_a: float = 110.0
    l_margin: float | Tensor = 0.45
    u_margin: float | Tensor = 0.8
    penalty_weight: float | Tensor = 35.0
    beyond_pi: str = "easy"

    uses_norm = True

    def __post_init__(self) -> None:
        check_above("l_a", self.l_a)
        check_above("u_a", self.u_a, self.l_a)
        check_angle("l_margin", self.l_margin)
        check_angle("u_margin", self.u_margin)
        check_parameter("penalty_weight", self.penalty_weight, 0, carries=True)
        check_convention(self.beyond_pi, 1.0)

    def __call__(self, cosine: Tensor, norm: Tensor) -> Tensor:  # [N], [N] -> [N]
        slope = (self.u_margin - self.l_margin) / (self.u_a - self.l_a)
        margin = slope * (norm.clamp(self.l_a, self.u_a) - self.l_a) + self.l_margin
        return combined_margin(cosine, 1.0, margin, 0.0, self.beyond_pi)

    def penalty(self, norm: Tensor) -> Tensor:  # [N] -> [N]
        norm = norm.clamp(self.l_a, self.u_a)
        return self.penalty_weight * (norm / self.u_a**2 + 1 / norm)


class CurricularFace(nn.Module):
    """ArcFace whose hard classes count by an average of the targets' cosines (Huang et al., 2020).

    A class with cos(theta_j) > cos(theta_y + margin), theta_y + margin past pi or not, enters with
    cos(theta_j) (t + cos(theta_j)). t, a buffer, is a moving average with weight `momentum` of the
    batch's mean target cosine, updated while training by `bend`, before use; NaN and Inf do not
    count. Neither t nor the threshold has a gradient. margin in radians, [0, pi].
    """

    t: Tensor

    def __init__(self, margin: float | Tensor = 0.5, momentum: float = 0.01) -> None:
        super().__init__()
        check_angle("margin", margin)
        check_parameter("momentum", momentum, 0, 1)
        self.margin, self.momentum = margin, momentum
        self.register_buffer("t", torch.tensor(0.0))

    def forward(self, cosine: Tensor) -> Tensor:  # [N] -> [N]
        return combined_margin(cosine, 1.0, self.margin, 0.0, "linear")

    @torch.no_grad()
    def bend(self, cosine: Tensor) -> Tensor:  # [N] -> [4, N]
        if self.training:
            self._observe(cosine)
        threshold = combined_margin(cosine, 1.0, self.margin, 0.0, "none")
        t = self.t.to(cosine).expand_as(cosine)
        return torch.stack((threshold, torch.zeros_like(t), t, torch.ones_like(t)))

    def _observe(self, cosine: Tensor) -> None:
        mean = cosine.nan_to_num(math.nan, math.nan, math.nan).nanmean().to(self.t)
        self.t.lerp_(torch.where(mean.isnan(), self.t, mean), self.momentum)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, momentum={self.momentum}"


@dataclass(frozen=True)
class MVSoftmax:
    """A margin that also lifts the classes it leaves misclassified (MV-Softmax, Wang et al., 2020).

    f(t) is ArcFace (`base="arc"`) or CosFace ("am"). A class with cos(theta_j) > f(t) has its term
    of the softmax times h = exp(s hardness (cos(theta_j) + 1)) (`weighting="adaptive"`), or
    exp(s hardness) ("fixed"): its cosine becomes (1 + hardness) cos + hardness, or cos + hardness.
    hardness >= 0 is the paper's t (FaceX-Zoo's mv_weight is 1 + t); 0 is the margin alone.
    """

    base: str = "arc"
    margin: float | Tensor = 0.5  # radians in [0, pi]; of CosFace in [0, 2]
    hardness: float = 0.2
    weighting: str = "adaptive"
    beyond_pi: str = "linear"  # of ArcFace

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("base", self.base, ("arc", "am")),
            ("weighting", self.weighting, ("adaptive", "fixed")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        (_check_cosine if self.base == "am" else check_angle)("margin", self.margin)
        check_parameter("hardness", self.hardness, 0)
        check_convention(self.beyond_pi, 1.0)

    def __call__(self, cosine: Tensor) -> Tensor:
        if self.base == "am":
            return cosine - self.margin
        return combined_margin(cosine, 1.0, self.margin, 0.0, self.beyond_pi)

    @torch.no_grad()
    def bend(self, cosine: Tensor) -> Tensor:  # [N] -> [4, N]
        slope = 1 + self.hardness if self.weighting == "adaptive" else 1.0
        lift, slope, square = (
            torch.full_like(cosine, value) for value in (self.hardness, slope, 0.0)
        )
        return torch.stack((self(cosine), lift, slope, square))


class InterclassFilter(nn.Module):
    """A margin, and classes too close to a row left out as likely mislabelled (An et al., 2022).

    Another class with a cosine above `threshold` counts with the logit 0 (exp 0 = 1 stays in the
    denominator) and sends no gradient, as insightface's `interclass_filtering_threshold` has it.
    margin: any margin that bends nothing itself, or None.
    """

    def __init__(self, margin: Margin | None, threshold: float = 0.4) -> None:
        super().__init__()
        if hasattr(margin, "bend"):
            raise ValueError(f"margin: expected one that bends no other class, got {margin!r}")
        check_margin(margin)
        check_parameter("threshold", threshold, -1)
        self.margin, self.threshold = margin, threshold

    @property
    def uses_norm(self) -> bool:
        return getattr(self.margin, "uses_norm", False)

    @property
    def uses_present(self) -> bool:
        return getattr(self.margin, "uses_present", False)

    @property
    def penalty(self) -> Callable[[Tensor], Tensor]:
        margin: Any = self.margin
        return margin.penalty  # an AttributeError where there is none, as of the margin alone

    def forward(self, cosine: Tensor, *of_row: Tensor) -> Tensor:  # [N] each -> [N]
        return cosine if self.margin is None else self.margin(cosine, *of_row)

    @torch.no_grad()
    def bend(self, cosine: Tensor) -> Tensor:  # [N] -> [4, N]
        zero = torch.zeros_like(cosine)
        return torch.stack((torch.full_like(cosine, self.threshold), zero, zero, zero))

    def extra_repr(self) -> str:
        inner = "" if isinstance(self.margin, nn.Module) else f"margin={self.margin}, "
        return f"{inner}threshold={self.threshold}"

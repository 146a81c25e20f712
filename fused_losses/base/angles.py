"""The cosine of a moved angle: the formula behind the margins."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BEYOND_PI = ("linear", "none", "clip", "clamp", "easy", "monotone")


def angle(cosine: Tensor) -> Tensor:
    """acos with gradient 0 at |t| >= 1: there d cos / d x vanishes too, so the product is exact."""
    inside = cosine.abs() < 1
    safe = torch.where(inside, cosine, torch.zeros_like(cosine))
    # a NaN stays one: it is no cosine of 1
    end = torch.where(cosine.isnan(), cosine, (cosine < 0).to(cosine.dtype) * math.pi)
    return torch.where(inside, torch.acos(safe), end)


def combined_margin(
    cosine: Tensor,
    m1: float | Tensor = 1.0,
    m2: float | Tensor = 0.0,
    m3: float | Tensor = 0.0,
    beyond_pi: str = "monotone",
    eps: float = 1e-3,
) -> Tensor:
    """cos(m1 theta + m2) - m3, with a stated convention where m1 theta + m2 passes pi.

    cosine [N] · m1, m2, m3 scalar or [N] · returns [N], differentiable in all of them.
    `beyond_pi`:
      none      no correction: the loss stops being monotone (insightface, ElasticFace);
      linear    t - m2 sin(m2) past the bound, m1 = 1 only (ArcFace's first code, CurricularFace);
      clip      t to +-(1 - eps), the angle to [eps, pi - eps], gradient 0 where clipped (AdaFace);
      clamp     the angle to at most 3.14159 (opensphere);
      easy      the margin only where t > 0 (MagFace);
      monotone  (-1)^k cos(phi) - 2k, k = floor(phi / pi) (SphereFace): continuous and decreasing.
    """
    numbers = not isinstance(m1, Tensor) and not isinstance(m2, Tensor)
    if numbers and m1 == 1 and m2 == 0 and beyond_pi != "clip":
        return cosine - m3  # no angle: CosFace keeps its gradient at |t| = 1
    if beyond_pi == "clip":
        cosine = cosine.clamp(-1 + eps, 1 - eps)
    phi = m1 * angle(cosine) + m2
    if beyond_pi == "clip":
        phi = phi.clamp(eps, math.pi - eps)
    elif beyond_pi == "clamp":
        phi = phi.clamp(max=3.14159)
    value = torch.cos(phi)
    if beyond_pi == "linear":
        step = m2 * (torch.sin(m2) if isinstance(m2, Tensor) else math.sin(m2))
        value = torch.where(phi < math.pi, value, cosine - step)
    elif beyond_pi == "easy":
        value = torch.where(cosine > 0, value, cosine)
    elif beyond_pi == "monotone":
        k = torch.floor(phi.detach() / math.pi)
        value = torch.where(k % 2 == 0, value, -value) - 2 * k
    return value - m3


def check_convention(beyond_pi: str, m1: float | Tensor) -> None:
    """That `beyond_pi` is one of BEYOND_PI, and defined for this m1."""
    if beyond_pi not in BEYOND_PI:
        raise ValueError(f"beyond_pi: expected one of {', '.join(BEYOND_PI)}, got {beyond_pi!r}")
    if beyond_pi == "linear" and (isinstance(m1, Tensor) or m1 != 1):
        raise ValueError(f"beyond_pi='linear' is defined for m1=1, got m1={m1}; use 'monotone'")

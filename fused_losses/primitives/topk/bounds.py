"""How far a screen's scores may be from the real ones. docs/topk.md derives every line.

`ScreenBound` in csrc/topk.h is the same of the compiled kernels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import ROUNDOFF, ZERO_NORM
from fused_losses.primitives.topk.inputs import TopkInputs

# below these an instruction may flush to 0
TINY = {torch.float64: 2.0**-1022, torch.float32: 2.0**-126}
# of a row's length: below, no product and no sum of two rows overflows
LIMIT = {torch.float64: 2.0**511, torch.float32: 2.0**63}


class Products(NamedTuple):
    """How a screen multiplies and adds up, in what the type that it adds up in rounds."""

    factor: float = 0.0  # unit roundoff of a factor, where that is a narrower type
    term: float = 0.0  # roundings of a product beside those of its sum
    step: float = 1.0  # roundings that a term sees in a sum, each


IEEE = Products()
BF16 = Products(factor=2.0**-8)


def on_tensor_cores(products: Products) -> Products:
    """The same added up by a GPU's matrix units, which cut off: 4 roundings a term."""
    return products._replace(step=4.0)


# float32 factors as sums of two tf32 of 11 bits each, of which three products are taken
TF32X3 = on_tensor_cores(Products(term=12.0))


# roundings, in the type that decides, of lengths and (but for distances) of the key: a d + b
JUDGED = {"dot": (2, 6), "cosine": (3, 16), "sqeuclidean": (1, 6)}


def of_products(
    d: int, kind: str, narrow: torch.dtype, wide: torch.dtype, products: Products
) -> float:
    """The most that m <x, y> and a key are apart, in |x| |m y|."""
    # two factors, m, the product with it, the sum with a; then the terms
    rounded = (5 + products.term + d * products.step) * ROUNDOFF[narrow]
    each, once = JUDGED[kind]
    judged = (each * d + once) * ROUNDOFF[wide]
    return math.expm1(2 * math.log1p(products.factor) + rounded + judged)


def of_offsets(d: int, narrow: torch.dtype, wide: torch.dtype) -> float:
    """The most that a is wrong by and moves the sum by, in |a|."""
    return math.expm1(2 * ROUNDOFF[narrow] + (d + 6) * ROUNDOFF[wide])


def of_distances(d: int, wide: torch.dtype) -> float:
    """The most that |x - y|^2 and |x|^2 are wrong by, in their sum, where they decide."""
    return (d + 8) * ROUNDOFF[wide]


def of_scores(
    p: TopkInputs,
    size: Tensor,  # [N] |x_i - center|, in the type that decides; so is the next
    longest: Tensor,  # [] the largest finite |y_j - center|
    narrow: torch.dtype,
    products: Products,
) -> Tensor:
    """The most that a score of each row may be wrong by; inf: this screen cannot tell. [N]"""
    d, wide, tiny = p.x.shape[1], size.dtype, TINY[narrow]
    root, steepest, scaled = math.sqrt(d), 1.0, longest
    if p.kind == "cosine":
        # |m_j y_j| is 1, and m_j at most that of the shortest row that is not 0
        steepest, scaled = 1 / ZERO_NORM, torch.ones_like(longest)
    elif p.y_scale is not None:
        steepest = p.y_scale.max().clamp_min(1).to(wide)
    error = of_products(d, p.kind, narrow, wide, products) * size * scaled
    if p.kind == "sqeuclidean":
        error = error + of_offsets(d, narrow, wide) * longest.square() / 2
    # what underflows: products and sums, factors of either side, the score
    error = error + tiny * (steepest * (2 * d + root * size) + root * scaled + 4)
    held = (size < LIMIT[narrow]) & (longest < LIMIT[narrow])
    return torch.where(held, error, torch.inf)

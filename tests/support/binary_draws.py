"""Binary codes by comparisons of all entries, for the draws."""

from __future__ import annotations

from typing import Any

import torch
from muvera_draws import points
from pair_cases import Case
from pair_rows import Inputs
from torch import Tensor

import fused_losses.functional as fl


def two(n: int, m: int, d: int) -> Inputs:
    return Inputs(x=torch.randn(n, d) / d**0.5, y=torch.randn(m, d) / d**0.5)


def straight(t: Inputs) -> Tensor:
    """Signs plus what passes through, which is 0."""
    inside = (t.x > -0.5) & (t.x < 0.75)
    passed = torch.where(inside, t.x, 0)
    return torch.where(t.x > 0, 1, 0) + passed - passed.detach()


def codes(t: Inputs, **_: Any) -> Tensor:
    return fl.binary_codes(t.x, form="bits", window=(-0.5, 0.75))


def differing(t: Inputs) -> Tensor:
    return ((t.x[:, None] > 0) != (t.y > 0)).sum(dim=2)


def both(t: Inputs) -> tuple[fl.PackedCodes, fl.PackedCodes]:
    return fl.pack_codes(t.x), fl.pack_codes(t.y)


def followed(found: Tensor, t: Inputs) -> Tensor:
    """Whole numbers, with a gradient of 0."""
    return found.to(t.x.dtype) + 0 * t.x.sum()


def apart(t: Inputs, **_: Any) -> Tensor:
    return followed(fl.hamming(*both(t)), t)


def shared(t: Inputs, **_: Any) -> Tensor:
    return followed(fl.packed_product(*both(t), form="bits"), t)


def nearest(t: Inputs, **_: Any) -> Tensor:
    return followed(fl.hamming_topk(*both(t), 1)[0], t)


DRAWN = [
    Case("binary_codes", points, codes, straight, ("x",), function=fl.binary_codes),
    Case(
        "hamming",
        two,
        apart,
        lambda t: followed(differing(t), t),
        ("x",),
        function=fl.hamming,
    ),
    Case(
        "pack_codes",
        two,
        apart,
        lambda t: followed(differing(t), t),
        ("x",),
        function=fl.pack_codes,
    ),
    Case(
        "packed_product",
        two,
        shared,
        lambda t: followed(((t.x[:, None] > 0) & (t.y > 0)).sum(dim=2), t),
        ("x",),
        function=fl.packed_product,
    ),
    Case(
        "hamming_topk",
        two,
        nearest,
        lambda t: followed(differing(t).amin(dim=1, keepdim=True), t),
        ("x",),
        function=fl.hamming_topk,
    ),
]

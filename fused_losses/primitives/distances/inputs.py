"""What a matrix of distances is given: its kinds and schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PRODUCTS = ("dot", "sqeuclidean", "euclidean")
ROOTS = ("euclidean", "scaled")  # of sums of squares

FLAT = ("hamming", "jaccard")  # no gradient: the derivative is 0 wherever it exists

KINDS = (
    *PRODUCTS,
    "cityblock",
    "minkowski",
    "chebyshev",
    "canberra",
    "braycurtis",
    "jensenshannon",
    "kl",
    *FLAT,
    "scaled",
)

KINDS_OF = {"triton": PRODUCTS}  # of a backend that has not all

WEIGHTED = ("canberra", *FLAT)  # those that take w [D]


class DistanceInputs(NamedTuple):
    """One call, in the order of the op's schema."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D], of x's dtype
    w: Tensor | None = None  # [D], or [M, D] for "scaled", in the accumulation dtype
    kind: str = "euclidean"  # of KINDS
    p: float = 2.0  # minkowski's exponent
    precision: str = "fp32"


class DistanceNeeds(NamedTuple):
    """The gradients that are asked for."""

    x: bool
    y: bool
    w: bool


FORWARD = "(Tensor x, Tensor y, Tensor? w, str kind, float p, str precision) -> Tensor out"

BACKWARD = (
    "(Tensor grad, Tensor out, Tensor x, Tensor y, Tensor? w, str kind, float p, str precision, "
    "bool need_x, bool need_y, bool need_w) -> (Tensor dx, Tensor dy, Tensor dw)"
)

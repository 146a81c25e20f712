"""What a matrix of distances is given: its kinds and schemas."""

from __future__ import annotations

PRODUCTS = ("dot", "sqeuclidean", "euclidean")

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

WEIGHTED = ("canberra", *FLAT)  # those that take w [D]

FORWARD = "(Tensor x, Tensor y, Tensor? w, str kind, float p, str precision) -> Tensor out"

BACKWARD = (
    "(Tensor grad, Tensor out, Tensor x, Tensor y, Tensor? w, str kind, float p, str precision, "
    "bool need_x, bool need_y, bool need_w) -> (Tensor dx, Tensor dy, Tensor dw)"
)

"""What MaxSim is given, passed whole between the layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MaxsimInputs(NamedTuple):
    """One call, in the order of the op's schema."""

    queries: Tensor  # [query tokens, D], text after text
    documents: Tensor  # [document tokens, D], of queries' dtype
    query_offsets: Tensor  # [Q + 1] int64, where each text begins
    document_offsets: Tensor  # [B + 1] int64
    precision: str = "fp32"


class MaxsimNeeds(NamedTuple):
    """The gradients that are asked for."""

    queries: bool
    documents: bool


FORWARD = (
    "(Tensor queries, Tensor documents, Tensor query_offsets, Tensor document_offsets, "
    "str precision) -> (Tensor scores, Tensor index)"
)
BACKWARD = (
    "(Tensor grad, Tensor index, Tensor queries, Tensor documents, Tensor query_offsets, "
    "Tensor document_offsets, bool need_queries, bool need_documents) "
    "-> (Tensor dqueries, Tensor ddocuments)"
)

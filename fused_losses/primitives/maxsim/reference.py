"""MaxSim with every product at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.base.products import product


def scores(
    queries: Tensor, documents: Tensor, query_offsets: Tensor, document_offsets: Tensor
) -> Tensor:
    """The formula with every product at once, in the dtype of its inputs or float32."""
    dtype = accumulate_dtype(queries.dtype)
    products = product(queries.to(dtype), documents.to(dtype))
    best = [
        products[:, a:b].max(dim=1).values if b > a else products[:, a:b].sum(dim=1)
        for a, b in zip(document_offsets.tolist(), document_offsets[1:].tolist(), strict=False)
    ]
    best = torch.stack(best, dim=1) if best else products[:, :0]
    sums = [
        best[a:b].sum(dim=0)
        for a, b in zip(query_offsets.tolist(), query_offsets[1:].tolist(), strict=False)
    ]
    return torch.stack(sums) if sums else best[:0]

"""A softmax over clusters drawn to balanced targets; `losses.DEPICTLoss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, no_autocast
from fused_losses.base.validation import check_matrix, describe
from fused_losses.functions.distillation import distillation
from fused_losses.similarity.attention import logsumexp_similarity


def balanced_clusters(
    embeddings: Tensor,  # [N, D]
    weight: Tensor,  # [K, D]
    bias: Tensor,  # [K]
    target_embeddings: Tensor | None = None,  # [N, D]
    *,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """-sum_k q_ik log p_ik, p a row's softmax and q_ik ~ p_ik / (sum_i p_ik)^(1/2), detached.

    target_embeddings: what q is made of, None: embeddings. Sums over columns come from a sweep:
    the N x K matrix is never stored. Time O(N K D), memory O((N + K) D).
    """
    given = embeddings if target_embeddings is None else target_embeddings
    validation.check_pair("embeddings", embeddings, "weight", weight)
    check_matrix("target_embeddings", given, "[N, D]")
    if given.shape != embeddings.shape:
        raise ValueError(
            f"target_embeddings: expected {tuple(embeddings.shape)}, got {describe(given)}"
        )
    with no_autocast(embeddings.device):
        dtype = accumulate_dtype(torch.promote_types(embeddings.dtype, weight.dtype))
        # the columns' sums are not numbers of 16 bits
        x, t, w, b = (v.to(dtype) for v in (embeddings, given, weight, bias))
        own: dict[str, Any] = dict(precision=precision, backend=backend)
        with torch.no_grad():
            ones = t.new_ones(t.shape[0], 1)
            columns = torch.cat([w, b[:, None]], 1)
            rows = logsumexp_similarity(torch.cat([t, ones], 1), columns, **own)
            sums = logsumexp_similarity(
                torch.cat([t, ones, -rows[:, None]], 1),
                torch.cat([columns, torch.ones_like(b)[:, None]], 1),
                rows=False,
                cols=True,
                **own,
            )
            balanced = b - torch.where(sums.isfinite(), sums, 0) / 2
        return distillation(
            x,
            w,
            t.detach(),
            w.detach(),
            kind="soft_ce",
            student_bias=b,
            teacher_bias=balanced,
            reduction=reduction,
            **own,
        )

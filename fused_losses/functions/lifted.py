"""Lifted structure losses: a pair's distance against all negatives of its ends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base import plans
from fused_losses.base.examples import examples
from fused_losses.base.indices import Indices
from fused_losses.base.memory_budget import MemoryBudget
from fused_losses.base.numerics import (
    accumulate_dtype,
    merged,
    no_autocast,
    reduced,
    root,
    traced,
)
from fused_losses.base.sides import Sides, batch_sides
from fused_losses.base.validation import check_plain
from fused_losses.functions.scored_pairs import (
    batch_pairs,
    labelled_pairs,
    sum_of_both,
)
from fused_losses.functions.scored_rows import scored_rows
from fused_losses.primitives.listed.op import listed_pair_scores
from fused_losses.primitives.opaque import OpaqueOp
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, Rule
from fused_losses.primitives.pairs.op import pair_statistics
from fused_losses.primitives.row_rules.op import row_losses


def lifted_structure(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    margin: float = 1.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Lifted structure loss over the positive pairs (i, p), d Euclidean.

        loss_ip = [log(sum_N e^(margin - d_in) + sum_N e^(margin - d_pn)) + d_ip]+^2 / 2

    embeddings [N, D], labels [N] integers. ref_embeddings, ref_labels, indices: as in
    `contrastive`. Of two batches only the first sum is taken: a row of the second has no list of
    negatives. A pair with no negative has loss 0. reduction: "mean" over the positive pairs, "sum"
    over them (i < p), "none" [N]: half of each pair's loss at each of its ends; of listed pairs
    half of it at the anchor, and all of it of two batches. memory_budget: see `info_nce`.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2) and a pass of O(N D) for each row of the largest class, whose size the host
    reads; memory O(N D). Of two batches O(N M D), of a list of P pairs O(P D), memory
    O(P + (N + M) D) and a few blocks. Paper: Oh Song et al., 2016.
    """
    check_plain(margin=margin)
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices,
        memory_budget=memory_budget,
    )  # fmt: skip
    with no_autocast(embeddings.device):
        dtype = accumulate_dtype(both.x.dtype)
        if both.listed is None and both.mirrored:
            rows, inputs = labelled_pairs(both, "euclidean", normalize, precision)
            rule = Rule(1.0, -margin)
            stats, _ = pair_statistics(
                inputs._replace(negative=rule), room=both.room, backend=backend
            )
            x = rows.x.to(accumulate_dtype(rows.x.dtype))
            loss = rows.restored(_LIFTED(x, rows.labels, stats.value[NEGATIVE]))
            count = stats.count[POSITIVE].sum() / 2
        else:
            loss, count = _against_rows(both, margin, normalize, precision, backend)
        if reduction == "none":
            return loss.to(dtype)
        return (loss.sum() / (count.clamp_min(1) if reduction == "mean" else 1)).to(dtype)


def _against_rows(
    both: Sides, margin: float, normalize: bool, precision: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The loss [N] of listed pairs or of two batches, and by how much its sum is a mean's."""
    pairs = batch_pairs(both, "euclidean", normalize, precision, once=False)
    stats = pairs.statistics(negative=Rule(1.0, -margin), backend=backend)
    lse, count = stats.value[NEGATIVE], stats.count[POSITIVE].sum()
    if pairs.listed is None:
        given = scored_rows(both, "euclidean", precision, normalize)
        # the negatives' hinge, [0 - d]+, is 0
        values = torch.stack([torch.ones_like(lse), -lse, torch.zeros_like(lse)], dim=1)
        given = given._replace(rule="hinges", params=(2,), values=values)
        return row_losses(given, backend=backend)[:, 0] / 2, count
    positive = pairs.listed.positive
    distance = -listed_pair_scores(pairs.inputs, positive, backend=backend).to(lse.dtype)
    against = lse.index_select(0, positive.rows)
    if both.alone:
        against = merged(against, lse.index_select(0, positive.columns))
    half = F.relu(against + distance).square() / (4 if both.alone else 2)
    loss = torch.zeros_like(lse).index_add(0, positive.rows, half)
    return loss, count / (2 if both.alone else 1)


def _lifted(x: Tensor, labels: Tensor, lse: Tensor, passes: int) -> Tensor:
    """The rows' halves of their pairs' losses, [N]."""
    # a zero that knows x, for a batch without positive pairs
    loss = (x * 0).sum(dim=1).to(lse.dtype)
    for offset in range(1, passes + 1):
        loss = loss + _lifted_pairs(x, labels, lse, offset)
    return loss


def _lifted_by_pass(x: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
    """`_lifted` over as many passes as the largest class has rows beside a first."""
    # every pass takes the same memory and has the same shapes: two tell of all
    told = plans.explaining() or x.is_meta
    passes = 2 if told else int(labels.bincount().max()) - 1 if len(x) else 0
    return (_lifted if traced(x) else _Lifted.apply)(x, labels, lse, passes)


_LIFTED = OpaqueOp(
    "lifted_structure",
    "(Tensor x, Tensor labels, Tensor lse)",
    _lifted_by_pass,
    lambda x, labels, lse: lse.new_empty(lse.shape),
)


class _Lifted(torch.autograd.Function):
    """`_lifted`, of whose passes autograd keeps nothing: the backward runs them one by one."""

    @staticmethod
    def forward(x: Tensor, labels: Tensor, lse: Tensor, passes: int) -> Tensor:
        return _lifted(x, labels, lse, passes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.passes = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, labels, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            # a second derivative asks for the graph of all passes; lse is a function of x, too
            leaves = x.view_as(x), lse.view_as(lse)
            out = _lifted(leaves[0], labels, leaves[1], ctx.passes)
            dx, dlse = torch.autograd.grad(out, leaves, grad, create_graph=True, allow_unused=True)
            return dx, None, torch.zeros_like(lse) if dlse is None else dlse, None
        dx, dlse = torch.zeros_like(x), torch.zeros_like(lse)
        for offset in range(1, ctx.passes + 1):
            with torch.enable_grad():
                leaves = x.detach().requires_grad_(), lse.detach().requires_grad_()
                out = _lifted_pairs(leaves[0], labels, leaves[1], offset)
            for total, part in zip((dx, dlse), torch.autograd.grad(out, leaves, grad), strict=True):
                total += part
        return dx, None, dlse, None


def _lifted_pairs(x: Tensor, labels: Tensor, lse: Tensor, offset: int) -> Tensor:
    """The losses of the positive pairs (k, k + offset) of sorted rows, halved between them. [N]"""
    distance = root((x[:-offset] - x[offset:]).square().sum(dim=1).to(lse.dtype))
    hinge = F.relu(merged(lse[:-offset], lse[offset:]) + distance)
    half = torch.where(labels[:-offset] == labels[offset:], hinge.square() / 4, 0)
    return F.pad(half, (0, offset)) + F.pad(half, (offset, 0))


def generalized_lifted_structure(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    negative_margin: float = 1.0,
    positive_margin: float = 0.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Generalised lifted structure loss over rows, d Euclidean.

        loss_i = [log sum_P e^(d - positive_margin) + log sum_N e^(negative_margin - d)]+

    embeddings [N, D], labels [N] integers. ref_embeddings, ref_labels, indices: as in
    `contrastive`; what is listed twice counts once. reduction: "mean" over the rows with a positive
    and a negative, "sum", "none" [N], 0 on other rows. memory_budget: see `info_nce`.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2); memory O(N D). Paper: Hermans et al., 2017.
    """
    check_plain(negative_margin=negative_margin, positive_margin=positive_margin)
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices,
        memory_budget=memory_budget,
    )  # fmt: skip
    with no_autocast(embeddings.device):
        # the score is -d
        stats = batch_pairs(both, "euclidean", normalize, precision).statistics(
            positive=Rule(-1.0, -positive_margin),
            negative=Rule(1.0, -negative_margin),
            backend=backend,
        )
        total, counted = sum_of_both(stats)
        return reduced(F.relu(total), counted, reduction, accumulate_dtype(both.x.dtype))


_alone = lambda f, t: f(t.x, t.labels)
examples(lifted_structure, _alone)
examples(generalized_lifted_structure, _alone, {"": dict(positive_margin=0.1)})

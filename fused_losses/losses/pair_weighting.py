"""Pair and proxy losses of metric learning, on statistics of one sweep over pairs (`pairs`).

Most are the grammar's two sums of a row, its positives' and its negatives', each with its `Rule`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import (
    accumulate_dtype,
    merged,
    no_autocast,
    reduced,
    root,
    softplus,
    traced,
)
from fused_losses.base.sides import batch_sides
from fused_losses.base.validation import check_both, check_plain, number
from fused_losses.losses.info_nce import info_nce
from fused_losses.losses.scored_pairs import labelled_pairs
from fused_losses.primitives.opaque import OpaqueOp
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, PairInputs, Rule
from fused_losses.primitives.pairs.op import PairStatistics, pair_statistics


def has_both(stats: PairStatistics) -> Tensor:
    """Which rows have a positive and a negative, [N]."""
    return (stats.count > 0).all(dim=0)


def _sum_of_both(stats: PairStatistics) -> Tensor:
    """lse over the positives + lse over the negatives; 0 on rows without one of them. [N]"""
    return torch.where(has_both(stats), stats.value[POSITIVE] + stats.value[NEGATIVE], 0)


def multi_similarity(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    mining_margin: float | None = None,
    duplicate: float = 1 - 1e-5,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Multi-similarity loss over one batch, s = <x_i, x_j>.

        loss_i = log(1 + sum_P e^(-alpha (s - base))) / alpha
               + log(1 + sum_N e^(beta (s - base))) / beta

    Args:
        embeddings, labels: [N, D], [N] integers. alpha, beta: > 0.
        mining_margin: None, or the paper's miner: of negatives those with s > min_P s - margin, of
            positives those with s < max_N s + margin and s < `duplicate` take part; a row left
            without either has loss 0. The choice is not differentiated. One more sweep.
        normalize: the paper's embeddings have norm 1.
        reduction: "mean" over all rows (the authors' divisor), "sum", "none" [N].

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2), mined O(N^2 D); memory O(N D). Paper: Wang et al., 2019.
    """
    check_plain(alpha=alpha, beta=beta, base=base, mining_margin=mining_margin, duplicate=duplicate)
    both = batch_sides(embeddings, labels, reduction, precision)
    for name, value in (("alpha", alpha), ("beta", beta)):
        number(name, value, embeddings)
    with no_autocast(embeddings.device):
        rows, inputs = labelled_pairs(both, "dot", normalize, precision)
        if mining_margin is not None:
            inputs, unclear = _mined(inputs, mining_margin, duplicate, backend)
        stats, _ = pair_statistics(
            inputs._replace(positive=Rule(-alpha, base), negative=Rule(beta, base)),
            backend=backend,
        )
        loss = softplus(stats.value[POSITIVE]) / alpha + softplus(stats.value[NEGATIVE]) / beta
        if mining_margin is not None:
            loss = torch.where(has_both(stats), loss, 0)
            # which pairs count cannot be said, and a NaN in a window leaves out or in
            loss = torch.where(unclear, torch.nan, loss)
        everything = torch.ones_like(loss, dtype=torch.bool)
        dtype = accumulate_dtype(both.x.dtype)
        return reduced(rows.restored(loss), everything, reduction, dtype)


@torch.no_grad()
def _mined(
    inputs: PairInputs, margin: float, duplicate: float, backend: str | None
) -> tuple[PairInputs, Tensor]:
    """Windows (positive low, high, negative low, high) of the multi-similarity miner.

    And which rows [N] have a similarity that is NaN, of which there is no least.
    """
    n, dtype = inputs.x.shape[0], accumulate_dtype(inputs.x.dtype)
    window = torch.full((4, n), torch.inf, dtype=dtype, device=inputs.x.device)
    window[0], window[1], window[2] = -torch.inf, float(duplicate), -torch.inf
    # z = -s on positives: their best is minus their least similarity
    seen, _ = pair_statistics(
        inputs._replace(x_window=window, positive=Rule(-1.0)), backend=backend
    )
    window = window.clone()
    window[1] = (seen.best[NEGATIVE] + margin).clamp_max(duplicate)
    window[2] = -seen.best[POSITIVE] - margin
    return inputs._replace(x_window=window), seen.total.isnan().any(dim=0)


def circle(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    m: float = 0.4,
    gamma: float = 80.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Circle loss over one batch, s = <x_i, x_j>, with weights that are not differentiated.

        loss_i = softplus(log sum_P e^(-gamma [1 + m - s]+ (s - 1 + m))
                        + log sum_N e^(gamma [s + m]+ (s - m)))

    embeddings [N, D] (norm 1 in the paper: normalize=True), labels [N] integers, gamma > 0.
    reduction: "mean" over the rows with a positive and a negative (pytorch-metric-learning: over
    losses that are not 0, the same but for underflow), "sum", "none" [N], 0 on other rows.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2); memory O(N D). Paper: Sun et al., 2020.
    """
    check_plain(m=m, gamma=gamma)
    both = batch_sides(embeddings, labels, reduction, precision)
    number("gamma", gamma, embeddings)
    with no_autocast(embeddings.device):
        rows, inputs = labelled_pairs(both, "dot", normalize, precision)
        stats, _ = pair_statistics(
            inputs._replace(
                positive=Rule(-gamma, 1 - m, reach=1 + m), negative=Rule(gamma, m, reach=m)
            ),
            backend=backend,
        )
        loss, counted = (
            rows.restored(softplus(_sum_of_both(stats))),
            rows.restored(has_both(stats)),
        )
        return reduced(loss, counted, reduction, accumulate_dtype(both.x.dtype))


def lifted_structure(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    margin: float = 1.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Lifted structure loss over the positive pairs (i, p) of one batch, d Euclidean.

        loss_ip = [log(sum_N e^(margin - d_in) + sum_N e^(margin - d_pn)) + d_ip]+^2 / 2

    embeddings [N, D], labels [N] integers. reduction: "mean" over the positive pairs, "sum" over
    them (i < p), "none" [N]: half of each pair's loss at each of its ends.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2) and a pass of O(N D) for each row of the largest class, whose size the host
    reads; memory O(N D). Paper: Oh Song et al., 2016.
    """
    check_plain(margin=margin)
    both = batch_sides(embeddings, labels, reduction, precision)
    with no_autocast(embeddings.device):
        rows, inputs = labelled_pairs(both, "euclidean", normalize, precision)
        stats, _ = pair_statistics(inputs._replace(negative=Rule(1.0, -margin)), backend=backend)
        x = rows.x.to(accumulate_dtype(rows.x.dtype))
        loss = _LIFTED(x, rows.labels, stats.value[NEGATIVE])
        dtype = accumulate_dtype(both.x.dtype)
        if reduction == "none":
            return rows.restored(loss).to(dtype)
        pairs = (stats.count[POSITIVE].sum() / 2).clamp_min(1)
        return (loss.sum() / (pairs if reduction == "mean" else 1)).to(dtype)


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
    labels: Tensor,  # [N]
    *,
    negative_margin: float = 1.0,
    positive_margin: float = 0.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Generalised lifted structure loss over the rows of one batch, d Euclidean.

        loss_i = [log sum_P e^(d - positive_margin) + log sum_N e^(negative_margin - d)]+

    embeddings [N, D], labels [N] integers. reduction: "mean" over the rows with a positive and a
    negative, "sum", "none" [N], 0 on other rows.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2); memory O(N D). Paper: Hermans et al., 2017.
    """
    check_plain(negative_margin=negative_margin, positive_margin=positive_margin)
    both = batch_sides(embeddings, labels, reduction, precision)
    with no_autocast(embeddings.device):
        rows, inputs = labelled_pairs(both, "euclidean", normalize, precision)
        # the score is -d
        inputs = inputs._replace(
            positive=Rule(-1.0, -positive_margin), negative=Rule(1.0, -negative_margin)
        )
        stats, _ = pair_statistics(inputs, backend=backend)
        loss, counted = (
            rows.restored(F.relu(_sum_of_both(stats))),
            rows.restored(has_both(stats)),
        )
        return reduced(loss, counted, reduction, accumulate_dtype(both.x.dtype))


def n_pairs(
    anchors: Tensor,  # [N, D]
    positives: Tensor,  # [N, D]
    *,
    l2_weight: float = 0.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """N-pairs loss: `info_nce` at temperature 1 over one (anchor, positive) a class.

        loss_i = log sum_j e^<a_i, p_j> - <a_i, p_i> + l2_weight (|a_i|^2 + |p_i|^2) / 2

    anchors, positives [N, D]; arguments and errors as in `info_nce`. Paper: Sohn, 2016.
    """
    check_both("anchors", anchors, "positives", positives, precision, rows="N")
    if anchors.shape != positives.shape:
        raise ValueError(
            f"positives: expected shape {tuple(anchors.shape)}, got "
            f"{validation.describe(positives)}"
        )
    loss = info_nce(
        anchors,
        positives,
        temperature=1.0,
        normalize=normalize,
        reduction=reduction,
        precision=precision,
        backend=backend,
    )
    if not isinstance(l2_weight, Tensor) and l2_weight == 0:
        return loss
    first, second = (t.to(loss.dtype).square().sum(dim=1) for t in (anchors, positives))
    squares = (first + second) / 2
    everything = torch.ones_like(squares, dtype=torch.bool)
    return loss + l2_weight * reduced(squares, everything, reduction, loss.dtype)


def orthogonal_projection(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    gamma: float = 0.5,
    absolute: bool = False,
    normalize: bool = True,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Orthogonal projection: positives' mean cosine to 1, negatives' to 0; one number.

        1 - mean_P s + gamma mean_N s        (absolute: mean_N |s|)

    embeddings [N, D], labels [N] integers; the means are over all pairs of two rows, and over none
    they are 0. The authors use gamma 0.5 without `absolute`, or 2 with it (twice the work).

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2); memory O(N D). Paper: Ranasinghe et al., 2021.
    """
    both = batch_sides(embeddings, labels, "mean", precision)
    with no_autocast(embeddings.device):
        _, inputs = labelled_pairs(both, "dot", normalize, precision)
        stats, _ = pair_statistics(inputs, reduction="relu", backend=backend)
        near, far = stats.total.sum(dim=1)
        if absolute:
            turned, _ = pair_statistics(
                inputs._replace(negative=Rule(-1.0)), reduction="relu", backend=backend
            )
            far = stats.value[NEGATIVE].sum() + turned.value[NEGATIVE].sum()
        pairs = stats.count.sum(dim=1) + 1e-6  # the authors' guard
        loss = 1 - near / pairs[POSITIVE] + gamma * far / pairs[NEGATIVE]
        return loss.to(accumulate_dtype(both.x.dtype))


_alone = lambda f, t: f(t.x, t.labels)


examples(
    multi_similarity,
    lambda f, t: f(t.x, t.labels, beta=20.0, normalize=True),
    {"": {}, "mined": dict(mining_margin=0.1)},
)
examples(circle, _alone, {"": dict(m=0.25, gamma=40.0, normalize=True)})
examples(lifted_structure, _alone)
examples(generalized_lifted_structure, _alone, {"": dict(positive_margin=0.1)})
examples(n_pairs, lambda f, t: f(t.x, t.y[: len(t.x)], l2_weight=0.1))
examples(orthogonal_projection, _alone)
_ABSOLUTE = dict(gamma=2.0, absolute=True)
examples(orthogonal_projection, _alone, {"absolute": _ABSOLUTE})

"""Losses on the smooth ranks of a row's positives: a sigmoid counts what stands before each."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.indices import Indices
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced
from fused_losses.base.sides import Sides, batch_sides
from fused_losses.base.validation import check_plain, number
from fused_losses.functions.listed_rankings import miner_weights
from fused_losses.functions.scored_rows import scored_rows
from fused_losses.primitives.row_rules.op import row_losses
from fused_losses.primitives.row_rules.ranks import RANKED

VARIANTS = RANKED[1:]


def smooth_ap(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    temperature: float = 0.01,
    count_self: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """1 - average precision of each row's neighbours, ranks counted by a sigmoid; s = <x_i, y_j>.

        loss_i = 1 - (1 / |P|) sum_P (1 + before_P) / (1 + before_P + before_N)
        before_N = sum_N sigmoid((s_n - s_p) / temperature), before_P the same over P without p

    Args:
        embeddings, labels: [N, D], [N] integers; ref_embeddings, ref_labels: [M, D], [M], for
            neighbours outside the batch. Rows have norm 1: normalize=True for others.
        indices: a miner's result, int64: weights of the rows, as in `fast_ap`.
        temperature: > 0. count_self: whether in a batch alone a row is among its own positives
            (the authors' code and pytorch-metric-learning's).
        reduction: "mean" over the rows with a positive beside themselves, "sum", "none" [N], 0 on
            other rows.

    Classes may have any sizes (pytorch-metric-learning asks for equal ones, in order). Returns
    float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. Time O(N M D + N M P) with P positives a row; memory O((N + M) D) and a few blocks.
    The same bits in every run on one number of threads.
    Paper: Brown et al., Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval, 2020.
    """
    check_plain(temperature=temperature)
    both = batch_sides(embeddings, labels, reduction, precision, ref_embeddings, ref_labels)
    number("temperature", temperature, embeddings)
    with no_autocast(embeddings.device):
        params = (1 / temperature, RANKED.index("precision"), 0.0)
        share, counted = _ranked(both, params, count_self, normalize, precision, backend)
        loss = 1 - share
        if indices is not None:
            sizes = (both.x.shape[0], both.y.shape[0])
            loss = loss * miner_weights(indices, *sizes, both.x, both.alone)
        return reduced(loss, counted, reduction, accumulate_dtype(both.x.dtype))


def pnp(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    variant: str = "O",
    b: float = 2.0,
    alpha: float = 1.0,
    temperature: float = 0.01,
    count_self: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Penalises the negatives that stand before each positive; s = <x_i, y_j>.

        loss_i = (1 / |P|) sum_P f(r),  r = sum_N sigmoid((s_n - s_p) / temperature)
        f: "O" r; "Ds" log(1 + r); "Dq" 1 - (1 + r)^-alpha; "Iu" (1 + r) log(1 + r);
        "Ib" (b r - log(1 + b r)) / b^2

    embeddings [N, D] (norm 1: normalize=True for others), labels [N] integers, and ref_embeddings
    [M, D], ref_labels [M] for neighbours outside the batch. b, alpha, temperature: > 0.
    count_self: whether in a batch alone a row is among its own positives, as in the authors' code
    and pytorch-metric-learning. reduction: "mean" over the rows with a positive beside themselves,
    "sum", "none" [N].

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N M D + N M P) with P positives a row; memory O((N + M) D) and a few blocks. The same
    bits in every run on one number of threads. Paper: Li et al., Rethinking the Optimization of
    Average Precision: Only Penalizing Negative Instances before Positive Ones is Enough, 2022.
    """
    check_plain(b=b, alpha=alpha, temperature=temperature)
    both = batch_sides(embeddings, labels, reduction, precision, ref_embeddings, ref_labels)
    validation.check_choice("variant", variant, VARIANTS)
    for name, value in (("b", b), ("alpha", alpha), ("temperature", temperature)):
        number(name, value, embeddings)
    with no_autocast(embeddings.device):
        params = (1 / temperature, RANKED.index(variant), b if variant == "Ib" else alpha)
        made, counted = _ranked(both, params, count_self, normalize, precision, backend)
        loss = 1 - made if variant == "Dq" else made
        return reduced(loss, counted, reduction, accumulate_dtype(both.x.dtype))


def _ranked(
    both: Sides,
    params: tuple[float, int, float],
    count_self: bool,
    normalize: bool,
    precision: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The mean over each row's positives, and which rows have one beside themselves. [N] each"""
    inputs = scored_rows(both, "dot", precision, normalize)._replace(
        rule="ranks", params=params, skip_self=both.alone and not count_self
    )
    total, count = row_losses(inputs, backend=backend).unbind(dim=1)
    # a row that is its own positive has one more
    return total / count.clamp_min(1), count > int(both.alone and count_self)


_alone = lambda f, t: f(t.x, t.labels, normalize=True)
_ref = lambda f, t: f(t.x, t.labels, t.y, t.y_labels, normalize=True)
_listed = lambda f, t: f(
    t.x, t.labels, indices=(torch.arange(len(t.x) // 2, device=t.x.device),) * 3
)
examples(
    smooth_ap,
    _alone,
    {"": dict(temperature=0.1), "others": dict(temperature=0.1, count_self=False)},
)
examples(smooth_ap, _ref, {"ref": dict(temperature=0.1, reduction="none")})
examples(smooth_ap, _listed, {"listed": dict(temperature=0.1, normalize=True)})
examples(pnp, _alone, {v: dict(temperature=0.1, variant=v) for v in VARIANTS})
examples(pnp, _ref, {"ref": dict(temperature=0.1, count_self=False, reduction="sum")})

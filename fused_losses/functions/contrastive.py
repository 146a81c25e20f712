"""Contrastive losses: a few lines of ordinary autograd each, on statistics of one sweep over pairs.

A row's loss is softplus(lse_negative - lse_positive) = -log of the positives' share of the softmax;
with the positives summed apart its gradient keeps its digits where the loss is near zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.indices import Indices
from fused_losses.base.integers import count_up
from fused_losses.base.memory_budget import MemoryBudget
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced
from fused_losses.base.scalars import inverse
from fused_losses.base.sides import batch_sides, both_of, sides
from fused_losses.base.validation import check_rows, number
from fused_losses.functions.pair_sums import Shares, reduced_shares
from fused_losses.functions.scored_pairs import BatchPairs, batch_pairs, scored
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, Rule
from fused_losses.primitives.pairs.op import PairStatistics, pair_statistics

CONTRAST_FORMS = ("out", "in")
DENOMINATORS = ("simclr", "pairs")
LONELY = ("zero", "skip")


def supervised_contrastive(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = None,
    form: str = "out",
    anchor_count: int | None = None,
    without_positive: str = "zero",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """SupCon (`SupConLoss`: temperature=0.1): equal labels attract, against every other row.

        out: loss_i = log sum_{k != i} e^z_ik - mean_P z_ip
        in:  loss_i = log sum_{k != i} e^z_ik - log sum_P e^z_ip   (the paper's less log |P_i|)

    Args:
        embeddings: [N, D]; several views of a picture are rows with one label. labels: integers.
        ref_embeddings, ref_labels, indices: as in `contrastive`; the sums over k are then over
            these rows or the listed pairs, where one that is listed twice counts once.
        temperature: > 0; a float or a scalar tensor, which may need a gradient.
        base_temperature: multiplies the loss by temperature / base_temperature, as the authors'
            code does (0.07) and their paper does not (None).
        anchor_count: only the first so many rows are anchors (the authors' contrast_mode "one",
            first views first); the others only stand in the sums. Of one batch without indices.
        without_positive: an anchor without a positive has loss 0, and is "zero": counted in the
            mean (the authors), or "skip": not counted.
        normalize, precision, memory_budget: see `info_nce`. reduction: "mean", "sum" or "none"
            [anchors].

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2) (the upper triangle; anchor_count A: A N D); memory O(N D).
    Paper: Khosla et al., 2020.
    """
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices,
        memory_budget=memory_budget,
    )  # fmt: skip
    validation.check_choice("form", form, CONTRAST_FORMS)
    validation.check_choice("without_positive", without_positive, LONELY)
    scale = inverse("temperature", temperature, embeddings)
    n = embeddings.shape[0]
    if anchor_count is not None and not 0 <= anchor_count <= n:
        raise ValueError(
            f"anchor_count: expected a value in [0, {n}] for embeddings of "
            f"{validation.describe(embeddings)}, got {anchor_count}"
        )
    if anchor_count is not None and (both.listed is not None or not both.alone):
        raise ValueError("anchor_count: expected None beside ref_embeddings or indices")
    with no_autocast(embeddings.device):
        if anchor_count is None:
            pairs = batch_pairs(both, "dot", normalize, precision, scale)
            stats = pairs.statistics(backend=backend)
        else:
            inputs = scored(embeddings, None, scale, normalize=normalize, precision=precision)
            inputs = inputs._replace(
                x=inputs.x[:anchor_count],
                x_labels=both.labels[0][:anchor_count],
                y_labels=both.numbers.y_labels,
                skip_self=True,
            )
            stats, _ = pair_statistics(inputs, room=both.room, backend=backend)
        shares, everyone = shares_of(stats, mean=form == "out"), without_positive == "zero"
        dtype = accumulate_dtype(both.x.dtype)
        if base_temperature is None:
            return reduced_shares(shares, None, reduction, dtype, everyone=everyone)
        loss, counted = shares.loss()
        t = number("temperature", temperature, embeddings)
        loss = loss * (t / number("base_temperature", base_temperature, embeddings))
        loss = torch.where(counted, loss, 0)
        return reduced(loss, counted | everyone, reduction, dtype)


def shares_of(stats: PairStatistics, mean: bool) -> Shares:
    """lse over all - lse over the positives, or - their mean."""
    value, total, count, _ = stats
    if mean:
        return Shares(value, count[NEGATIVE], total, count[POSITIVE])
    return Shares(value, count[NEGATIVE])


def positives_share(stats: PairStatistics, mean: bool) -> tuple[Tensor, Tensor]:
    """The loss of `shares_of` a row, and which rows have a positive."""
    return shares_of(stats, mean).loss()


def nt_xent(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None = None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    temperature: float | Tensor = 0.5,
    form: str = "simclr",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """NT-Xent at temperature=0.5, form="simclr" (`NTXentLoss`: 0.07, "pairs").

    The mean over the positive pairs (i, p), in both meanings in use.

        simclr: log sum_{k != i} e^z_ik - z_ip
        pairs:  log(e^z_ip + sum_N e^z_in) - z_ip    (pytorch-metric-learning: no other positives)

    Args:
        embeddings: [N, D]; labels: integers, or None: rows i and i + N/2 are two views of one
            picture (the forms are then the same).
        ref_embeddings, ref_labels, indices: as in `contrastive`; a positive (a, p) then meets the
            listed negatives of a. Of two batches with labels.
        temperature: > 0; a float or a scalar tensor, which may need a gradient.
        normalize, precision, memory_budget: see `info_nce`; "pairs" keeps of its first sweep first.
        reduction: "mean" over the positive pairs, "sum" over them, "none" [N]: each row's mean
            over its positives, 0 where it has none.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2), "pairs" with labels O(3 N^2 D / 2); memory O(N D).
    Papers: Sohn, 2016; Chen et al., 2020.
    """
    views = labels is None and indices is None and ref_embeddings is None
    n = embeddings.shape[0]
    if views:
        check_rows("embeddings", embeddings, precision)
        if n % 2:
            raise ValueError(
                "embeddings: expected an even number of rows without labels (row i + N/2 is the "
                f"other view of row i), got {validation.describe(embeddings)}"
            )
        labels = count_up(n // 2, embeddings).repeat(2)
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices,
        memory_budget=memory_budget,
    )  # fmt: skip
    validation.check_choice("form", form, DENOMINATORS)
    scale = inverse("temperature", temperature, embeddings)
    with no_autocast(embeddings.device):
        pairs = batch_pairs(both, "dot", normalize, precision, scale, once=False)
        stats = pairs.statistics(backend=backend)
        count = stats.count[POSITIVE]
        if form == "simclr" or views:
            loss = positives_share(stats, mean=True)[0]
        else:
            against = against_negatives(pairs, stats, backend)
            loss = against / count.clamp_min(1)
        dtype = accumulate_dtype(both.x.dtype)
        if reduction == "none":
            return loss.to(dtype)
        total = (loss * count).sum()
        return (total if reduction == "sum" else total / count.sum().clamp_min(1)).to(dtype)


def against_negatives(
    pairs: BatchPairs, stats: PairStatistics, backend: str | None = None
) -> Tensor:
    """The sum over a row's positives of log(e^z_ip + sum_N e^z_in) - z_ip; 0 without negatives. [N]

    stats: of the same pairs, with the rules of an lse.
    """
    # softplus(ln_i - z_ip), summed: -ln_i as the rows' bias, and the sign by the rule;
    # a row without negatives has loss 0, as softplus(-large) is
    alone = stats.count[NEGATIVE] == 0
    shift = torch.where(alone, torch.finfo(torch.float32).max / 4, -stats.value[NEGATIVE])
    against = pairs.statistics(
        positive=Rule(-1.0),
        negative=Rule(0.0),
        reduction="softplus",
        x_bias=shift.to(accumulate_dtype(pairs.inputs.x.dtype)),
        backend=backend,
    )
    return against.value[POSITIVE]


def sigmoid_contrastive(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    labels: Tensor | None = None,  # [N]
    y_labels: Tensor | None = None,  # [M]
    offset: int = 0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """SigLIP: each pair a two-class problem of its own.

        loss_i = sum_j softplus(-l_ij (scale <x_i, y_j> + bias)),   l = 1 on positives, else -1

    Args:
        x, y: [N, D] and [M, D].
        scale, bias: numbers or scalar tensors, which may need gradients.
        labels, y_labels: integers; equal labels are positives, any number of them. Without
            y_labels y has the labels of x. None: y_(offset + i) is the positive of x_i.
        offset: where this rank's rows stand among gathered ones (no labels).
        normalize, precision, memory_budget: see `info_nce`. reduction: "mean" over the rows, "sum",
            "none" [N].

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N M D); memory O((N + M) D). Paper: Zhai et al., 2023.
    """
    both = sides(
        x,
        y,
        precision,
        names=("x", "y"),
        prefixes=("", "y_"),
        labels=both_of(labels, y_labels),
        offset=offset,
        memory_budget=memory_budget,
    )
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    factor = number("scale", scale, both.x, positive=False)
    shift = number("bias", bias, both.x, positive=False)
    with no_autocast(x.device):
        dtype = accumulate_dtype(both.x.dtype)
        inputs = scored(both.x, both.y, factor, normalize=normalize, precision=precision)._replace(
            x_bias=shift.to(dtype).expand(x.shape[0]).contiguous(),
            positive=Rule(-1.0),
            **both.numbers._asdict(),
        )
        stats, _ = pair_statistics(inputs, reduction="softplus", room=both.room, backend=backend)
        loss = stats.value.sum(dim=0)
        return reduced(loss, torch.ones_like(loss, dtype=torch.bool), reduction, dtype)


def soft_nearest_neighbor(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    temperature: float | Tensor = 1.0,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    backend: str | None = None,
) -> Tensor:
    """Soft nearest neighbour loss; NCA where temperature is 1 (a scale s: temperature 1/s).

        loss_i = log sum_{k != i} e^(-|x_i - x_k|^2 / T) - log sum_P e^(-|x_i - x_p|^2 / T)

    embeddings [N, D], labels [N] integers, temperature > 0 (a float or a scalar tensor, which may
    need a gradient). ref_embeddings, ref_labels, indices: as in `supervised_contrastive`, also
    `WeightedPairs`.
    reduction: "mean" over the rows with a positive, "sum", "none" [N]. memory_budget: see
    `info_nce`.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2); memory O(N D). Papers: Goldberger et al., 2004; Frosst et al., 2019.
    """
    both = batch_sides(
        embeddings, labels, reduction, precision, ref_embeddings, ref_labels, indices,
        weighted=True, memory_budget=memory_budget,
    )  # fmt: skip
    scale = inverse("temperature", temperature, embeddings)
    with no_autocast(embeddings.device):
        pairs = batch_pairs(both, "rbf", normalize, precision, scale)
        loss, counted = positives_share(pairs.statistics(backend=backend), mean=False)
        return reduced(loss, counted, reduction, accumulate_dtype(both.x.dtype))


examples(
    supervised_contrastive,
    lambda f, t: f(t.x, t.labels),
    {
        "": {},
        "out": lambda t: dict(temperature=t.temperature, base_temperature=0.07, normalize=True),
        "in": dict(temperature=0.3, form="in", without_positive="skip"),
        "kept": dict(memory_budget=1 << 20),
        "anchors": lambda t: dict(
            temperature=0.3, anchor_count=(len(t.x) + 1) // 2, without_positive="skip"
        ),
    },
)
examples(
    nt_xent,
    lambda f, t: f(t.x, t.labels),
    {
        "simclr": lambda t: dict(temperature=t.temperature),
        "pairs": lambda t: dict(temperature=t.temperature, form="pairs"),
    },
)
examples(
    nt_xent,
    # exact in 16 bits
    lambda f, t: f(torch.cat([t.x, t.x.flip(1) / 2])),
    {"views": dict(temperature=0.3, form="pairs")},
)
examples(
    sigmoid_contrastive,
    lambda f, t: f(t.x, t.y, scale=t.scale, bias=t.bias),
    {"": {}, "labels": lambda t: dict(labels=t.labels, y_labels=t.y_labels)},
)
examples(soft_nearest_neighbor, lambda f, t: f(t.x, t.labels, temperature=t.temperature))

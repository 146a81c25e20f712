"""Losses over the pairs of a batch: a number a row, or one where the reducer's mean is known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.numerics import softplus
from fused_losses.functions.angular import angular
from fused_losses.functions.contrastive import against_negatives, positives_share
from fused_losses.functions.lifted import lifted_structure
from fused_losses.functions.margin_pairs import (
    in_windows,
    snr_contrastive,
    threshold_consistent_margin,
)
from fused_losses.functions.ranking import tuplet_margin
from fused_losses.functions.scored_pairs import sum_of_both
from fused_losses.functions.scored_rows import over_nonzero
from fused_losses.functions.variance import intra_pair_variance
from fused_losses.integrations.acceleration import NotCovered
from fused_losses.integrations.pytorch_metric_learning.calls import (
    PeerBatch,
    distance_of,
    loss_row,
    numbers_of,
    pairs_of_both,
    reducer_of,
    refuse_both_kinds,
)
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, Rule

ANY = ("dot", "euclidean", "rbf")


def multi_similarity(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, *ANY)
    alpha, beta = numbers_of(loss, "alpha", "beta", above=0)
    (base,) = numbers_of(loss, "base")
    refuse_both_kinds(batch)
    center = distance.center(base)
    stats = batch.pairs(distance).statistics(
        positive=Rule(-alpha, center), negative=Rule(beta, center), backend=batch.backend
    )
    positive, negative = softplus(stats.value)
    return {"loss": batch.elements((positive / alpha + negative / beta)[:, None])}


def circle(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "dot")
    (gamma,) = numbers_of(loss, "gamma", above=0)
    reach_p, reach_n, center_p, center_n = numbers_of(loss, "op", "on", "delta_p", "delta_n")
    refuse_both_kinds(batch)
    stats = batch.pairs(distance).statistics(
        positive=Rule(-gamma, center_p, reach=reach_p),
        negative=Rule(gamma, center_n, reach=-reach_n),
        backend=batch.backend,
    )
    # its own softplus, which is linear beyond 20
    total, both = sum_of_both(stats)
    losses = torch.where(both, loss.soft_plus(total), 0)
    return {"loss": batch.elements(losses[:, None])}


def generalized_lifted_structure(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, *ANY)
    near, far = (distance.center(m) for m in numbers_of(loss, "pos_margin", "neg_margin"))
    refuse_both_kinds(batch)
    stats = batch.pairs(distance).statistics(
        positive=Rule(-1.0, near), negative=Rule(1.0, far), backend=batch.backend
    )
    # the peer's sum over nothing has the logarithm 0
    sums = torch.where(stats.count > 0, stats.value, 0).sum(dim=0)
    return {"loss": batch.elements(torch.relu(sums)[:, None])}


def supervised_contrastive(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, *ANY)
    (temperature,) = numbers_of(loss, "temperature", above=0)
    refuse_both_kinds(batch)
    if pairs_of_both(batch) is None:
        return loss.zero_losses()
    pairs = batch.pairs(distance, 1 / temperature)
    losses, _ = positives_share(pairs.statistics(backend=batch.backend), mean=True)
    return {"loss": batch.elements(losses)}


def contrastive(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, *ANY)
    near, far = (distance.center(m) for m in numbers_of(loss, "pos_margin", "neg_margin"))
    kinds = [reducer_of(loss, name, *REDUCED) for name in ("pos_loss", "neg_loss")]
    pairs = batch.pairs(distance, once=False)
    ones = torch.ones(len(batch.embeddings), dtype=torch.float64, device=batch.embeddings.device)
    rules = Rule(-1.0, near), Rule(1.0, far)
    stats = in_windows(pairs, -near * ones, -far * ones, batch.backend, rules)
    parts = []
    for k, kind in enumerate(kinds):
        total = stats.total[k]
        if kind == "AvgNonZeroReducer":
            parts.append(over_nonzero(total, stats.count[k]))
        else:
            parts.append(total.sum() / (batch.numbers()[k] or 1 if kind == "MeanReducer" else 1))
    return {
        "pos_loss": batch.number(parts[POSITIVE]),
        "neg_loss": batch.number(parts[NEGATIVE]),
    }


REDUCED = ("AvgNonZeroReducer", "MeanReducer", "SumReducer")
OF_ALL = ("MeanReducer", "SumReducer")


def _over_positives(loss: Any, batch: PeerBatch, total: Tensor, positives: int) -> dict[str, Any]:
    """A sum over the positive pairs by its reducer."""
    kind = reducer_of(loss, "loss", *OF_ALL)
    return {"loss": batch.number(total / positives if kind == "MeanReducer" else total)}


def nt_xent(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "dot")
    (temperature,) = numbers_of(loss, "temperature", above=0)
    reducer_of(loss, "loss", *OF_ALL)
    # the peer's logarithm is of a share, and stops at that of the least number
    tiny = torch.finfo(batch.embeddings.dtype).tiny
    if not distance.normalize or 2 / temperature > -math.log(tiny) - 16:
        raise NotCovered("scores so far apart that the peer's share may be 0")
    numbers = pairs_of_both(batch)
    if numbers is None:
        return loss.zero_losses()
    pairs = batch.pairs(distance, 1 / temperature, once=False)
    stats = pairs.statistics(backend=batch.backend)
    total = against_negatives(pairs, stats, batch.backend).sum()
    return _over_positives(loss, batch, total, numbers[0])


def tuplet(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "dot")
    (margin,) = numbers_of(loss, "margin")
    (scale,) = numbers_of(loss, "scale", above=0)
    reducer_of(loss, "loss", *OF_ALL)
    numbers = pairs_of_both(batch)
    if numbers is None:
        return loss.zero_losses()
    total = tuplet_margin(
        batch.embeddings,
        batch.labels,
        margin=math.degrees(margin),
        scale=scale,
        normalize=distance.normalize,
        reduction="sum",
        **batch.given,
    )
    return _over_positives(loss, batch, total, numbers[0])


def lifted(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "euclidean")
    far, near = numbers_of(loss, "neg_margin", "pos_margin")
    reducer_of(loss, "loss", *OF_ALL)
    if not batch.alone:
        raise NotCovered("ref_emb, whose rows the peer compares with the batch's by number")
    if batch.indices is not None:
        a, p = batch.indices[:2]
        with_negatives = batch.indices[-2] if len(batch.indices) == 4 else a
        if not bool((torch.isin(a, with_negatives) | torch.isin(p, with_negatives)).all()):
            raise NotCovered("a positive pair without a negative")
    numbers = pairs_of_both(batch)
    if numbers is None:
        return loss.zero_losses()
    mean = lifted_structure(
        batch.embeddings,
        batch.labels,
        margin=far - near,
        normalize=distance.normalize,
        **batch.given,
    )
    return _over_positives(loss, batch, mean * numbers[0], numbers[0])


def angles(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "euclidean")
    alpha = math.degrees(float(loss.alpha))
    reducer_of(loss, "loss", *OF_ALL)
    if batch.labels is None or (batch.ref is not None and batch.ref[1] is None):
        raise NotCovered("no labels")
    if not 0 < alpha < 90:
        raise NotCovered(f"alpha={alpha}")
    numbers = pairs_of_both(batch)
    if numbers is None:
        return loss.zero_losses()
    total = angular(
        batch.embeddings,
        batch.labels,
        alpha=alpha,
        normalize=distance.normalize,
        normalize_negatives=False,
        reduction="sum",
        **batch.given,
    )
    return _over_positives(loss, batch, total, numbers[0])


def variance(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "dot")
    near, far = numbers_of(loss, "pos_eps", "neg_eps", above=-1e-300)
    for name in ("pos_loss", "neg_loss"):
        reducer_of(loss, name, "MeanReducer")
    both = intra_pair_variance(
        batch.embeddings,
        batch.labels,
        positive_eps=near,
        negative_eps=far,
        normalize=distance.normalize,
        **batch.given,
    )
    return {"pos_loss": batch.number(both), "neg_loss": loss.zero_loss()}


def snr(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "snr")
    near, far = numbers_of(loss, "pos_margin", "neg_margin")
    for name in ("pos_loss", "neg_loss"):
        reducer_of(loss, name, "AvgNonZeroReducer")
    both = snr_contrastive(
        batch.embeddings,
        batch.labels,
        positive_margin=near,
        negative_margin=far,
        normalize=distance.normalize,
        **batch.given,
    )
    return {"pos_loss": batch.number(both), "neg_loss": loss.zero_loss()}


def consistent(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance_of(loss, "dot")
    near, far = numbers_of(loss, "margin_plus", "margin_minus")
    weights = numbers_of(loss, "lambda_plus", "lambda_minus")
    if not batch.alone:
        raise NotCovered("ref_emb, which the peer does not look at")
    both = threshold_consistent_margin(
        batch.embeddings,
        batch.labels,
        positive_margin=near,
        negative_margin=far,
        positive_weight=weights[0],
        negative_weight=weights[1],
        **batch.given,
    )
    return {"loss": batch.number(both)}


PER_PAIR = "reducers other than the mean and the sum"
PAIR_LOSSES = (
    loss_row("CircleLoss", circle, "circle"),
    loss_row("MultiSimilarityLoss", multi_similarity, "multi_similarity"),
    loss_row(
        "GeneralizedLiftedStructureLoss",
        generalized_lifted_structure,
        "generalized_lifted_structure",
    ),
    loss_row("SupConLoss", supervised_contrastive, "supervised_contrastive"),
    loss_row(
        "ContrastiveLoss",
        contrastive,
        "contrastive",
        "reducers other than AvgNonZeroReducer, the mean and the sum",
    ),
    loss_row(
        "NTXentLoss",
        nt_xent,
        'nt_xent(form="pairs")',
        f"{PER_PAIR}; distances; rows that are not normalised, and a temperature so low (float32: "
        "0.028) that the peer's share of the softmax can be 0",
    ),
    loss_row("TupletMarginLoss", tuplet, "tuplet_margin", PER_PAIR),
    loss_row(
        "LiftedStructureLoss",
        lifted,
        "lifted_structure",
        f"{PER_PAIR}; ref_emb; a listed positive pair neither of whose rows has a listed negative",
    ),
    loss_row("AngularLoss", angles, "angular", PER_PAIR),
    loss_row(
        "IntraPairVarianceLoss", variance, "intra_pair_variance", "reducers other than the mean"
    ),
    loss_row(
        "SignalToNoiseRatioContrastiveLoss",
        snr,
        "snr_contrastive",
        "reducers other than AvgNonZeroReducer",
    ),
    loss_row("ThresholdConsistentMarginLoss", consistent, "threshold_consistent_margin", "ref_emb"),
)

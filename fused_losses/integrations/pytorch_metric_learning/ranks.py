"""Losses over each row's ranking, neighbours or distribution of distances."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from fused_losses.functions.contrastive import positives_share
from fused_losses.functions.pair_weighting import n_pairs
from fused_losses.functions.ranking import fast_ap, histogram, ranked_list
from fused_losses.functions.smooth_ranks import pnp, smooth_ap
from fused_losses.integrations.acceleration import NotCovered
from fused_losses.integrations.pytorch_metric_learning.calls import (
    PeerBatch,
    distance_of,
    loss_row,
    numbers_of,
)
from fused_losses.losses.batch_contrast import first_pairs


def neighbourhood(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "rbf", "euclidean", "dot")
    (scale,) = numbers_of(loss, "softmax_scale", above=0)
    if batch.labels is None or (batch.ref is not None and batch.ref[1] is None):
        raise NotCovered("no labels")
    if len(batch.embeddings) <= 1:
        raise NotCovered("a row alone")
    # a miner's lists weigh the rows: all pairs take part
    weights = batch.weights()
    pairs = batch._replace(indices=None).pairs(distance, scale)
    losses, counted = positives_share(pairs.statistics(backend=batch.backend), mean=False)
    losses = batch.as_peer(losses)
    # the peer leaves out a row whose share is 0, which it also is where it underflows
    rows = (counted & (torch.exp(-losses.detach()) != 0)).nonzero()[:, 0]
    losses = losses[rows]
    if weights is not None:
        losses = losses * weights[rows].to(losses.dtype)
    return {"loss": batch.elements(losses, rows)}


def average_precision(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    labels = batch.own_rows()
    distance = distance_of(loss, "rbf")
    positives, _ = batch._replace(indices=None).sizes()
    rows = (positives > 0).nonzero()[:, 0]
    if not len(rows):
        return loss.zero_losses()
    losses = fast_ap(
        batch.embeddings,
        labels,
        bins=loss.num_bins,
        normalize=distance.normalize,
        reduction="none",
        **batch.given,
    )
    return {"loss": batch.elements(losses[rows], rows)}


def by_position(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    """The peer's groups are runs of as many rows as there are classes, whatever their labels."""
    labels = batch.own_rows()
    distance = distance_of(loss, "dot")
    (temperature,) = numbers_of(loss, "temperature", above=0)
    sizes = labels.unique(return_counts=True)[1]
    classes = len(sizes)
    if int(sizes.min()) != int(sizes.max()):
        raise NotCovered("classes of unequal sizes")
    if classes == 1:
        raise NotCovered("one class")
    runs = torch.arange(len(labels), device=labels.device) // classes
    losses = smooth_ap(
        batch.embeddings,
        runs,
        temperature=temperature,
        normalize=distance.normalize,
        reduction="none",
        **batch.given,
    )
    part = batch.elements(losses)
    # where the peer collects its precisions
    part["losses"] = part["losses"].to(torch.get_default_dtype())
    return {"ap_loss": part}


def negatives_before(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    labels = batch.own_rows()
    distance = distance_of(loss, "dot")
    b, alpha, temperature = numbers_of(loss, "b", "alpha", "anneal", above=0)
    if batch.indices is not None:
        raise NotCovered("indices_tuple")
    if bool((batch.sizes()[0] == 0).any()):
        raise NotCovered("a row whose only positive is itself")
    value = pnp(
        batch.embeddings,
        labels,
        variant=loss.variant,
        b=b,
        alpha=alpha,
        temperature=temperature,
        normalize=distance.normalize,
        backend=batch.backend,
    )
    return {"loss": batch.number(value)}


def lists(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    labels = batch.own_rows()
    distance = distance_of(loss, "euclidean")
    if batch.indices is not None:
        raise NotCovered("indices_tuple")
    margin, alpha, imbalance = numbers_of(loss, "margin", "alpha", "imbalance")
    hot = numbers_of(loss, "Tp", "Tn", above=-1e-300)
    losses = ranked_list(
        batch.embeddings,
        labels,
        margin=margin,
        alpha=alpha,
        imbalance=imbalance,
        positive_temperature=hot[0],
        negative_temperature=hot[1],
        normalize=distance.normalize,
        reduction="none",
        backend=batch.backend,
    )
    return {"loss": batch.elements(losses)}


def histograms(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "dot")
    (delta,) = numbers_of(loss, "delta", above=0)
    bins = round(2 / delta)
    if not math.isclose(bins * delta, 2, rel_tol=1e-12):
        raise NotCovered(f"delta={delta}, of which 2 is no multiple")
    if not batch.alone:
        raise NotCovered("ref_emb")
    if batch.indices is None:
        positives, negatives = batch.sizes()
        if bool((negatives == 0).any()) or int((positives == 0).sum()) > 1:
            raise NotCovered("negative pairs neither of whose rows has a positive")
    value = histogram(
        batch.embeddings, batch.labels, bins=bins, normalize=distance.normalize, **batch.given
    )
    return {"loss": batch.number(value)}


def one_pair_a_class(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    labels = batch.own_rows()
    distance = distance_of(loss, "dot")
    anchors, positives = first_pairs(batch.embeddings, labels, batch.indices)
    loss.num_pairs = len(anchors)
    if not loss.num_pairs:
        return loss.zero_losses()
    losses = n_pairs(
        batch.embeddings[anchors],
        batch.embeddings[positives],
        normalize=distance.normalize,
        reduction="none",
        backend=batch.backend,
    )
    return {"loss": batch.elements(losses, anchors)}


_row = functools.partial(loss_row, of_pairs=False)
RANK_LOSSES = (
    _row("NCALoss", neighbourhood, "soft_nearest_neighbor"),
    _row("NPairsLoss", one_pair_a_class, "n_pairs", "distances"),
    _row("FastAPLoss", average_precision, "fast_ap", "LpDistance(power=1)"),
    _row("SmoothAPLoss", by_position, "smooth_ap", "batches of one class"),
    _row("PNPLoss", negatives_before, "pnp", "batches with a row that is alone in its class"),
    _row("RankedListLoss", lists, "ranked_list", "distances other than Euclidean"),
    loss_row(
        "HistogramLoss",
        histograms,
        "histogram",
        "batches with two rows that are alone in their classes, or of one class; a delta of which "
        "2 is no multiple",
    ),
)

"""Losses over triplets, by counting where no miner lists them."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fused_losses.functions.margin_pairs import margin_loss
from fused_losses.functions.triplets import all_triplets
from fused_losses.integrations.acceleration import NotCovered
from fused_losses.integrations.pytorch_metric_learning.calls import (
    PeerBatch,
    distance_of,
    loss_row,
    numbers_of,
    reducer_of,
)


def drawn(loss: Any, batch: PeerBatch) -> PeerBatch:
    """With the triplets that the peer draws, by its own generator, where it draws some."""
    if batch.indices is not None or loss.triplets_per_anchor == "all":
        return batch
    peer = importlib.import_module("pytorch_metric_learning.utils.loss_and_miner_utils")
    ref_labels = batch.labels if batch.ref is None else batch.ref[1]
    lists = peer.get_random_triplet_indices(
        batch.labels, ref_labels, t_per_anchor=loss.triplets_per_anchor
    )
    return batch._replace(indices=lists)


def number_of_triplets(batch: PeerBatch) -> int:
    if batch.indices is None:
        positives, negatives = batch.sizes()
        return int((positives * negatives).sum())
    if len(batch.indices) == 3:
        return len(batch.indices[0])
    a, _, b, _ = batch.indices
    n = len(batch.embeddings)
    return int((a.bincount(minlength=n) * b.bincount(minlength=n)).sum())


def triplet_margin(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "dot", "euclidean", "rbf")
    kind = reducer_of(loss, "loss", "AvgNonZeroReducer", "MeanReducer", "SumReducer")
    (margin,) = numbers_of(loss, "margin", above=-1e-300)
    if distance.score == "dot" and not distance.normalize:
        raise NotCovered("products of rows that are not normalised")
    if loss.swap and not batch.alone:
        raise NotCovered("swap with ref_emb, which takes the batch's rows for its positives")
    batch = drawn(loss, batch)
    if batch.indices is not None and not len(batch.indices[0]) * len(batch.indices[-1]):
        return loss.zero_losses()
    total = all_triplets(
        batch.embeddings,
        batch.labels,
        margin=margin,
        swap=bool(loss.swap),
        smooth=bool(loss.smooth_loss),
        distance=distance.name,
        normalize=distance.normalize,
        reduction="mean" if kind == "AvgNonZeroReducer" else "sum",
        **batch.given,
    )
    if kind == "MeanReducer":
        total = total / max(number_of_triplets(batch), 1)
    return {"loss": batch.number(total)}


def boundary(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "euclidean")
    (margin,) = numbers_of(loss, "margin")
    reducer_of(loss, "margin_loss", "DivisorReducer")
    beta = loss.beta
    if len(beta) > 1 and loss.learn_beta and loss.nu != 0:
        raise NotCovered("learned boundaries of classes that are regularised, a triplet each")
    if len(beta) > 1 and batch.labels is None:
        raise NotCovered("boundaries of classes without labels")
    batch = drawn(loss, batch)
    if batch.indices is not None and not len(batch.indices[0]) * len(batch.indices[-1]):
        return loss.zero_losses()
    beta = beta.to(batch.embeddings)
    value = margin_loss(
        batch.embeddings,
        batch.labels,
        beta=beta,
        margin=margin,
        per="triplet",
        normalize=distance.normalize,
        **batch.given,
    )
    bias = loss.zero_loss()
    if loss.learn_beta and len(beta) == 1:
        bias = batch.number(beta * loss.nu)
    elif loss.learn_beta:
        # nu is 0; the peer's part knows the boundaries
        bias = batch.number(torch.sum(beta * 0))
    return {"margin_loss": batch.number(value), "beta_reg_loss": bias}


TRIPLET_LOSSES = (
    loss_row(
        "TripletMarginLoss",
        triplet_margin,
        "all_triplets",
        "reducers other than AvgNonZeroReducer, the mean and the sum; swap with ref_emb; products "
        "of rows that are not normalised; a margin below 0",
    ),
    loss_row(
        "MarginLoss",
        boundary,
        'margin_loss(per="triplet")',
        "reducers other than DivisorReducer; learned boundaries of classes with nu; distances "
        "other than Euclidean",
    ),
)

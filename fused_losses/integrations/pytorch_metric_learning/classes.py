"""Losses over classes, whose centres stay the peer's parameters, [D, C] where it has them so."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype, row_dtype, softplus, unit_rows
from fused_losses.base.validation import number
from fused_losses.functions.class_loss import class_loss
from fused_losses.functions.class_values import SoftTriple
from fused_losses.functions.contrastive import positives_share
from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.functions.scored_pairs import scored
from fused_losses.integrations.acceleration import NotCovered
from fused_losses.integrations.pytorch_metric_learning.calls import (
    PeerBatch,
    distance_of,
    loss_row,
    numbers_of,
)
from fused_losses.losses.classes import product_margin
from fused_losses.margins import ArcFace, CosFace, SphereFace
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, PairInputs, Rule
from fused_losses.primitives.pairs.op import pair_statistics


def _centers(loss: Any, batch: PeerBatch, name: str = "W", *shape: int) -> tuple[Tensor, Tensor]:
    """The loss's parameter as [C, D] or of a shape, in the rows' dtype as the peer has it."""
    labels = batch.own_rows()
    if torch.is_autocast_enabled(batch.embeddings.device.type):
        raise NotCovered("autocast, whose dtypes the peer gives the centres")
    loss.cast_types(batch.embeddings.dtype, batch.embeddings.device)
    weight = getattr(loss, name)
    weight = weight if name == "proxies" else weight.t()
    return (weight.reshape(*shape, weight.shape[-1]) if shape else weight), labels


def _weighted(loss: Any, batch: PeerBatch, losses: Tensor, weight: Tensor) -> dict[str, Any]:
    """A loss a row by how often a miner lists it, and the regulariser of the centres."""
    weights = batch.weights()
    losses = losses if weights is None else losses * weights.to(losses.dtype)
    parts = {"loss": batch.elements(losses)}
    loss.add_weight_regularization_to_loss_dict(parts, weight)
    return parts


def _softmax(batch: PeerBatch, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    losses = margin_softmax(
        batch.embeddings, weight, labels, reduction="none", backend=batch.backend, **options
    )
    assert isinstance(losses, Tensor)  # nobody asks for the others
    return losses


def arcface(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance_of(loss, "dot")
    (margin,) = numbers_of(loss, "margin", above=-1e-300)
    (scale,) = numbers_of(loss, "scale", above=0)
    if margin > math.pi:
        raise NotCovered(f"margin={math.degrees(margin)} degrees")
    several = getattr(loss, "sub_centers", 1)
    shape = (loss.num_classes, several) if several > 1 else ()
    weight, labels = _centers(loss, batch, "W", *shape)
    losses = _softmax(batch, weight, labels, margin=ArcFace(margin, "linear"), scale=scale)
    return _weighted(loss, batch, losses, loss.W.t())


def cosface(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance_of(loss, "dot")
    (margin,) = numbers_of(loss, "margin", above=-1e-300)
    (scale,) = numbers_of(loss, "scale", above=0)
    if margin > 2:
        raise NotCovered(f"margin={margin}")
    weight, labels = _centers(loss, batch)
    losses = _softmax(batch, weight, labels, margin=CosFace(margin), scale=scale)
    return _weighted(loss, batch, losses, loss.W.t())


def sphereface(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance_of(loss, "dot")
    (margin,) = numbers_of(loss, "margin", above=0)
    (scale,) = numbers_of(loss, "scale", above=0)
    weight, labels = _centers(loss, batch)
    wide = batch.embeddings.to(row_dtype(batch.embeddings.device))
    length = torch.linalg.vector_norm(wide, dim=1)
    if bool((length == 0).any()):
        raise NotCovered("a row of zeros")
    options = dict(margin=SphereFace(margin), scale=(scale * length).to(batch.embeddings.dtype))
    losses = _softmax(batch, weight, labels, **options)
    return _weighted(loss, batch, losses, loss.W.t())


def large_margin(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance_of(loss, "dot")
    (margin,) = numbers_of(loss, "margin", above=0)
    (scale,) = numbers_of(loss, "scale", above=0)
    weight, labels = _centers(loss, batch)
    moved = product_margin(SphereFace(margin), batch.embeddings, weight[labels])
    losses = _softmax(batch, weight, labels, margin=moved, scale=scale, normalize=False)
    return _weighted(loss, batch, losses, loss.W.t())


def normalized_softmax(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "dot")
    (temperature,) = numbers_of(loss, "temperature", above=0)
    weight, labels = _centers(loss, batch)
    if not distance.normalize:
        # the centres are of norm 1 and the rows as they come
        weight = unit_rows(weight.to(accumulate_dtype(weight.dtype))).to(weight.dtype)
    options = dict(margin=None, scale=1 / temperature, normalize=distance.normalize)
    losses = _softmax(batch, weight, labels, **options)
    return _weighted(loss, batch, losses, loss.W.t())


def soft_triple(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "dot")
    la, sharpness = numbers_of(loss, "la", "gamma", above=0)
    (margin,) = numbers_of(loss, "margin")
    shape = (loss.num_classes, loss.centers_per_class)
    weight, labels = _centers(loss, batch, "fc", *shape)
    losses = class_loss(
        batch.embeddings,
        weight,
        labels,
        SoftTriple(la, 1 / sharpness, margin),
        normalize=distance.normalize,
        reduction="none",
        backend=batch.backend,
    )
    return _weighted(loss, batch, losses, loss.fc.t())


def instance(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    """A row's class has the number of a column, which is a row, too."""
    labels = batch.own_rows()
    if batch.indices is not None:
        raise NotCovered("indices_tuple")
    distance = distance_of(loss, "dot")
    (gamma,) = numbers_of(loss, "gamma", above=0)
    targets = torch.unique(labels, return_inverse=True)[1]
    options = dict(margin=None, scale=gamma, normalize=distance.normalize)
    return {"loss": batch.elements(_softmax(batch, batch.embeddings, targets, **options))}


def _against_proxies(
    loss: Any, batch: PeerBatch, score: str, normalize: bool, scale: float, proxies_first: bool
) -> PairInputs:
    proxies, labels = _centers(loss, batch, "proxies")
    rows = batch.embeddings
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(proxies):
        raise NotCovered("labels that are not in [0, num_classes)")
    factor = number("scale", scale, rows)
    sides = (proxies, rows) if proxies_first else (rows, proxies)
    inputs = scored(*sides, factor, similarity=score, normalize=normalize)
    own, others = labels.int(), torch.arange(len(proxies), device=rows.device, dtype=torch.int32)
    x_labels, y_labels = (others, own) if proxies_first else (own, others)
    return inputs._replace(x_labels=x_labels, y_labels=y_labels)


def proxy_nca(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "rbf", "euclidean", "dot")
    (scale,) = numbers_of(loss, "softmax_scale", above=0)
    sides = (distance.score, distance.normalize, scale)
    inputs = _against_proxies(loss, batch, *sides, proxies_first=False)
    stats, _ = pair_statistics(inputs, backend=batch.backend)
    losses, counted = positives_share(stats, mean=False)
    losses = batch.as_peer(losses)
    rows = (counted & (torch.exp(-losses.detach()) != 0)).nonzero()[:, 0]
    losses = losses[rows]
    if batch.indices is not None:
        # rows count as anchors
        lists = batch._replace(ref=(loss.proxies, None))
        weights = lists.weights()
        assert weights is not None
        losses = losses * weights[rows].to(losses.dtype)
    parts = {"loss": batch.elements(losses, rows)}
    loss.add_weight_regularization_to_loss_dict(parts, loss.proxies)
    return parts


def proxy_anchor(loss: Any, batch: PeerBatch) -> dict[str, Any]:
    distance = distance_of(loss, "dot", "euclidean", "rbf")
    (alpha,) = numbers_of(loss, "alpha", above=0)
    (margin,) = numbers_of(loss, "margin")
    sides = (distance.score, distance.normalize, 1.0)
    inputs = _against_proxies(loss, batch, *sides, proxies_first=True)
    inputs = inputs._replace(
        positive=Rule(-alpha, distance.center(margin)),
        negative=Rule(alpha, distance.center(-margin)),
    )
    weights = batch.weights()
    if weights is None:
        stats, _ = pair_statistics(inputs, backend=batch.backend)
        sums = stats.value
    elif distance.score != "dot":
        raise NotCovered("indices_tuple with distances")
    else:
        # the scores move, down for the ones and up for the others: a sweep for each
        move = ((weights - 1) / alpha).to(accumulate_dtype(batch.embeddings.dtype))
        stats, _ = pair_statistics(inputs._replace(y_bias=-move), backend=batch.backend)
        others, _ = pair_statistics(inputs._replace(y_bias=move), backend=batch.backend)
        sums = torch.stack([stats.value[POSITIVE], others.value[NEGATIVE]])
    present = int((stats.count[POSITIVE] > 0).sum())
    attract, repel = softplus(sums)
    parts = {
        "pos_loss": batch.elements(attract) | {"divisor": present},
        "neg_loss": batch.elements(repel) | {"divisor": loss.num_classes},
    }
    loss.add_weight_regularization_to_loss_dict(parts, loss.proxies)
    return parts


_row = functools.partial(loss_row, of_pairs=False)
AUTOCAST = "calls under autocast"
CLASS_LOSSES = (
    _row("ArcFaceLoss", arcface, "margin_softmax(margin=ArcFace)", AUTOCAST),
    _row("SubCenterArcFaceLoss", arcface, "margin_softmax of weight [C, K, D]", AUTOCAST),
    _row("CosFaceLoss", cosface, "margin_softmax(margin=CosFace)", AUTOCAST),
    _row("SphereFaceLoss", sphereface, "margin_softmax(margin=SphereFace)", AUTOCAST),
    _row("LargeMarginSoftmaxLoss", large_margin, "margin_softmax(normalize=False)", AUTOCAST),
    _row(
        "NormalizedSoftmaxLoss",
        normalized_softmax,
        "margin_softmax(margin=None)",
        f"{AUTOCAST}; distances",
    ),
    _row("SoftTripleLoss", soft_triple, "class_loss(SoftTriple)", AUTOCAST),
    _row("InstanceLoss", instance, "margin_softmax of the rows themselves"),
    _row("ProxyNCALoss", proxy_nca, "proxy_nca", AUTOCAST),
    _row(
        "ProxyAnchorLoss",
        proxy_anchor,
        "proxy_anchor",
        f"{AUTOCAST}; indices_tuple with a distance in the place of a similarity",
    ),
)

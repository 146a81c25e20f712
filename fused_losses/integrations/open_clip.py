"""open_clip: what computes in the place of its contrastive losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.functions.contrastive import sigmoid_contrastive
from fused_losses.functions.info_nce import info_nce
from fused_losses.integrations.acceleration import NotCovered, Peer, PeerCall, PeerRow

PACKAGE = "open_clip"


def _check_rows(image: Tensor, text: Tensor) -> None:
    if image.dim() != 2 or image.shape != text.shape or image.dtype != text.dtype:
        raise NotCovered("features of other shapes or dtypes")


def _as_peer(loss: Tensor, rows: Tensor) -> Tensor:
    return loss if torch.is_autocast_enabled(rows.device.type) else loss.to(rows.dtype)


def _number(name: str, value: Any, above: float = -float("inf")) -> Any:
    """A number or a tensor of one, which may need a gradient."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise NotCovered(f"{name} of {value.numel()} values")
        value = value.reshape(())
    if not float(value) > above:
        raise NotCovered(f"{name}={float(value)}")
    return value


def both_ways(
    call: PeerCall,
    loss: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Any,
    logit_bias: Any = None,
    output_dict: bool = False,
) -> Any:
    """A bias moves all scores of a softmax alike, and has no gradient."""
    _check_rows(image_features, text_features)
    if loss.world_size > 1:
        raise NotCovered("world_size > 1")
    scale = _number("logit_scale", logit_scale, above=0)
    value = info_nce(
        image_features,
        text_features,
        temperature=1 / scale,
        symmetric=True,
        backend=call.backend,
    )
    value = _as_peer(value, image_features)
    if logit_bias is not None:
        value = value + 0 * _number("logit_bias", logit_bias)
    return {"contrastive_loss": value} if output_dict else value


def pairs(
    call: PeerCall,
    loss: Any,  # noqa: ARG001 (all that it knows is of the ranks)
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Any,
    logit_bias: Any = None,
    negative_only: bool = False,
) -> Tensor:
    """One rank's images against one rank's texts, however the ranks exchange them."""
    _check_rows(image_features, text_features)
    n = len(image_features)
    labels = torch.arange(n, device=image_features.device) if negative_only else None
    value = sigmoid_contrastive(
        image_features,
        text_features,
        scale=_number("logit_scale", logit_scale),
        bias=0.0 if logit_bias is None else _number("logit_bias", logit_bias),
        labels=labels,
        y_labels=None if labels is None else labels + n,
        backend=call.backend,
    )
    return _as_peer(value, image_features)


PEER = Peer(
    package=PACKAGE,
    distribution="open_clip_torch",
    versions=("3.3",),
    rows=(
        PeerRow(
            "loss.ClipLoss",
            "forward",
            both_ways,
            "info_nce(symmetric=True)",
            "world_size > 1; features of two dtypes",
        ),
        PeerRow(
            "loss.SigLipLoss",
            "_loss",
            pairs,
            "sigmoid_contrastive",
            "features of two dtypes",
        ),
    ),
    left={
        "CoCaLoss": "a subclass of ClipLoss: its contrastive part stays the peer's",
        "DistillClipLoss": "not yet: `distillation` streams both score matrices",
    },
)

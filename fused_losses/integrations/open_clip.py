"""open_clip: what computes in the place of its contrastive losses."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses.centers.gathering import AllRows, all_rows
from fused_losses.functions.contrastive import sigmoid_contrastive
from fused_losses.functions.distillation import distillation
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
    told = float(value.detach() if isinstance(value, Tensor) else value)
    if not told > above:
        raise NotCovered(f"{name}={told}")
    return value


def _check_ranks(loss: Any) -> None:
    """Before any rank sends: what is not covered is not on every rank."""
    if loss.world_size == 1:
        return
    if getattr(loss, "use_horovod", False):
        raise NotCovered("use_horovod")
    here = dist.is_available() and dist.is_initialized()
    if not here or (dist.get_world_size(), dist.get_rank()) != (loss.world_size, loss.rank):
        raise NotCovered("ranks that are not those of the default process group")


def _everyones(loss: Any, rows: Tensor) -> AllRows:
    """All ranks' rows, with the gradient that the peer lets them have."""
    if loss.gather_with_grad:
        return all_rows(rows, even=True)
    found, first = all_rows(rows.detach(), even=True)
    if not loss.local_loss:
        found = torch.cat([found[:first], rows, found[first + len(rows) :]])
    return AllRows(found, first)


class _Ways(NamedTuple):
    """The rows of both ways, images to texts and back, and the columns that they meet."""

    image: Tensor
    text: Tensor
    images: Tensor
    texts: Tensor
    first: int  # whose column is row 0's
    whole: bool  # the rows are the columns: one sweep has both ways


def _ways(loss: Any, image: Tensor, text: Tensor) -> _Ways:
    """Of one rank; or this rank's rows, or all rows, against all ranks'."""
    _check_rows(image, text)
    if loss.world_size == 1:
        return _Ways(image, text, image, text, 0, True)
    (images, first), (texts, _) = _everyones(loss, image), _everyones(loss, text)
    if loss.local_loss:
        return _Ways(image, text, images, texts, first, False)
    return _Ways(images, texts, images, texts, 0, True)


def _contrastive(call: PeerCall, ways: _Ways, logit_scale: Any) -> Tensor:
    given: dict[str, Any] = dict(
        temperature=1 / _number("logit_scale", logit_scale, above=0), backend=call.backend
    )
    if ways.whole:
        value = info_nce(ways.image, ways.text, symmetric=True, **given)
    else:
        value = info_nce(ways.image, ways.texts, offset=ways.first, **given)
        value = (value + info_nce(ways.text, ways.images, offset=ways.first, **given)) / 2
    return _as_peer(value, ways.image)


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
    _check_ranks(loss)
    _number("logit_scale", logit_scale, above=0)
    value = _contrastive(call, _ways(loss, image_features, text_features), logit_scale)
    if logit_bias is not None:
        value = value + 0 * _number("logit_bias", logit_bias)
    return {"contrastive_loss": value} if output_dict else value


def captioned(
    call: PeerCall,
    loss: Any,
    image_features: Tensor,
    text_features: Tensor,
    logits: Tensor,
    labels: Tensor,
    logit_scale: Any,
    output_dict: bool = False,
) -> Any:
    """The contrastive part is ours, the captions' cross entropy the peer's."""
    if not loss.clip_loss_weight:
        raise NotCovered("clip_loss_weight=0")
    _check_ranks(loss)
    _number("logit_scale", logit_scale, above=0)
    value = _contrastive(call, _ways(loss, image_features, text_features), logit_scale)
    value = loss.clip_loss_weight * value
    same = copy.copy(loss)
    same.clip_loss_weight = 0
    _, caption = call.original(same, image_features, text_features, logits, labels, logit_scale)
    if output_dict:
        return {"contrastive_loss": value, "caption_loss": caption}
    return value, caption


def distilled(
    call: PeerCall,
    loss: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Any,
    dist_image_features: Tensor,
    dist_text_features: Tensor,
    dist_logit_scale: Any,
    output_dict: bool = False,
) -> Any:
    """The student's scores towards the teacher's, both ways, neither of which is stored."""
    _check_ranks(loss)
    scale = _number("logit_scale", logit_scale, above=0)
    of_teacher = _number("dist_logit_scale", dist_logit_scale, above=0)
    if isinstance(of_teacher, Tensor) and of_teacher.requires_grad:
        raise NotCovered("a teacher whose scale learns")
    if dist_image_features.dtype != image_features.dtype:
        raise NotCovered("a teacher of another dtype")
    if dist_image_features.requires_grad or dist_text_features.requires_grad:
        raise NotCovered("a teacher that learns")
    _check_rows(dist_image_features, dist_text_features)
    if len(dist_image_features) != len(image_features):
        raise NotCovered("a teacher of other rows")
    own = _ways(loss, image_features, text_features)
    with torch.no_grad():
        teacher = _ways(loss, dist_image_features, dist_text_features)
    given: dict[str, Any] = dict(
        kind="soft_ce", student_scale=scale, teacher_scale=of_teacher, backend=call.backend
    )
    toward = distillation(own.image, own.texts, teacher.image, teacher.texts, **given)
    toward = toward + distillation(own.text, own.images, teacher.text, teacher.images, **given)
    contrastive, toward = _contrastive(call, own, scale), _as_peer(toward / 2, image_features)
    if output_dict:
        return {"contrastive_loss": contrastive, "distill_loss": toward}
    return contrastive, toward


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
            "features of two dtypes; use_horovod",
        ),
        PeerRow(
            "loss.CoCaLoss",
            "forward",
            captioned,
            "info_nce(symmetric=True), beside the peer's captions",
            "features of two dtypes; use_horovod; clip_loss_weight=0",
        ),
        PeerRow(
            "loss.DistillClipLoss",
            "forward",
            distilled,
            'info_nce(symmetric=True) and distillation(kind="soft_ce")',
            "features of two dtypes; use_horovod; a teacher that learns",
        ),
        PeerRow(
            "loss.SigLipLoss",
            "_loss",
            pairs,
            "sigmoid_contrastive",
            "features of two dtypes",
        ),
    ),
    left={},
)

"""GradCache: its contrastive losses, without the matrix of scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.integers import count_up
from fused_losses.functions.info_nce import info_nce
from fused_losses.integrations.acceleration import Left, NotCovered, Peer, PeerCall, PeerRow


def _loss(
    call: PeerCall, loss: Any, x: Tensor, y: Tensor, target: Tensor | None, reduction: str
) -> Tensor:
    """Row i of x belongs to row target_i of y."""
    if x.dim() != 2 or y.dim() != 2 or x.dtype != y.dtype or not len(x):
        raise NotCovered("rows of other shapes or dtypes")
    if target is None:
        if len(x) * loss.target_per_qry != len(y):
            raise NotCovered("a number of rows that the peer refuses")
        target = count_up(len(x), x).long() * loss.target_per_qry
    elif target.shape != (len(x),) or target.is_floating_point():
        raise NotCovered("targets that are no index a row")
    elif not bool(((target >= 0) & (target < len(y))).all()):
        raise NotCovered("targets that are ignored or out of range")
    value = info_nce(
        x,
        y,
        temperature=1.0,
        labels=target,
        key_labels=count_up(len(y), y).long(),
        reduction=reduction,
        backend=call.backend,
    )
    return value if torch.is_autocast_enabled(x.device.type) else value.to(x.dtype)


def simple(
    call: PeerCall,
    loss: Any,
    x: Tensor,
    y: Tensor,
    target: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    return _loss(call, loss, x, y, target, reduction)


def with_closure(
    call: PeerCall,
    loss: Any,
    *reps: Tensor,
    query_closure: Callable[[], Tensor] | None = None,
    target: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor | Left:
    """The closure makes the queries, once; what is not covered then is the peer's, of these."""
    if len(reps) != 2 - (query_closure is not None):
        raise NotCovered("rows that the peer refuses")
    x, y = reps if query_closure is None else (query_closure(), reps[0])
    try:
        return _loss(call, loss, x, y, target, reduction)
    except NotCovered as left:
        return Left(call.original(loss, x, y, target=target, reduction=reduction), str(left))


def distributed(
    call: PeerCall,
    loss: Any,
    x: Tensor,
    y: Tensor,
    *,
    target: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Of all ranks' rows, which the peer gathers with a gradient for the rank's own."""
    if x.dim() != 2 or y.dim() != 2 or x.dtype != y.dtype or target is not None or not len(x):
        raise NotCovered("targets, or rows of other shapes or dtypes")
    if len(x) * loss.target_per_qry != len(y):
        raise NotCovered("a number of rows that the peer refuses")
    return _loss(call, loss, loss.gather_tensor(x), loss.gather_tensor(y), None, reduction)


PEER = Peer(
    package="grad_cache",
    distribution="GradCache",
    versions=(),
    rows=(
        PeerRow(
            "loss.SimpleContrastiveLoss",
            "__call__",
            simple,
            "info_nce(temperature=1)",
            "features of two dtypes; targets that are ignored",
        ),
        PeerRow(
            "loss.DistributedContrastiveLoss",
            "__call__",
            distributed,
            "info_nce(temperature=1), of the rows that the peer gathers",
            "features of two dtypes; targets",
        ),
        PeerRow(
            "loss.ContrastiveLossWithQueryClosure",
            "__call__",
            with_closure,
            "info_nce(temperature=1), of the rows that the closure makes",
            "features of two dtypes; targets that are ignored",
        ),
    ),
    left={
        "GradCache": "calls its loss, which is accelerated, and a model twice",
    },
)

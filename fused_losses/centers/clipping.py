"""One clipping over heads and what lies before them, as of one process that has all of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from fused_losses.base.parameters import check_parameter


class WaitingHead(Protocol):
    """`ClassCenters` with update="step", `SphericalHead`."""

    def grad_norm(self) -> float: ...

    def scale_grad(self, factor: float) -> None: ...


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    *heads: WaitingHead,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_ over these parameters and the whole tables of some heads.

    All gradients are multiplied by min(1, max_norm / (norm + 1e-6)), what waits for a head's
    `optimizer.step()` too; a norm that is not finite makes them NaN, which such a step refuses or
    skips. -> norm [], before that, alike on every rank.

    parameters: of the backbone, and a head's own (a scale or margins that learn); their gradients
        alike on every rank, as DistributedDataParallel leaves them, or sharded by FSDP2. Behind a
        GradScaler: after `scaler.unscale_` of every optimizer.
    max_norm: >= 0. heads: after their backwards; every rank must call it.
    error_if_nonfinite: RuntimeError for such a norm, before anything is changed.
    Raises RuntimeError for a head whose rows step inside backward: the norm of the backbone is not
    yet known there. Time: one sweep a head. Paper: Pascanu, Mikolov, Bengio, 2013.
    """
    check_parameter("max_norm", max_norm, 0)
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    tables = [head.grad_norm() for head in heads]
    norm = nn.utils.get_total_norm([p.grad for p in given if p.grad is not None])
    norm = getattr(norm, "full_tensor", lambda: norm)()  # of FSDP's shards
    wide = norm.double()
    whole = torch.linalg.vector_norm(torch.stack([wide, *(wide.new_tensor(t) for t in tables)]))
    if error_if_nonfinite and not bool(whole.isfinite()):
        raise RuntimeError(f"gradients: expected a finite norm, got {float(whole)}")
    nn.utils.clip_grads_with_norm_(given, max_norm, whole)
    for head in heads:
        head.scale_grad(float((max_norm / (whole + 1e-6)).clamp(max=1)))
    return whole.to(norm.dtype)

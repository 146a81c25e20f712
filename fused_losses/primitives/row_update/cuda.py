"""On the CUDA kernels of csrc/cuda/row_update.cu: one pass over the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.primitives.row_update.inputs import Adamw, Sgd
from fused_losses.primitives.row_update.rules import log_of

KERNELS = ("sgd", "adamw")  # that have a kernel


def run(p: Sgd | Adamw) -> None:
    """The call; no memory beside the tables."""
    if isinstance(p, Sgd):
        numbers = dict(momentum=p.momentum, share=1 - p.dampening, nesterov=p.nesterov)
        _launch("sgd_rows", p, {"weight": p.weight, "buffer": p.momentum_buffer}, numbers)
        return
    numbers = dict(
        step_at=_float32(p.step_tensor),
        step=p.step,
        share1=1 - p.beta1,
        share2=1 - p.beta2,
        beta2=p.beta2,
        log_beta1=log_of(p.beta1),
        log_beta2=log_of(p.beta2),
        eps=p.eps,
    )
    tables = {"weight": p.weight, "first": p.exp_avg, "second": p.exp_avg_sq}
    _launch("adamw_rows", p, tables, numbers)


def _float32(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(torch.float32)


def _launch(
    kernel: str, p: Sgd | Adamw, tables: Mapping[str, Tensor | None], numbers: dict[str, Any]
) -> None:
    narrow = p.grad.shape[1] <= 1 or p.grad.stride(1) == 1
    matrices = {**tables, "grad": p.grad if narrow else p.grad.contiguous()}
    described = {}
    for name, t in matrices.items():
        described[f"{name}_stride"] = 0 if t is None else t.stride(0)
        described[f"{name}_type"] = 0 if t is None else cuda_launch.ELEMENTS[t.dtype]
    cuda_launch.launch(
        kernel,
        **matrices,
        **described,
        **numbers,
        rows=p.rows.contiguous(),
        lr_at=_float32(p.lr_tensor),
        lr=p.lr,
        table=p.weight.shape[0],
        count=p.rows.shape[0],
        width=p.weight.shape[1],
        weight_decay=p.weight_decay,
        maximize=p.maximize,
    )
    for t in tables.values():
        # what autograd keeps of it is stale now
        if t is not None and not t.is_inference():
            torch.autograd.graph.increment_version(t)

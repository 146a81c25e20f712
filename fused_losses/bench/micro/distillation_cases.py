"""Distillation over classes from two factored heads: forward and backward, the teacher frozen."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.bench.measure import Provider
from fused_losses.bench.micro import peers
from fused_losses.bench.micro.cases import Case, against_eager, backward
from fused_losses.functions.distillation import distillation as fused_distillation
from fused_losses.primitives.row_statistics.inputs import kept_row


def kl_of_scores(u: Tensor, v: Tensor) -> Tensor:
    """The mean over rows of KL(softmax(v) || softmax(u)), as trainers write it."""
    given, found = F.log_softmax(v, 1), F.log_softmax(u, 1)
    return F.kl_div(found, given, reduction="batchmean", log_target=True)


def eager_kl(x: Tensor, w: Tensor, t: Tensor, wt: Tensor) -> Tensor:
    """Both N x C matrices of scores."""
    with torch.no_grad():
        v = t @ wt.T
    return kl_of_scores(x @ w.T, v)


def distillation(
    n: int,
    c: int,
    d: int,
    device: str = "cpu",
    rivals: str = "all",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """n rows of a student and of a teacher of the same width against their c classes each."""
    torch.manual_seed(seed)

    def rows(count: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(count, d, device=device)).to(dtype)

    # scores of size 1
    x, t = rows(n, d**-0.5).requires_grad_(), rows(n, d**-0.5)
    w, wt = rows(c).requires_grad_(), rows(c)
    title = f"Distillation (KL), B={n:,} C={c:,} D={d}"
    case = against_eager(
        title, fused_distillation, eager_kl, (x, w, t, wt), 6 * 2.0 * n * c * d, rivals
    )
    if device == "cpu":
        everything = memory_of_scores(n, c, dtype)
        for name in tuple(case.ours):
            kept, precision = f"{name}, scores kept", name.removeprefix("fused ")
            options: dict[str, Any] = dict(precision=precision, memory_budget=everything)
            case.providers[kept] = _step(partial(fused_distillation, x, w, t, wt, **options))
            case.ours.append(kept)
    if rivals == "all":
        for name, loss in peers.distillation(kl_of_scores).items():
            case.providers[name] = _step(partial(loss, x, w, t, wt))
    return case


def memory_of_scores(n: int, c: int, dtype: torch.dtype) -> int:
    """The budget that both sides' scores of all classes fit in."""
    return 2 * kept_row(n) * c * accumulate_dtype(dtype).itemsize


def _step(loss: partial[Tensor]) -> Provider:
    return lambda: backward(loss())

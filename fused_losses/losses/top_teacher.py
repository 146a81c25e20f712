"""Distillation from the K best scores of a teacher: rows of a list beside one sweep's lse."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.numerics import merged, softplus
from fused_losses.base.validation import NO_TARGET, describe
from fused_losses.losses.distillation_kinds import DistillationOptions
from fused_losses.losses.margin_softmax import kept_classes
from fused_losses.primitives.row_statistics import reference
from fused_losses.primitives.row_statistics.op import row_statistics
from fused_losses.primitives.topk.listed import listed

TOP_KINDS = ("kl", "jsd", "tv", "soft_ce", "pskd")


class TopTeacher(NamedTuple):
    """The K best scores of a teacher over C classes; every other class has probability 0."""

    ids: Tensor  # [N, K] int64 classes, distinct in a row
    values: Tensor  # [N, K] their scores, of any float dtype


def check_top(
    teacher: TopTeacher, kind: str, student: Tensor, c: int, weight: Any, bias: Any, scale: Any,
    unit: bool, classes: Any,
) -> None:  # fmt: skip
    """Raises TypeError, ValueError or IndexError that names the argument."""
    if kind not in TOP_KINDS:
        raise ValueError(
            f"kind: expected one of {', '.join(TOP_KINDS)} with a TopTeacher, got {kind!r}: it "
            "needs the scores of all classes"
        )
    others = dict(teacher_weight=weight, teacher_bias=bias, classes=classes)
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with a TopTeacher")
    if isinstance(scale, Tensor) or scale != 1 or unit:
        raise ValueError(
            "teacher_scale: expected 1, and normalize without the teacher, with a TopTeacher, "
            "whose values are scores"
        )
    n = student.shape[0]
    validation.check_integers("teacher.ids", teacher.ids, (n, None), student)
    k = teacher.ids.shape[1]
    values = validation.check_matrix("teacher.values", teacher.values, "[N, K]")
    if tuple(values.shape) != (n, k) or k == 0 or values.device != student.device:
        raise ValueError(
            f"teacher.values: expected shape ({n}, {max(k, 1)}) on {student.device} beside "
            f"teacher.ids, got {describe(values)}"
        )
    ordered = teacher.ids.long().sort(dim=1).values
    good = (ordered >= 0) & (ordered < c)
    distinct = (ordered[:, 1:] != ordered[:, :-1]).all()
    if torch.compiler.is_compiling() or ordered.is_meta:
        return
    if ordered.is_cuda:
        validation.assert_async(good.all(), f"teacher.ids: expected class ids in [0, {c})")
        validation.assert_async(distinct, "teacher.ids: expected distinct class ids in each row")
    elif not bool(good.all()):
        low, high = int(ordered.min()), int(ordered.max())
        raise IndexError(validation.label_error("teacher.ids", c, low, high))
    elif not bool(distinct):
        raise ValueError("teacher.ids: expected distinct class ids in each row, got duplicates")


def top_distillation(
    kind: str,
    x: Tensor,  # [N, D] with scale and temperature in it
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    teacher: TopTeacher,
    temperature: Tensor,
    labels: Tensor,  # [N], -1: none
    options: DistillationOptions,
    normalize: bool,
    precision: str,
    memory_budget: int,
    backend: str | None,
) -> Tensor:
    """The loss of each row, without T^2. [N]

    What the list leaves out has p_t = 0: of it m = (1 - beta) p_s, and |p_t - p_s| = p_s.
    """
    ids = teacher.ids.long()
    lse, target = _swept(x, weight, bias, labels, normalize, precision, memory_budget, backend)
    here = labels != NO_TARGET
    whole = torch.where(here, merged(lse, torch.where(here, target, -torch.inf)), lse)
    u = _listed(x, weight, bias, ids, normalize)
    log_s = u - whole[:, None]
    log_t = torch.log_softmax(teacher.values.to(u.dtype) / temperature.to(u), dim=1)
    p_t, p_s = log_t.exp(), log_s.exp()
    # a row of NaN stays one
    outside = 1 - p_s.sum(dim=1)
    outside = torch.where(outside < 0, 0, outside)
    if kind == "kl":
        return (p_t * (log_t - log_s)).sum(dim=1)
    if kind == "tv":
        return ((p_t - p_s).abs().sum(dim=1) + outside) / 2
    if kind == "jsd":
        beta = options.beta
        assert beta is not None
        log_m = merged(log_t + math.log(beta), log_s + math.log1p(-beta))
        inside = beta * p_t * (log_t - log_m) + (1 - beta) * p_s * (log_s - log_m)
        return inside.sum(dim=1) - (1 - beta) * math.log1p(-beta) * outside
    soft = -(p_t * log_s).sum(dim=1)
    if kind == "soft_ce":
        return soft
    assert options.alpha is not None
    return (1 - options.alpha) * softplus(lse - target) + options.alpha * soft


def _swept(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, normalize: bool,
    precision: str, memory_budget: int, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """lse of the classes that are no label, and the label's score, 0 without one. [N] each"""
    name, _ = backends.choose(
        backend, x.device, weight.dtype, precision, "row_statistics", x.shape[1]
    )
    if name == "reference":
        w = weight.to(x.dtype)
        found = reference.row_statistics(x, w, labels, None, bias, None, normalize)
        lse, target = found["lse"].double(), found["target"].double()
    else:
        stats = row_statistics(
            x, weight, labels, bias=bias, normalize=normalize, precision=precision,
            kept_classes=kept_classes(memory_budget, x, weight, len(weight)), backend=name,
        )  # fmt: skip
        lse, target = stats.lse, stats.target
    if bias is not None:
        target = target + torch.where(labels < 0, 0, bias[labels.clamp_min(0)]).to(target)
    return lse, target


def _listed(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, normalize: bool) -> Tensor:
    """The student's scores of listed classes, summed in float64. [N, K]"""
    if normalize:
        length = torch.linalg.vector_norm(x.double(), dim=1, keepdim=True)
        u = listed(x, weight, ids, "cosine") * length
    else:
        u = listed(x, weight, ids, "dot")
    return u if bias is None else u + bias[ids].to(u)

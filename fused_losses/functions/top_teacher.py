"""Distillation from the K best scores of a teacher: rows of a list beside one sweep's lse."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.memory_budget import Room
from fused_losses.base.numerics import against, merged, over_last, softplus
from fused_losses.base.validation import NO_TARGET, describe
from fused_losses.functions.distillation_kinds import DistillationOptions
from fused_losses.primitives.divergence.rules import bernoulli_kl
from fused_losses.primitives.row_statistics import reference
from fused_losses.primitives.row_statistics.inputs import kept_classes
from fused_losses.primitives.row_statistics.op import row_statistics
from fused_losses.primitives.topk.listed import listed

TOP_KINDS = ("kl", "jsd", "tv", "soft_ce", "pskd", "dkd", "ofa")


class TopTeacher(NamedTuple):
    """The K best scores of a teacher over C classes; every other class has probability 0."""

    ids: Tensor  # [N, K] int64 classes, distinct in a row
    values: Tensor  # [N, K] their scores, of any float dtype


def check_top(
    teacher: TopTeacher, kind: str, student: Tensor, c: int, weight: Any, bias: Any, scale: Any,
    unit: bool,
) -> None:  # fmt: skip
    """Raises TypeError, ValueError or IndexError that names the argument."""
    if kind not in TOP_KINDS:
        raise ValueError(
            f"kind: expected one of {', '.join(TOP_KINDS)} with a TopTeacher, got {kind!r}: it "
            "needs the scores of all classes"
        )
    for name, value in (("teacher_weight", weight), ("teacher_bias", bias)):
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


def check_known(
    teacher: TopTeacher,
    kind: str,
    labels: Tensor,  # [N], -1: none
    valid: Tensor,  # [N] bool
    classes: Tensor | None,
    c: int,
    options: DistillationOptions,
) -> None:
    """ValueError where a row's list has no class that the kind's shares of the teacher are of."""
    if classes is not None and not (torch.compiler.is_compiling() or classes.is_cuda):
        validation.check_classes(classes, c)
        validation.check_labels_in_classes(labels, classes)
    part = _taking_part(teacher.ids.long(), classes)
    wanted = "a listed class of every row among `classes`"
    taking_part = c if classes is None else classes.shape[0]
    if kind == "dkd" and options.removed is None and taking_part > 1:
        # its second term is of the other classes, and the list must know one
        part = part & (teacher.ids != labels[:, None])
        wanted = "with kind='dkd' a listed class of every row beside its label"
        wanted = wanted if classes is None else f"{wanted} and among `classes`"
    known = part.any(dim=1) | ~valid
    if torch.compiler.is_compiling() or known.is_meta:
        return
    if known.is_cuda:
        validation.assert_async(known.all(), f"teacher.ids: expected {wanted}")
    elif not bool(known.all()):
        row = int(known.int().argmin())
        raise ValueError(f"teacher.ids: expected {wanted}, got none in row {row}")


def _taking_part(ids: Tensor, classes: Tensor | None) -> Tensor:
    """Which listed classes are among `classes` (increasing; None: all). [N, K] bool"""
    if classes is None:
        return torch.ones_like(ids, dtype=torch.bool)
    place = torch.searchsorted(classes, ids).clamp_max(classes.shape[0] - 1)
    return classes[place] == ids


def top_distillation(
    kind: str,
    x: Tensor,  # [N, D] with scale and temperature in it
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    teacher: TopTeacher,
    temperature: Tensor,
    labels: Tensor,  # [N], -1: none
    classes: Tensor | None,  # [M] increasing
    options: DistillationOptions,
    normalize: bool,
    precision: str,
    room: Room | None,
    backend: str | None,
) -> Tensor:
    """The loss of each row, without T^2. [N]

    What the list leaves out has p_t = 0: of it m = (1 - beta) p_s, and |p_t - p_s| = p_s. What it
    has beyond `classes` takes no part.
    """
    ids = teacher.ids.long()
    given = x, weight, bias, labels, classes
    lse, target = _swept(*given, normalize, precision, room, backend)
    part, own = _taking_part(ids, classes), ids == labels[:, None]
    u = _listed(x, weight, bias, ids, normalize)
    v = teacher.values.to(u.dtype) / temperature.to(u)
    if kind == "dkd":
        return _decoupled(u, v, part, own, lse, target, options)
    here = labels != NO_TARGET
    whole = torch.where(here, merged(lse, torch.where(here, target, -torch.inf)), lse)
    log_s = torch.where(part, u - whole[:, None], 0)
    log_t = torch.where(part, v - over_last(v, part)[:, None], 0)
    p_t, p_s = (torch.where(part, log.exp(), 0) for log in (log_t, log_s))
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
    if kind == "ofa":
        assert options.eps is not None
        # ((p + 1)^eps - 1) of the label, 0 where the list leaves it out; p^eps of others
        power = torch.where(part, (options.eps * log_t).exp(), 0)
        power = torch.where(own, torch.expm1(options.eps * torch.log1p(p_t)), power)
        return (power * _away(log_s, own, lse, target)).sum(dim=1)
    soft = (p_t * _away(log_s, own, lse, target)).sum(dim=1)
    if kind == "soft_ce":
        return soft
    assert options.alpha is not None
    return (1 - options.alpha) * against(target, lse) + options.alpha * soft


def _away(log_s: Tensor, own: Tensor, lse: Tensor, target: Tensor) -> Tensor:
    """-log p_s of the list, the label's exact near p_s = 1. [N, K]"""
    return torch.where(own, against(target, lse)[:, None], -log_s)


def _decoupled(
    u: Tensor, v: Tensor, part: Tensor, own: Tensor, lse: Tensor, target: Tensor,
    options: DistillationOptions,
) -> Tensor:  # fmt: skip
    """DKD, from lists [N, K] and the student's lse and target [N]. [N]"""
    assert options.alpha is not None and options.beta is not None
    alone = lse == -torch.inf
    others = part & ~own
    log_s = torch.where(others, u - torch.where(alone, 0, lse)[:, None], 0)
    teacher_lse = over_last(v, others)
    some, listed_own = others.any(dim=1), (part & own).any(dim=1)
    log_t = torch.where(others, v - torch.where(some, teacher_lse, 0)[:, None], 0)
    apart = torch.where(others, log_t.exp() * (log_t - log_s), 0).sum(dim=1)
    z_s = torch.where(alone, 0, target - lse)
    z_t = torch.where(own, v, 0).sum(dim=1) - torch.where(some, teacher_lse, 0)

    def of_label(shift: float) -> Tensor:
        """KL of [p_y, 1 - p_y], of which the teacher's may be 0 or 1."""
        certain = softplus(torch.where(listed_own, -1, 1) * (z_s + shift))
        certain = certain + 0 * z_t.detach()  # a NaN of the teacher's shows
        both = listed_own & some
        return torch.where(
            both, bernoulli_kl(z_s + shift, torch.where(both, z_t, 0) + shift), certain
        )

    if options.removed is not None:
        rest = torch.where(listed_own, torch.sigmoid(-z_t - options.removed), 1)
        apart = of_label(options.removed) + torch.where(some, rest * apart, 0)
    loss = options.alpha * of_label(0.0) + options.beta * apart
    return torch.where(alone, 0, loss)


def _swept(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, classes: Tensor | None,
    normalize: bool, precision: str, room: Room | None, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """lse of the classes that are no label, and the label's score, 0 without one. [N] each"""
    name, _ = backends.choose(
        backend, x.device, weight.dtype, precision, "row_statistics", x.shape[1]
    )
    if name == "reference":
        w = weight.to(x.dtype)
        found = reference.row_statistics(x, w, labels, classes, bias, None, normalize)
        lse, target = found["lse"].double(), found["target"].double()
    else:
        taking_part = len(weight if classes is None else classes)
        stats = row_statistics(
            x, weight, labels, classes=classes, bias=bias, normalize=normalize, precision=precision,
            kept_classes=kept_classes(room, x, weight, taking_part), backend=name,
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

"""Divergences of two score matrices, materialised: the formulas as they are written."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base.numerics import merged, over_last, row_dtype, unit_rows
from fused_losses.base.products import product
from fused_losses.primitives.divergence.inputs import DivergenceInputs, check_ids


def _scores(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, normalize: bool, p: DivergenceInputs
) -> Tensor:
    """[N, C] in the dtype of products."""
    rows = rows.to(p.dtype)
    if weight is None:
        found = rows if p.teacher_scale is None else p.teacher_scale.to(p.dtype)[:, None] * rows
    else:
        weight = weight.to(p.dtype)
        found = product(rows, unit_rows(weight) if normalize else weight)
    return found if bias is None else found + bias.to(p.dtype)


def _folds(
    p: DivergenceInputs, u: Tensor, v: Tensor, lse: Tensor, teacher_lse: Tensor, others: Tensor
) -> list[Tensor]:
    """The rows of folds, from scores [N, K]; others: bool, the classes that are no target."""

    def total(terms: Tensor) -> Tensor:
        return torch.where(others, terms, 0).sum(dim=1)

    if p.kind == "power":
        (eps,) = p.params
        powered = over_last(eps * v, others)
        some = others.any(dim=1, keepdim=True)
        share = torch.where(some, (eps * v).masked_fill(~others & some, -torch.inf), 0).softmax(1)
        # about what the loss is less: of long rows' scores the mean would round as they do
        about = _finite(lse).detach()
        return [powered, total(share * (u - about)) + about[:, 0]]
    if p.kind == "squared":
        return [total((u - v) ** 2)]
    if p.kind in ("bernoulli", "bernoulli_norm"):
        (limit,) = p.params
        if p.kind == "bernoulli_norm":
            u, v = u - v, torch.zeros_like(v)
        if math.isfinite(limit):
            u, v = u.clamp(-limit, limit), v.clamp(-limit, limit)
        yes, no = F.logsigmoid(v), F.logsigmoid(-v)
        return [total(yes.exp() * (yes - F.logsigmoid(u)) + no.exp() * (no - F.logsigmoid(-u)))]
    # a label's score may be far above the others' sum, and its exponential no number
    log_s = torch.where(others, u - _finite(lse), 0)
    log_t = torch.where(others, v - _finite(teacher_lse), 0)
    q_s, q_t = log_s.exp(), log_t.exp()
    if p.kind == "forward":
        return [total(q_t * (log_t - log_s))]
    if p.kind == "reverse":
        return [total(q_s * (log_s - log_t))]
    if p.kind == "jensen_shannon":
        (beta,) = p.params
        log_m = merged(log_t + math.log(beta), log_s + math.log1p(-beta))
        of_s = total((1 - beta) * q_s * (log_s - log_m))
        of_t = total(beta * q_t * (log_t - log_m))
        return [of_s + of_t, of_s, of_t]
    sign = (q_s - q_t).sign() / 2
    return [total((q_t - q_s).abs() / 2), total(sign * q_s), -total(sign * q_t)]


def _finite(lse: Tensor) -> Tensor:
    """[N, 1]; a row without other classes has lse = -inf, and nothing to sum."""
    return torch.where(lse == -torch.inf, 0, lse)[:, None]


def reference(p: DivergenceInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The primitive from both N x C matrices, in PyTorch that any order of autograd follows."""
    check_ids(p)
    wide = row_dtype(p.x.device)
    u = _scores(p.x, p.weight, p.bias, p.normalize, p)
    v = _scores(p.teacher, p.teacher_weight, p.teacher_bias, p.teacher_normalize, p)
    here = p.labels >= 0
    picked = p.labels.clamp_min(0)[:, None]
    targets = [torch.where(here, z.gather(1, picked)[:, 0], 0) for z in (u, v)]
    ids = torch.arange(u.shape[1], device=u.device) if p.classes is None else p.classes
    u, v, others = u[:, ids], v[:, ids], p.labels[:, None] != ids
    lse, teacher_lse = over_last(u, others), over_last(v, others)
    folds = torch.stack(_folds(p, u, v, lse, teacher_lse, others))
    # an infinite score is a fault that must show
    sound = (u.isfinite() & v.isfinite()).all(dim=1)
    found = (lse, teacher_lse, *targets, folds)
    lse, teacher_lse, target, teacher_target, folds = (
        torch.where(sound, t, torch.nan).to(wide) for t in found
    )
    return lse, teacher_lse, target, teacher_target, folds

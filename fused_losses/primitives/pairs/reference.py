"""The truth of the sweep over pairs: the score matrix, its masks, and torch's reductions of it.

Memory O(N M); any device, float64, derivatives of any order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_losses.base.numerics import accumulate_dtype, row_dtype, softplus
from fused_losses.base.products import product
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, PairInputs, Rule

COORDINATES = 8  # that differences are taken of at a time


def _of_differences(x: Tensor, y: Tensor) -> Tensor:
    """sum_d (x_d - y_d)^2, [N, M]; all differences are alive at once."""
    return (x[:, None] - y).square().sum(dim=2)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2, [N, M], from differences: near pairs have all their digits.

    Some coordinates at a time, whose differences a backward takes anew.
    """
    # neither torch.func nor a trace wants a checkpoint's hooks
    kept = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    total = x.new_zeros(x.shape[0], y.shape[0])
    for a, b in zip(x.split(COORDINATES, 1), y.split(COORDINATES, 1), strict=True):
        if kept or not torch.is_grad_enabled():
            total = total + _of_differences(a, b)
            continue
        total = total + checkpoint(
            _of_differences, a, b, use_reentrant=False, preserve_rng_state=False
        )
    return total


def scores(p: PairInputs) -> Tensor:
    """s = psi(scale <x, y> + a + b), or psi(-scale |x - y|^2), [N, M]."""
    y, y_bias = (p.x, p.x_bias) if p.triangle else (p.y, p.y_bias)
    if p.apart:
        wide = accumulate_dtype(p.x.dtype)
        square = squared_distances(p.x.to(wide), y.to(wide))
        if p.score == "power":
            exact = square == 0
            u = -p.scale.to(wide) / 2 * torch.where(exact, 1, square).log()
            u = torch.where(exact, torch.inf, u)
        else:
            u = -p.scale.to(wide) * square
    else:
        u = p.scale.to(p.x.dtype) * product(p.x, y)
    u = u if p.x_bias is None else u + p.x_bias[:, None].to(u.dtype)
    u = u if y_bias is None else u + y_bias.to(u.dtype)
    if p.score != "root":
        return u
    # the subgradient of the root at 0 is 0
    return torch.where(u < 0, -torch.where(u < 0, -u, 1).sqrt(), u.clamp_min(0) * 0)


def classes(p: PairInputs) -> tuple[Tensor, Tensor]:
    """Masks [N, M] of the positive and of the negative pairs, windows apart."""
    n, m = p.x.shape[0], p.x.shape[0] if p.triangle else p.y.shape[0]
    labels, ids, groups = (p.x_labels, p.y_labels), (p.x_ids, p.y_ids), (p.x_groups, p.y_groups)

    def equal(pair: tuple[Tensor | None, Tensor | None]) -> Tensor:
        x, y = pair[0], pair[0] if p.triangle else pair[1]
        assert x is not None and y is not None
        return x[:, None] == y

    kept = torch.ones(n, m, dtype=torch.bool, device=p.x.device)
    if p.skip_self or p.triangle:
        kept &= ~torch.eye(n, m, dtype=torch.bool, device=p.x.device)
    if ids[0] is not None:
        kept &= ~equal(ids)
    if groups[0] is not None:
        kept &= equal(groups)
    if p.exclude is not None:
        columns = torch.arange(m, device=p.x.device)
        kept &= ~(p.exclude[:, :, None] == columns).any(dim=1)
    same = torch.zeros_like(kept) if labels[0] is None else equal(labels)
    return kept & same, kept & ~same


def term(s: Tensor, rule: Rule) -> Tensor:
    """z = factor (s - center) w, w detached."""
    rule = Rule(*rule)
    z = rule.factor * (s - rule.center)
    if rule.reach == float("inf"):
        return z
    sign = 1 if rule.factor >= 0 else -1
    return z * (rule.reach + sign * s.detach()).clamp_min(0)


def _side(p: PairInputs, s: Tensor, masks: tuple, window: Tensor | None, reduction: str) -> Tensor:
    """[4, 2, N]: value, total, count, best over the last dimension, a class a row."""
    out = []
    for kind, rule in ((POSITIVE, p.positive), (NEGATIVE, p.negative)):
        mask, z = masks[kind], term(s, rule)
        if window is not None:
            low, high = window[2 * kind, :, None], window[2 * kind + 1, :, None]
            # so written, a NaN score takes part
            mask = mask & ~((s <= low) | (s >= high))
        wide = row_dtype(s.device)
        none = z.masked_fill(~mask, -torch.inf)
        if reduction == "lse":
            # a row without pairs: a sum of zeros, dropped, so that no second derivative is NaN
            # one with an infinite score has an infinite sum, without a slope
            exact = (none == torch.inf).any(dim=1, keepdim=True) & (p.score == "power")
            alive = mask.any(dim=1, keepdim=True)
            value = torch.where(alive & ~exact, none, 0).logsumexp(dim=1, keepdim=True)
            value = torch.where(alive, value, -torch.inf)
            value = torch.where(exact, torch.inf, value)[:, 0]
        else:
            f = softplus(z) if reduction == "softplus" else F.relu(z)
            value = f.masked_fill(~mask, 0).sum(dim=1)
        total = z.masked_fill(~mask, 0).sum(dim=1)
        best = none.amax(dim=1) if s.shape[1] else s.new_full(s.shape[:1], -torch.inf)
        out.append(torch.stack([v.to(wide) for v in (value, total, mask.sum(dim=1), best)]))
    return torch.stack(out, dim=1)


def statistics(p: PairInputs, reduction: str, cols: bool) -> tuple[Tensor, Tensor]:
    """rows [4, 2, N] and columns [4, 2, M or 0]."""
    return statistics_of(p, scores(p), classes(p), reduction, cols)


def statistics_of(
    p: PairInputs, s: Tensor, masks: tuple[Tensor, Tensor], reduction: str, cols: bool
) -> tuple[Tensor, Tensor]:
    """`statistics` of scores that are known."""
    rows = _side(p, s, masks, p.x_window, reduction)
    if not cols or p.triangle:
        return rows, rows[..., :0]
    return rows, _side(p, s.T, (masks[0].T, masks[1].T), p.y_window, reduction)


def attention(values: Tensor, p: PairInputs, positives: bool) -> tuple[Tensor, Tensor]:
    """softmax over one class of pairs, times values [M, Dv]; and its logsumexp [N]."""
    s, kind = scores(p), POSITIVE if positives else NEGATIVE
    mask, z = classes(p)[kind], term(s, (p.positive, p.negative)[kind])
    if p.x_window is not None:
        low, high = p.x_window[2 * kind, :, None], p.x_window[2 * kind + 1, :, None]
        mask = mask & ~((s <= low) | (s >= high))
    alive = mask.any(dim=1, keepdim=True)
    # infinite scores share all the weight of their row
    infinite = mask & (z == torch.inf) & (p.score == "power")
    exact = infinite.any(dim=1, keepdim=True)
    z = torch.where(exact, torch.where(infinite, 0, -torch.inf).to(z.dtype), z)
    # a row without pairs: softmax over zeros, then dropped, so that no gradient is NaN
    weights = torch.where(alive, z.masked_fill(~mask & alive, -torch.inf), 0).softmax(dim=1)
    out = torch.where(alive, product(weights, values.to(weights.dtype).T), 0)
    lse = torch.where(alive, z.masked_fill(~mask & alive, -torch.inf), 0).logsumexp(dim=1)
    lse = torch.where(exact[:, 0], torch.inf, lse)
    return out, torch.where(alive[:, 0], lse, -torch.inf).to(row_dtype(s.device))

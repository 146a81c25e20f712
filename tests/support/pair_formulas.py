"""Formulas of the functions over pairs, written out with all their pairs, and inputs for them.

They follow the papers and use nothing of the package; they run in the dtype of their inputs, so
that in float64 they are the truth and in float32 or bfloat16 what a user would write.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pair_rows import (
    Inputs,
    distance,
    equal,
    eye,
    lse,
    mean_over,
    nce,
    nce_rows,
    others,
    square_distance,
    unit,
)
from torch import Tensor

# ---- formulas -----------------------------------------------------------------------------------


def diagonal_nce(t: Inputs, symmetric: bool = False, **options: object) -> Tensor:
    n, m = len(t.x), len(t.y)
    return nce(t.x @ t.y.T / 0.2, eye(n, m), ~eye(n, m), symmetric, **options)


def gathered_nce(t: Inputs) -> Tensor:
    n, m = len(t.x), len(t.y)
    positive = eye(n, m, m - n)
    return nce(t.x @ t.y.T / 0.2, positive, ~positive)


def own_key_nce(t: Inputs) -> Tensor:
    """MoCo: the positive, and no other key of the batch."""
    z, positive = segments(t)
    further = torch.arange(z.shape[1]) >= len(t.y)
    return nce(z, positive, further.expand_as(z))


def labelled_nce(t: Inputs, symmetric: bool = False) -> Tensor:
    same = equal(t.labels, t.y_labels)
    return nce(t.x @ t.y.T / 0.2, same, ~same, symmetric)


def segments(t: Inputs) -> tuple[Tensor, Tensor]:
    """z of keys, both banks and own negatives side by side, and the keys' diagonal."""
    columns = torch.cat([t.y, t.first_bank, t.second_bank])
    z = torch.cat([t.x @ columns.T, torch.einsum("nd,nkd->nk", t.x, t.negatives)], dim=1) / 0.2
    return z, eye(len(t.x), z.shape[1])


def segments_nce(t: Inputs, beta: float = 0.0) -> Tensor:
    z, positive = segments(t)
    return nce(z, positive, ~positive, beta=beta)


def labelled_bank_nce(t: Inputs) -> Tensor:
    z = t.x @ torch.cat([t.y, t.first_bank, t.second_bank]).T / 0.2
    same = equal(t.labels, torch.cat([t.y_labels, t.first_labels, t.second_labels]))
    return nce(z, same, ~same)


def margin_nce(t: Inputs, symmetric: bool = False) -> Tensor:
    n, m = len(t.x), len(t.y)
    s, positive = t.x @ t.y.T, eye(n, m)
    rows = ~positive & (s <= s.diagonal()[:, None] + 0.1)
    out = mean_over(*nce_rows(s / 0.2, positive, rows))
    if not symmetric:
        return out
    own = torch.full((m,), torch.inf, dtype=s.dtype)
    own[:n] = s.diagonal().detach()
    columns = ~positive & (s <= own + 0.1)
    return (out + mean_over(*nce_rows(s.T / 0.2, positive.T, columns.T))) / 2


def margin_segments_nce(t: Inputs) -> Tensor:
    z, positive = segments(t)
    own = torch.where(positive, z, 0).sum(1).detach()
    return nce(z, positive, ~positive & (z <= own[:, None] + 0.1 / 0.2))


def margin_labelled_nce(t: Inputs) -> Tensor:
    s, same = t.x @ t.y.T, equal(t.labels, t.y_labels)
    best = torch.where(same, s, -torch.inf).amax(1).detach()
    return nce(s / 0.2, same, ~same & (s <= best[:, None] + 0.1))


def ids_nce(t: Inputs) -> Tensor:
    n, m = len(t.x), len(t.y)
    positive = eye(n, m)
    negative = ~positive & ~equal(t.ids, t.y_ids)
    return nce(t.x @ t.y.T / 0.2, positive, negative, True)


def labelled_ids_nce(t: Inputs) -> Tensor:
    same, kept = equal(t.labels, t.y_labels), ~equal(t.ids, t.y_ids)
    return nce(t.x @ t.y.T / 0.2, same & kept, ~same & kept)


def exclude_nce(t: Inputs) -> Tensor:
    n, m = len(t.x), len(t.y)
    kept = (t.exclude[:, :, None] != torch.arange(m)).all(1)
    return nce(t.x @ t.y.T / 0.2, eye(n, m) & kept, ~eye(n, m) & kept)


def learned_nce(t: Inputs) -> Tensor:
    z = unit(t.x) @ unit(t.y).T / t.temperature
    return nce(z, eye(*z.shape), ~eye(*z.shape), True)


def supcon_rows(z: Tensor, positive: Tensor, everything: Tensor) -> tuple[Tensor, Tensor]:
    count = positive.sum(1)
    log_p = torch.where(positive, z - lse(z, everything)[:, None], 0)
    return -log_p.sum(1) / count.clamp_min(1), count > 0


def supcon_out(t: Inputs) -> Tensor:
    z = unit(t.x) @ unit(t.x).T / t.temperature
    rows, _ = supcon_rows(z, others(t.labels)[0], ~eye(len(z)))
    return rows.mean() * t.temperature / 0.07


def supcon_in(t: Inputs) -> Tensor:
    positive, negative = others(t.labels)
    return nce(t.x @ t.x.T / 0.3, positive, negative)


def supcon_anchors(t: Inputs) -> Tensor:
    n = (len(t.x) + 1) // 2
    positive = others(t.labels)[0][:n]
    return mean_over(*supcon_rows(t.x[:n] @ t.x.T / 0.3, positive, ~eye(len(t.x))[:n]))


def nt_xent_simclr(t: Inputs) -> Tensor:
    z, positive = t.x @ t.x.T / t.temperature, others(t.labels)[0]
    return mean_over(lse(z, ~eye(len(z)))[:, None] - z, positive)


def nt_xent_pairs(t: Inputs) -> Tensor:
    z = t.x @ t.x.T / t.temperature
    positive, negative = others(t.labels)
    return mean_over(torch.logaddexp(z, lse(z, negative)[:, None]) - z, positive)


def nt_xent_views(t: Inputs) -> Tensor:
    x = torch.cat([t.x, t.x.flip(1) / 2])
    n = len(t.x)
    z, positive = x @ x.T / 0.3, eye(2 * n, 2 * n, n) | eye(2 * n, 2 * n, -n)
    return mean_over(lse(z, ~eye(2 * n))[:, None] - z, positive)


def sigmoid(t: Inputs, positive: Tensor) -> Tensor:
    z = t.scale * (t.x @ t.y.T) + t.bias
    # F.softplus is linear past 20, wrong by 2e-9
    return torch.logaddexp(torch.where(positive, -z, z), z.new_zeros(())).sum() / len(z)


def soft_nearest(t: Inputs) -> Tensor:
    positive, negative = others(t.labels)
    return nce(-square_distance(t.x, t.x) / t.temperature, positive, negative)


def multi_similarity(t: Inputs) -> Tensor:
    s = unit(t.x) @ unit(t.x).T
    positive, negative = others(t.labels)
    attract = torch.where(positive, torch.exp(-2 * (s - 0.5)), 0).sum(1)
    repel = torch.where(negative, torch.exp(20 * (s - 0.5)), 0).sum(1)
    return ((1 + attract).log() / 2 + (1 + repel).log() / 20).mean()


def orthogonal_projection(t: Inputs, gamma: float = 0.5, absolute: bool = False) -> Tensor:
    s = unit(t.x) @ unit(t.x).T
    positive, negative = others(t.labels)
    far = s.abs() if absolute else s
    near = torch.where(positive, s, 0).sum() / (positive.sum().to(s.dtype) + 1e-6)
    return (
        1 - near + gamma * torch.where(negative, far, 0).sum() / (negative.sum().to(s.dtype) + 1e-6)
    )


def multi_similarity_mined(t: Inputs, below: float = 1 - 1e-5) -> Tensor:
    s = unit(t.x) @ unit(t.x).T
    positive, negative = others(t.labels)
    positive = positive & (s < below)
    least = torch.where(positive, s, torch.inf).amin(1, keepdim=True)
    most = torch.where(negative, s, -torch.inf).amax(1, keepdim=True)
    positive, negative = positive & (s - 0.1 < most), negative & (s + 0.1 > least)
    attract = torch.where(positive, torch.exp(-2 * (s - 0.5)), 0).sum(1)
    repel = torch.where(negative, torch.exp(20 * (s - 0.5)), 0).sum(1)
    both = positive.any(1) & negative.any(1)
    return torch.where(both, (1 + attract).log() / 2 + (1 + repel).log() / 20, 0).mean()


def circle_rows(t: Inputs) -> tuple[Tensor, Tensor]:
    """The losses, and which rows have pairs of both kinds. [N] each"""
    s = unit(t.x) @ unit(t.x).T
    positive, negative = others(t.labels)
    attract = -40 * F.relu(1.25 - s.detach()) * (s - 0.75)
    repel = 40 * F.relu(s.detach() + 0.25) * (s - 0.25)
    both = positive.any(1) & negative.any(1)
    inside = torch.where(both, lse(attract, positive) + lse(repel, negative), 0)
    # F.softplus is linear past 20, wrong by 2e-9
    return torch.logaddexp(inside, torch.zeros_like(inside)), both


def circle(t: Inputs) -> Tensor:
    return mean_over(*circle_rows(t))


def lifted_pairs(t: Inputs, margin: float = 1.0) -> tuple[Tensor, Tensor]:
    """What each pair costs, and which pairs count. [N, N] each"""
    d = distance(t.x, t.x)
    positive, negative = others(t.labels)
    repel = lse(margin - d, negative)
    both = torch.stack([repel[:, None].expand_as(d), repel.expand_as(d)], dim=2)
    some = both > -torch.inf
    inside = torch.where(some.any(2), lse(both, some) + d, 0)
    return F.relu(inside).square() / 2, positive


def lifted(t: Inputs, margin: float = 1.0) -> Tensor:
    return mean_over(*lifted_pairs(t, margin))


def generalized_lifted(t: Inputs) -> Tensor:
    d = distance(t.x, t.x)
    positive, negative = others(t.labels)
    both = positive.any(1) & negative.any(1)
    inside = torch.where(both, lse(d - 0.1, positive) + lse(1 - d, negative), 0)
    return mean_over(F.relu(inside), both)


def n_pairs(t: Inputs) -> Tensor:
    x, y = t.x, t.y[: len(t.x)]
    squares = (x.square().sum(1) + y.square().sum(1)) / 2
    return F.cross_entropy(x @ y.T, torch.arange(len(x))) + 0.1 * squares.mean()


def proxy_nca(t: Inputs, inside: bool) -> Tensor:
    z = -t.scale * square_distance(unit(t.x), unit(t.w))
    target = eye(len(t.w))[t.targets]
    if len(t.w) == 1:
        return (z * 0).sum()
    # of one positive a sum, too, whose weight is rounded as those of several are
    gap = lse(z, ~target) - lse(z, target)
    return (-F.logsigmoid(-gap) if inside else gap).mean()


def proxy_anchor(t: Inputs) -> Tensor:
    s, target = unit(t.w) @ unit(t.x).T, equal(torch.arange(len(t.w)), t.targets)
    attract = (1 + torch.where(target, torch.exp(-8 * (s - 0.1)), 0).sum(1)).log()
    repel = (1 + torch.where(target, 0, torch.exp(8 * (s + 0.1))).sum(1)).log()
    return attract.sum() / target.any(1).sum() + repel.mean()


def transport(t: Inputs, cost: str) -> Tensor:
    c = {
        "cosine": lambda: 1 - unit(t.x) @ unit(t.y).T,
        "dot": lambda: 1 - t.x @ t.y.T,
        "sqeuclidean": lambda: square_distance(t.x, t.y),
    }[cost]()
    k = (-c.detach() / 0.5).double()
    f, g = k.new_zeros(len(t.x)), k.new_zeros(len(t.y))
    for _ in range(8):
        f = -math.log(len(t.x)) - (k + g).logsumexp(1)
        g = -math.log(len(t.y)) - (k + f[:, None]).logsumexp(0)
    return ((k + f[:, None] + g).exp().to(c.dtype) * c).sum()


def attend(z: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    some = mask.any(1, keepdim=True)
    weights = torch.where(some, z.masked_fill(~mask & some, -torch.inf), 0).softmax(1)
    return torch.where(some, weights @ v, 0)


def cosine_attention(t: Inputs) -> Tensor:
    z = t.scale * (unit(t.x) @ unit(t.y).T)
    same = equal(t.labels, t.y_labels)
    return attend(z, t.v, same)


def third_order(t: Inputs) -> Tensor:
    pairs = (t.few[:, None] * t.z).flatten(0, 1)
    values = (t.few_values[:, None] * t.w).flatten(0, 1)
    return (t.x @ pairs.T / t.x.shape[1] ** 0.5).softmax(1) @ values


def log_gaussian(x: Tensor, y: Tensor, width: float | Tensor) -> Tensor:
    return -square_distance(x, y) / (2 * width**2)


def gaussian(x: Tensor, y: Tensor, width: float | Tensor) -> Tensor:
    return log_gaussian(x, y, width).exp()


def mmd(t: Inputs) -> Tensor:
    k = [gaussian(a, b, 1.3) for a, b in ((t.x, t.x), (t.other, t.other), (t.x, t.other))]
    return k[0].mean() + k[1].mean() - 2 * k[2].mean()


def mmd_unbiased(t: Inputs) -> Tensor:
    means = []
    for a in (t.x, t.other):
        k = (-distance(a, a) / 1.3).exp()
        means.append(mean_over(k, ~eye(len(a))))
    return sum(means) - 2 * (-distance(t.x, t.other) / 1.3).exp().mean()


def hsic(t: Inputs) -> Tensor:
    n = len(t.x)
    h = torch.eye(n, dtype=t.x.dtype) - 1 / n
    return (gaussian(t.x, t.x, 1.3) @ h @ gaussian(t.y, t.y, 0.8) @ h).trace() / n**2


def qmi(t: Inputs) -> Tensor:
    """Of logarithms: e^-745 is 0 in float64, and its logarithm infinite."""
    k, l = log_gaussian(t.x, t.x, 1.3), log_gaussian(t.y, t.y, 0.8)
    cross = (k.logsumexp(1) + l.logsumexp(1)).logsumexp(0)
    both, *each = (z.flatten().logsumexp(0) for z in (k + l, k, l))
    return both + sum(each) - 2 * cross


def divergence(t: Inputs) -> Tensor:
    k = log_gaussian(t.x, t.x, 1.3)
    weight = (2 * k).logsumexp(1)
    pairs = ((t.y, t.y), (t.z, t.z), (t.z, t.y))
    terms = [((k + log_gaussian(a, b, 0.8)).logsumexp(1) - weight).logsumexp(0) for a, b in pairs]
    return terms[0] + terms[1] - 2 * terms[2]


def uniformity(t: Inputs) -> Tensor:
    x = unit(t.x)
    if len(x) < 2:
        return (x * 0).sum()
    return lse((-2 * square_distance(x, x)).flatten(), ~eye(len(x)).flatten()) - math.log(
        len(x) * (len(x) - 1)
    )


def group_rows(t: Inputs) -> Tensor:
    z = -t.scale * distance(t.x, t.x)
    mask = equal(t.labels, t.labels) & ~eye(len(z))
    return zero_rows(lse(z, mask))


def masked_both(t: Inputs) -> Tensor:
    z = unit(t.x) @ unit(t.y).T * t.scale
    kept = ~equal(t.labels, t.y_labels + 1)
    same = equal(t.labels, t.y_labels)
    rows = torch.cat([lse(z, same & kept), lse(z, ~same & kept)])
    columns = torch.cat([lse(z.T, (same & kept).T), lse(z.T, (~same & kept).T)])
    return zero_rows(torch.cat([rows, columns]))


def zeroed(t: Inputs) -> Tensor:
    z = torch.where(equal(t.labels, t.y_labels), 0, t.scale * (t.x @ t.y.T))
    return torch.cat([z.logsumexp(1), z.logsumexp(0)])


def compatibility(t: Inputs) -> Tensor:
    y = t.y[: len(t.x)]
    z = torch.where(equal(t.labels, t.labels), 0, t.scale * (y @ t.x.T))
    return (z.logsumexp(1) - t.scale * (t.x * y).sum(1)).mean()


def zero_rows(value: Tensor) -> Tensor:
    """-inf, which stands for no pairs, as 0: so that errors can be measured."""
    return torch.where(value == -torch.inf, 0, value)


def both_told(found: tuple[Tensor, Tensor]) -> Tensor:
    return zero_rows(torch.cat([f.flatten() for f in found]))

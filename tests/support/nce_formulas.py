"""Formulas of InfoNCE by groups, told banks and apart from its own denominator, with all pairs."""

from __future__ import annotations

import torch
from pair_formulas import sigmoid
from pair_rows import Inputs, equal, eye, lse, nce
from torch import Tensor


def groups_nce(t: Inputs) -> Tensor:
    same, met = equal(t.labels, t.y_labels), equal(t.ids, t.y_ids)
    return nce(t.x @ t.y.T / 0.2, same & met, ~same & met)


def told_banks_nce(t: Inputs) -> Tensor:
    """MoCo against rows of a bank of other ids and of the anchor's group."""
    own, bank = (t.x * t.y[: len(t.x)]).sum(1), torch.cat([t.first_bank, t.second_bank])
    told = torch.cat([t.first_labels, t.second_labels])
    far, met = ~equal(t.labels, told), equal(t.ids, told)
    z = torch.cat([own[:, None], t.x @ bank.T], dim=1) / 0.2
    first = eye(1, z.shape[1]).expand_as(z)
    return nce(z, first, torch.cat([first[:, :1] & False, far & met], dim=1))


def few(integers: Tensor, like: Tensor) -> Tensor:
    return eye(4)[integers % 4].to(like) * (1 + integers % 3)[:, None].to(like)


def bounded_by(guide: Tensor, positive: Tensor, margin: float = 0.0) -> Tensor:
    """Which pairs a guide leaves: none that it finds nearer than the row's best positive."""
    best = torch.where(positive, guide, -torch.inf).amax(1, keepdim=True)
    return (guide <= best - margin * best.abs()) | (best == -torch.inf)


def guided_nce(t: Inputs) -> Tensor:
    z, guide = t.x @ t.y.T / 0.2, few(t.ids, t.x) @ few(t.y_ids, t.x).T
    halves = []
    for score, g in ((z, guide), (z.T, guide.T)):
        own = eye(*score.shape)
        halves.append(nce(score, own, ~own & bounded_by(g, own)))
    return (halves[0] + halves[1]) / 2


def guided_banks_nce(t: Inputs) -> Tensor:
    every = torch.cat([t.y, t.first_bank, t.second_bank])
    labels = torch.cat([t.y_labels, t.first_labels, t.second_labels])
    told = torch.cat([t.y_ids, t.first_labels, t.second_labels])
    same, guide = equal(t.labels, labels), few(t.ids, t.x) @ few(told, t.x).T
    return nce(t.x @ every.T / 0.2, same, ~same & bounded_by(guide, same, 0.5))


def hardest(z: Tensor, negative: Tensor, share: float) -> Tensor:
    """Of each row's negatives the ceil(share n) of largest z, one after the other."""
    out = torch.zeros_like(negative)
    for i in range(len(z)):
        at = negative[i].nonzero()[:, 0]
        count = -(-round(share * 10) * len(at) // 10)
        order = sorted(at.tolist(), key=lambda j: (-float(z[i, j].detach()), j))
        out[i, order[:count]] = True
    return out


def share_nce(t: Inputs, labelled: bool = False) -> Tensor:
    z = t.x @ torch.cat([t.y, t.first_bank]).T / 0.2
    keys = equal(t.labels, t.y_labels) if labelled else eye(len(t.x), len(t.y))
    same = torch.cat([keys, keys.new_zeros(len(t.x), len(t.first_bank))], dim=1)
    out = nce(z, same, hardest(z, ~same, 0.4))
    if labelled:
        return out
    z = t.y @ t.x.T / 0.2
    return (out + nce(z, keys.T, hardest(z, ~keys.T, 0.4))) / 2


def labelled_share_nce(t: Inputs) -> Tensor:
    return share_nce(t, True)


def labelled_sigmoid(t: Inputs) -> Tensor:
    return sigmoid(t, equal(t.labels, t.y_labels))


def weighted_rows(z: Tensor, w: Tensor) -> Tensor:
    """The mean of log sum e^z - log sum w e^z over the rows with a weight."""
    some = (w > 0).any(1)
    weighted = lse(z + torch.where(w > 0, w, 1).log(), w > 0)
    share = z.logsumexp(1) - torch.where(some, weighted, 0)
    return torch.where(some, share, 0).sum() / some.sum().clamp_min(1)


def weighted_nce(t: Inputs) -> Tensor:
    z = t.x @ t.y.T / 0.2
    one, other = (equal(own % 3, t.y_labels % 3).to(z) for own in (t.labels, t.ids))
    w = one / 4 + other * 0.75
    return (weighted_rows(z, w) + weighted_rows(z.T, w.T)) / 2


def targets_nce(t: Inputs) -> Tensor:
    """A cross entropy with two targets a row, of the keys' half each key's own."""
    z, n = t.x @ t.y.T / 0.2, len(t.x)
    w = torch.zeros_like(z)
    for i in range(n):
        w[i, i] += 0.75
        w[i, (i + 1) % n] += 0.25
    wide = torch.cat([z, t.x @ t.first_bank.T / 0.2], dim=1)
    rows = (w * (wide.logsumexp(1)[:, None] - z)).sum() / max(n, 1)
    columns = (w * (z.logsumexp(0) - z)).sum(0)
    return (rows + columns.sum() / max(n, 1)) / 2


def decoupled_nce(t: Inputs) -> Tensor:
    z = t.x @ t.y.T / 0.2
    halves = []
    for score in (z, z.T[: len(t.x)]):
        negative = ~eye(*score.shape)
        some = negative.any(dim=1)
        # the columns' own are those of the rows
        share = lse(score, negative) - score.diagonal()
        halves.append(torch.where(some, share, 0).mean())
    return (halves[0] + halves[1]) / 2

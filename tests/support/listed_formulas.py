"""Losses over listed pairs of two sets of rows, by how often each pair of them is listed.

They follow the papers and use nothing of the package, and run in the dtype of their inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pair_rows import Inputs, distance, lse, square_distance, unit
from row_loss_formulas import two_batches
from torch import Tensor


def mined(n: int, m: int, d: int) -> Inputs:
    """Two batches and lists of their pairs, some of which stand there twice, or of no row."""
    t = two_batches(n, m, d)
    for names, count in (("ap", 3 * n), ("bq", 4 * n)):
        one, other = torch.randint(max(1, n - 1), (count,)), torch.randint(m, (count,))
        if names == "bq":  # no pair is of both classes
            kept = ~((one[:, None] == t.a) & (other[:, None] == t.p)).any(1)
            one, other = one[kept], other[kept]
        setattr(t, names[0], one)
        setattr(t, names[1], other)
    return t


def listed(t: Inputs) -> tuple[Tensor, Tensor]:
    """How often each pair is listed as a positive and as a negative, [N, M] each."""
    nothing = torch.zeros(len(t.x), len(t.y), dtype=t.x.dtype)
    put = lambda i, j: nothing.index_put((i, j), nothing.new_ones(()), accumulate=True)
    return put(t.a, t.p), put(t.b, t.q)


def over(total: Tensor, count: Tensor) -> Tensor:
    return total.sum() / count.sum().clamp_min(1)


def weighted_lse(z: Tensor, times: Tensor) -> Tensor:
    return lse(z + torch.where(times > 0, times, 1).log(), times > 0)


def both_sums(z_near: Tensor, z_far: Tensor, t: Inputs) -> tuple[Tensor, Tensor]:
    """lse_P + lse_N of pairs that count once, and which rows have both."""
    near, far = (times > 0 for times in listed(t))
    some = near.any(1) & far.any(1)
    sums = lse(z_near, near) + lse(z_far, far)
    return torch.where(some, sums, 0), some


def contrastive(t: Inputs) -> Tensor:
    d, (near, far) = distance(t.x, t.y), listed(t)
    attract = over(near * F.relu(d - 0.2), near * (d > 0.2))
    return attract + over(far * F.relu(1.1 - d), far * (d < 1.1))


def margin(t: Inputs, per: str = "triplet") -> Tensor:
    d, (near, far) = distance(t.x, t.y), listed(t)
    p, n = (near.sum(1), far.sum(1)) if per == "triplet" else (1, 1)
    attract, repel = F.relu(d - 1.0), F.relu(1.4 - d)
    total = (near * attract).sum(1) * n + (far * repel).sum(1) * p
    return over(total, (near * (attract > 0)).sum(1) * n + (far * (repel > 0)).sum(1) * p)


def threshold_consistent(t: Inputs) -> Tensor:
    s, (near, far) = unit(t.x) @ unit(t.y).T, listed(t)
    attract = 0.7 * over(near * F.relu(0.87 - s), near * (s < 0.87))
    return attract + 0.6 * over(far * F.relu(s - 0.07), far * (s > 0.07))


def snr(t: Inputs) -> Tensor:
    noise = (t.y - t.x[:, None]).var(dim=2, unbiased=False)
    power = (t.x - t.x[:, :1]).var(dim=1, unbiased=False)[:, None]
    alive = power > 0
    d = torch.where(alive, noise / torch.where(alive, power, 1), 0)
    near, far = listed(t)
    attract = over(near * F.relu(d - 0.1), near * (d > 0.1))
    return attract + over(far * F.relu(1.5 - d), far * (d < 1.5))


def intra_pair_variance(t: Inputs) -> Tensor:
    s, (near, far) = unit(t.x) @ unit(t.y).T, listed(t)
    low, high = 0.95 * over(near * s, near), 1.03 * over(far * s, far)
    return over(near * F.relu(low - s).square(), near) + over(far * F.relu(s - high).square(), far)


def multi_similarity(t: Inputs) -> Tensor:
    s, (near, far) = unit(t.x) @ unit(t.y).T, listed(t)
    attract = torch.where(near > 0, (-2 * (s - 0.5)).exp(), 0).sum(1)
    repel = torch.where(far > 0, (20 * (s - 0.5)).exp(), 0).sum(1)
    return (attract.log1p() / 2 + repel.log1p() / 20).mean()


def circle(t: Inputs) -> Tensor:
    s = unit(t.x) @ unit(t.y).T
    near = -40 * F.relu(1.25 - s.detach()) * (s - 0.75)
    far = 40 * F.relu(s.detach() + 0.25) * (s - 0.25)
    sums, some = both_sums(near, far, t)
    return over(torch.where(some, torch.logaddexp(sums, torch.zeros_like(sums)), 0), some)


def generalized_lifted(t: Inputs) -> Tensor:
    d = distance(t.x, t.y)
    sums, some = both_sums(d - 0.1, 1 - d, t)
    return over(torch.where(some, F.relu(sums), 0), some)


def lifted(t: Inputs, alone: bool = False) -> Tensor:
    """alone: y is x, and the negatives of both ends count."""
    d, (near, far) = distance(t.x, t.y), listed(t)
    of_rows = weighted_lse(0.8 - d, far)
    against = of_rows[:, None].expand(d.shape)
    against = torch.logaddexp(against, of_rows[None]) if alone else against
    some = (near > 0) & (against > -torch.inf)
    hinge = F.relu(torch.where(some, against, 0) + d)
    return over(torch.where(some, near * hinge.square() / 2, 0), near)


def orthogonal_projection(t: Inputs) -> Tensor:
    s, (near, far) = unit(t.x) @ unit(t.y).T, listed(t)
    near, far = near.clamp_max(1), far.clamp_max(1)
    mean = lambda v, times: (times * v).sum() / (times.sum() + 1e-6)
    return 1 - mean(s, near) + 0.5 * mean(s, far)


def _shares(z: Tensor, t: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """log of all, log of the positives' share of it, and which rows have a positive."""
    near, far = (times > 0 for times in listed(t))
    some = near.any(1)
    all_, of_near = lse(z, near | far), lse(z, near)
    return all_, torch.where(some, all_, 0) - torch.where(some, of_near, 0), some


def supervised_contrastive(t: Inputs) -> Tensor:
    z = unit(t.x) @ unit(t.y).T / 0.3
    near = listed(t)[0].clamp_max(1)
    all_, _, some = _shares(z, t)
    mean = (near * z).sum(1) / near.sum(1).clamp_min(1)
    return over(torch.where(some, torch.where(some, all_, 0) - mean, 0), some)


def soft_nearest_neighbor(t: Inputs) -> Tensor:
    _, loss, some = _shares(-square_distance(t.x, t.y) / 0.7, t)
    return over(torch.where(some, loss, 0), some)


def nt_xent(t: Inputs) -> Tensor:
    z, (near, far) = unit(t.x) @ unit(t.y).T / 0.3, listed(t)
    against = weighted_lse(z, far)
    some = (near > 0) & (against > -torch.inf)[:, None]
    gap = torch.where(some, torch.where(some, against[:, None], 0) - z, 0)
    return over(near * torch.where(some, torch.logaddexp(gap, torch.zeros_like(gap)), 0), near)

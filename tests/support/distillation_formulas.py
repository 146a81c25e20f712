"""The losses of distillation on whole matrices of scores, by logarithms of the softmaxes.

Nothing of the package is imported.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = {"dkd": 4.0, "bernoulli": 2.0, "bernoulli_norm": 2.0}  # where it is not 1


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Of logarithms, over the last dimension."""
    return (p.exp() * (p - q)).sum(-1)


def of_scores(
    kind: str, u: Tensor, v: Tensor, labels: Tensor, t: Tensor | float, **o: float
) -> Tensor:
    """A loss a row of scores over T, [N, C] -> [N]."""
    p, q = torch.log_softmax(v, 1), torch.log_softmax(u, 1)
    hot = F.one_hot(labels, u.shape[1]).to(u)
    if kind == "kl":
        return t**2 * _kl(p, q)
    if kind == "reverse_kl":
        return t**2 * _kl(q, p)
    if kind == "jsd":
        b = o.get("beta", 0.5)
        # of logarithms: of a class that both find as good as impossible there is none; its shares
        # are rounded apart from the others: a slope that sums to 0 over the classes does so to u
        p_m, q_m = torch.log_softmax(v, 1), torch.log_softmax(u, 1)
        m = torch.stack([p_m + math.log(b), q_m + math.log(1 - b)]).logsumexp(0)
        return t**2 * (b * _kl(p, m) + (1 - b) * _kl(q, m))
    if kind == "tv":
        return (p.exp() - q.exp()).abs().sum(1) / 2
    if kind == "soft_ce":
        return -(p.exp() * q).sum(1)
    if kind == "pskd":
        a = o.get("alpha", 0.8)
        return -(((1 - a) * hot + a * p.exp()) * q).sum(1)
    if kind == "ofa":
        return -(((p.exp() + hot) ** o.get("eps", 1.0) - hot) * q).sum(1)
    if kind == "mse":
        return ((u - v) ** 2).mean(1)
    if kind == "dkd":
        if u.shape[1] == 1:
            return 0 * (u + v).sum(1)
        low = o.get("removed", -1e30) * hot
        rest = _kl(torch.log_softmax(v + low, 1), torch.log_softmax(u + low, 1))
        p, q = (
            torch.stack([(z * hot).sum(1), torch.logsumexp(z - 1e30 * hot, 1)], 1) for z in (p, q)
        )
        return t**2 * (o.get("alpha", 1.0) * _kl(p, q) + o.get("beta", 8.0) * rest)
    if kind == "bernoulli_norm":
        u, v = u - v, torch.zeros_like(v)
    cut = o.get("eps", 0.0)
    if cut:
        p, q = (torch.sigmoid(z).clamp(cut, 1 - cut) for z in (v, u))
        return t**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    yes = v.sigmoid() * (F.logsigmoid(v) - F.logsigmoid(u))
    no = (-v).sigmoid() * (F.logsigmoid(-v) - F.logsigmoid(-u))
    return t**2 * (yes + no).sum(1)

"""Inputs of functions over pairs, and what formulas are made of; nothing of the package."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = SimpleNamespace


def towers(n: int, m: int, d: int) -> Inputs:
    """Two sets of rows of norm about 1 whose first n belong together."""
    m = max(n, m)
    x, y = torch.randn(n, d), torch.randn(m, d)
    y[:n] += x
    labels = torch.randint(0, n // 3 + 1, (n,))
    y_labels = torch.cat([labels, torch.randint(0, n // 3 + 3, (m - n,))])
    return Inputs(
        x=x / d**0.5,
        y=y / d**0.5,
        temperature=torch.tensor(0.2),
        labels=labels,
        y_labels=y_labels,
        ids=torch.randint(0, n // 2 + 1, (n,)),
        y_ids=torch.randint(0, n // 2 + 1, (m,)),
        exclude=torch.randint(-1, m, (n, 3)),
    )


def towers_and_more(n: int, m: int, d: int) -> Inputs:
    t = towers(n, m, d)
    t.first_bank, t.second_bank = torch.randn(m, d) / d**0.5, torch.randn(3, d) / d**0.5
    t.first_labels, t.second_labels = torch.randint(0, n // 3 + 3, (m,)), torch.arange(3)
    t.negatives = torch.randn(n, 4, d) / d**0.5
    return t


def siglip(n: int, m: int, d: int) -> Inputs:
    t = towers(n, m, d)
    t.scale, t.bias = torch.tensor(3.0), torch.tensor(-2.0)
    return t


def batch(n: int, m: int, d: int) -> Inputs:
    """One labelled batch; the last row has a label of its own."""
    labels = torch.randint(0, n // 4 + 1, (n,))
    labels[-1] = 2**40
    centers = torch.randn(n // 4 + 1, d)
    x = torch.randn(n, d) + centers[labels.clamp_max(n // 4)]
    return Inputs(x=x / d**0.5, labels=labels, temperature=torch.tensor(0.3))


def proxies(n: int, m: int, d: int) -> Inputs:
    labels = torch.randint(0, m, (n,))
    w = torch.randn(m, d)
    x = torch.randn(n, d) + w[labels]
    return Inputs(x=x / d**0.5, w=w / d**0.5, targets=labels, scale=torch.tensor(1.5))


def attention(n: int, m: int, d: int) -> Inputs:
    return Inputs(
        x=torch.randn(n, d),
        y=torch.randn(m, d),
        v=torch.randn(m, d + 2),
        scale=torch.tensor(0.7),
        labels=torch.randint(0, 3, (n,)),
        y_labels=torch.randint(0, 3, (m,)),
    )


def trilinear(n: int, m: int, d: int) -> Inputs:
    j = max(1, m // 3)
    return Inputs(
        x=torch.randn(n, d),
        few=torch.randn(j, d),
        z=torch.randn(m, d),
        few_values=torch.randn(j, 3),
        w=torch.randn(m, 3),
    )


def samples(n: int, m: int, d: int) -> Inputs:
    """Paired samples: y depends on x; z is a guess of y. Far from the origin."""
    x = torch.randn(n, d)
    y = x[:, :1] + 0.3 * torch.randn(n, 2)
    return Inputs(
        x=x + 5,
        y=y - 5,
        z=y + 0.2 * torch.randn(n, 2) - 5,
        other=1.2 * torch.randn(m, d) + 5.5,
        width=torch.tensor(1.3),
    )


def lse(z: Tensor, mask: Tensor) -> Tensor:
    """logsumexp over the last dimension of what the mask keeps; -inf, gradient 0, over nothing."""
    some = mask.any(dim=-1, keepdim=True)
    kept = torch.where(mask, z, -torch.inf)
    return torch.where(some, torch.where(some, kept, 0).logsumexp(-1, keepdim=True), -torch.inf)[
        ..., 0
    ]


def equal(a: Tensor, b: Tensor) -> Tensor:
    return a[:, None] == b


def eye(n: int, m: int | None = None, offset: int = 0) -> Tensor:
    return torch.arange(n)[:, None] + offset == torch.arange(n if m is None else m)


def mean_over(loss: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, loss, 0).sum() / counted.sum().clamp_min(1)


def square_distance(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).square().sum(-1)


def distance(x: Tensor, y: Tensor) -> Tensor:
    square = square_distance(x, y)
    alive = ~(square <= 0)  # a NaN stays one
    return torch.where(alive, torch.where(alive, square, 1).sqrt(), 0)


def unit(x: Tensor) -> Tensor:
    """x / |x| a row; a row of zeros stays one, with gradient 0."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    zero = norm == 0
    return torch.where(zero, 0, x / torch.where(zero, 1, norm))


def others(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs of one batch."""
    same = equal(labels, labels)
    return same & ~eye(len(labels)), ~same


def nce_rows(
    z: Tensor, positive: Tensor, negative: Tensor, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """-log(sum_P / (sum_P + sum_N)) a row, and which rows have positives."""
    attract, repel = lse(z, positive), lse(z, negative)
    if beta:
        count = negative.sum(-1).clamp_min(1).to(z.dtype)
        tilted = count.log() + lse((1 + beta) * z, negative) - lse(beta * z, negative)
        repel = torch.where(negative.any(-1), tilted, -torch.inf)
    counted = positive.any(-1)
    # softplus(repel - attract): a logsumexp of both less attract would leave noise of its slope 1
    some = counted & (repel > -torch.inf)
    above = torch.where(some, repel, 0) - torch.where(some, attract, 0)
    return torch.where(some, F.softplus(above, threshold=600), 0), counted


def nce(
    z: Tensor, positive: Tensor, negative: Tensor, symmetric: bool = False, beta: float = 0.0
) -> Tensor:
    out = mean_over(*nce_rows(z, positive, negative, beta))
    if not symmetric:
        return out
    return (out + mean_over(*nce_rows(z.T, positive.T, negative.T, beta))) / 2

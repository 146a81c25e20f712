"""A loss of your own: ten lines of autograd on a streamed sum, no kernel and no N x N matrix.

    loss_i = softplus(log sum_n e^(s c_in) - log sum_p e^(s c_ip) + m)

over the row's negatives n and positives p, c the cosine: the softest negative has to stay below the
softest positive by a margin. It is held to its formula with the matrix, then separates two spirals.

    python examples/own_loss.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_losses as fl

matplotlib.use("agg")
import matplotlib.pyplot as plt


def soft_gap(rows: Tensor, labels: Tensor, scale: float = 8.0, margin: float = 1.0) -> Tensor:
    """The loss above of rows [N, D] and labels [N]. Time O(N^2 D), memory O(N D)."""
    positive, negative = fl.logsumexp_similarity(
        rows, similarity="cosine", scale=scale, x_labels=labels, match="both", skip_self=True
    )
    return F.softplus(negative - positive + margin).mean()


def literal(rows: Tensor, labels: Tensor, scale: float = 8.0, margin: float = 1.0) -> Tensor:
    """The same with the matrix of all pairs."""
    unit = F.normalize(rows)
    scores, same = scale * unit @ unit.T, labels[:, None] == labels
    positive = scores.masked_fill(~same | torch.eye(len(rows), dtype=torch.bool), -torch.inf)
    negative = scores.masked_fill(same, -torch.inf)
    return F.softplus(negative.logsumexp(1) - positive.logsumexp(1) + margin).mean()


def spirals(n: int) -> tuple[Tensor, Tensor]:
    """Two spirals that wind around one another: points [n, 2] and their labels [n]."""
    labels = torch.arange(n) % 2
    turn = 1.5 * torch.pi * torch.rand(n).sqrt() * 2
    angle = turn + torch.pi * labels
    points = torch.stack([turn * angle.cos(), turn * angle.sin()], 1) / 6
    return points + 0.02 * torch.randn(n, 2), labels


def draw(before: Tensor, after: Tensor, points: Tensor, labels: Tensor, out: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    told = ("points", "rows before", "rows after")
    for axis, rows, title in zip(axes, (points, before, after), told, strict=True):
        axis.scatter(*rows.T.numpy(), c=labels.numpy(), s=6, cmap="coolwarm")
        axis.set_title(title)
        axis.set_aspect("equal")
        if rows is not points:  # on the circle
            axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--rows", type=int, default=512)
    options.add_argument("--out", type=Path, default=Path("runs/examples/own_loss.png"))
    args = options.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    points, labels = spirals(args.rows)
    double = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    some = torch.arange(40) % 2
    (ours,) = torch.autograd.grad(soft_gap(double, some), double)
    (told,) = torch.autograd.grad(literal(double, some), double)
    error = float((ours - told).norm() / told.norm())
    print(f"gradient against the formula with the matrix, float64: {error:.1e}")
    print(fl.explain(soft_gap, torch.randn(65_536, 64), torch.arange(65_536) % 2))

    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    with torch.no_grad():
        before = F.normalize(net(points))
    first = last = float("nan")
    for step in range(args.steps):
        loss = soft_gap(net(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (float(loss.detach()) if step == 0 else first), float(loss.detach())
    with torch.no_grad():
        after = F.normalize(net(points))
    itself = torch.arange(args.rows)[:, None]
    nearest = fl.pairwise_topk(after, after, 9, "cosine", exclude=itself)[1]
    right = float((labels[nearest] == labels[:, None]).float().mean())
    print(f"loss {first:.3f} to {last:.3f}; {right:.1%} of the nine nearest are of a row's label")
    draw(before, after, points, labels, args.out)
    print(f"picture: {args.out}")
    return {"error": error, "first": first, "last": last, "right": right}


if __name__ == "__main__":
    main()

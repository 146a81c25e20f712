"""What is drawn of a loss: its surface over two cosines, its weights on pairs, its embedding."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_losses.losses.owned import LabelledLoss
from tools.gallery.problems import CLASSES, Batch, Problem

TICKS = torch.linspace(-0.98, 0.98, 9, dtype=torch.float64)
GOAL = (0.7, -0.3)  # the two cosines where a teacher has them
STEPS, RATE = 40, 0.06


def _eye(*which: int, d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)[list(which)]


def _at(positive: float, negative: float) -> tuple[Tensor, Tensor, Tensor]:
    """An anchor, its positive and a negative, by the anchor's cosines with both. each [6]"""
    anchor, aside, apart = _eye(0, 1, 2, d=6)
    return (
        anchor,
        positive * anchor + math.sqrt(1 - positive**2) * aside,
        negative * anchor + math.sqrt(1 - negative**2) * apart,
    )


def _four(problem: Problem, positive: float, negative: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, labels and classes where the anchor is so near to what it meets."""
    a, p, n = _at(positive, negative)
    other = _eye(3, d=6)[0]
    if _meets_classes(problem):
        # the other two rows lie on classes, where they say little
        rows = torch.stack([a, n, other])
        return rows, torch.arange(3), torch.stack([p, n, other])
    beside = 0.9 * n + math.sqrt(1 - 0.81) * other
    centers = torch.stack([p, n, other])
    return torch.stack([a, p, n, beside]), torch.tensor([0, 0, 1, 1]), centers


def _meets_classes(problem: Problem) -> bool:
    own = issubclass(problem.entry.module, LabelledLoss)
    given = {"student_weight", "weight", "prototypes", "logits"} & problem.values.keys()
    return own or bool(given) or "num_classes" in problem.entry.module.__init__.__annotations__


@torch.no_grad()
def _centered(module: nn.Module, centers: Tensor) -> None:
    """Puts a module's own classes where the batch has them, where they can be put."""
    weight = getattr(module, "weight", getattr(module, "means", None))
    if not isinstance(weight, Tensor) or weight.shape[-1] != centers.shape[1]:
        return
    if weight.shape[0] == len(centers):
        # several centres of a class lie near to it
        spread = weight.dim() == 3
        near = weight + 3 * centers[:, None] if spread else centers
        # a row on the mean of its own Gaussian may have loss -inf
        length = 2 if hasattr(module, "covariance") else 1
        weight.copy_(near / (length * near.norm(dim=-1, keepdim=True)))


def _fixed(module: nn.Module) -> Tensor | None:
    """The classes of a module whose places are fixed. [C, d]"""
    vertices = getattr(getattr(module, "head", None), "rows", None)
    placed = vertices(torch.arange(CLASSES), torch.float64) if callable(vertices) else None
    return placed if isinstance(placed, Tensor) else None


def _placed(classes: Tensor, positive: float, negative: float) -> Tensor:
    """Rows of which the first is so near to two classes, NaN where none can be."""
    near = torch.linalg.pinv(classes[:2]) @ torch.tensor([positive, negative]).to(classes)
    left = 1 - near.square().sum()
    aside = torch.linalg.svd(classes).Vh[-1]
    return torch.stack([near + left.sqrt() * aside, *classes[1:]])


def surface(problem: Problem) -> Tensor:
    """The loss over the cosine of the positive and that of the negative, NaN where it is not
    finite. [negative, positive]"""
    goal, labels, fixed = _four(problem, *GOAL)
    module = problem.build(Batch(goal, labels, goal, fixed))
    state = copy.deepcopy(module.state_dict())
    fixed = _fixed(module)
    found = torch.empty(len(TICKS), len(TICKS), dtype=torch.float64)
    for i, negative in enumerate(TICKS.tolist()):
        for j, positive in enumerate(TICKS.tolist()):
            rows, _, centers = _four(problem, positive, negative)
            module.load_state_dict(state)
            _centered(module, centers)
            if fixed is not None:
                rows = _placed(fixed, positive, negative)
            with torch.no_grad():
                value = problem.loss(module, Batch(rows, labels, _goal(goal, rows), centers))
            found[i, j] = value.mean()
    return torch.where(found.isfinite(), found, torch.nan)


def _goal(goal: Tensor, rows: Tensor) -> Tensor:
    return goal if len(goal) == len(rows) else rows


class Weights(NamedTuple):
    """How strongly rows are drawn to columns: w of -dL/dx_i = sum_j w_ij y_j; < 0: driven away."""

    matrix: Tensor  # [n, columns]
    columns: list[tuple[str, int]]  # the groups of columns and their sizes
    rows: Tensor  # [n] labels
    missed: float  # the share of the gradient that no column explains


def _columns(problem: Problem, module: nn.Module, b: Batch) -> dict[str, Tensor]:
    """What rows may be drawn to, by its name."""
    d, groups = b.rows.shape[1], {"rows": b.rows}
    for name, held in (*module.named_parameters(), *module.named_buffers()):
        if held.dim() > 1 and held.shape[-1] == d and len(held.detach().reshape(-1, d)) <= 40:
            groups["classes" if name == "weight" else name] = held.detach().clone().reshape(-1, d)
    fixed = _fixed(module)
    if fixed is not None:
        groups["classes"] = fixed
    names = problem.values.keys()
    if names & {"student_weight", "weight", "prototypes", "centers", "logits"}:
        groups["classes"] = b.centers
    if problem.entry.block == "distributions" or names & {"teacher", "ref_emb", "frozen", "real"}:
        groups["goal"] = b.goal
    return groups


def weights(problem: Problem, seed: int = 0) -> Weights:
    """Of a batch of nine rows (eight of towers) in so many dimensions that all columns are
    independent: the gradient is then told apart, column by column."""
    generator = torch.Generator().manual_seed(seed)
    d = 64
    labels = _labels(problem, 3 if not problem.towers else 2)
    size = len(labels)
    means = torch.randn(int(labels.max()) + 1, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, size, d, generator=generator, dtype=torch.float64)
    shared = torch.randn(d, generator=generator, dtype=torch.float64)
    rows, goal = (
        _unit(means[labels] + shared + k * e) for k, e in zip((2.4, 0.6), noise, strict=True)
    )
    centers = _unit(torch.randn(CLASSES, d, generator=generator, dtype=torch.float64) + means[:3])
    b = Batch(rows.requires_grad_(), labels, goal, centers)
    module = problem.build(b)
    _centered(module, centers)
    # before the call, which moves a queue
    groups = _columns(problem, module, b._replace(rows=rows.detach()))
    (slope,) = torch.autograd.grad(problem.loss(module, b).mean(), rows)
    every = torch.cat(list(groups.values()))
    found = -torch.linalg.lstsq(every.T, slope.T, driver="gelsd").solution.T
    missed = float((slope + found @ every).norm() / slope.norm().clamp_min(1e-300))
    found[:, :size].fill_diagonal_(0)
    parts = found.split([len(g) for g in groups.values()], dim=1)
    largest = float(found.abs().max())
    kept = [
        (n, p) for n, p in zip(groups, parts, strict=True) if float(p.abs().max()) > 1e-3 * largest
    ]
    kept = kept or [("rows", parts[0])]
    order = torch.arange(size)
    if problem.towers:
        order = torch.cat([order[::2], order[1::2]])
        kept = [(n, p[:, order] if n == "rows" else p) for n, p in kept]
    matrix = torch.cat([p for _, p in kept], dim=1)[order]
    return Weights(matrix, [(n, p.shape[1]) for n, p in kept], labels[order], missed)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def _labels(problem: Problem, each: int) -> Tensor:
    """Of towers a class a pair, four of them."""
    return torch.arange(4 if problem.towers else CLASSES).repeat_interleave(each)


class Embedding(NamedTuple):
    """Rows on a circle, before and after."""

    before: Tensor  # [n, 2]
    after: Tensor
    labels: Tensor
    goal: Tensor
    losses: tuple[float, float]


def embedding(problem: Problem, seed: int = 1) -> Embedding:
    """STEPS of Adam on the rows, which stay on the circle, and on the module's parameters."""
    generator = torch.Generator().manual_seed(seed)
    labels = _labels(problem, 2 if problem.towers else 5)
    noise = torch.randn(2, len(labels), generator=generator, dtype=torch.float64)
    angles = 2 * math.pi / (int(labels.max()) + 1) * labels + 0.4
    start, goal = (_circle(angles + k * e) for k, e in zip((1.2, 0.15), noise, strict=True))
    centers = _circle(2 * math.pi / CLASSES * torch.arange(CLASSES) + 0.4)
    rows = start.clone().requires_grad_()
    b = Batch(rows, labels, goal, centers)
    module = problem.build(b)
    _centered(module, centers)
    moved = [rows, *(p for p in module.parameters() if p.requires_grad)]
    # torch's Adam takes longer than the losses of a dozen rows
    means, squares = ([torch.zeros_like(p) for p in moved] for _ in range(2))
    values = []
    for step in range(1, STEPS + 1):
        loss = problem.loss(module, b).mean()
        slopes = torch.autograd.grad(loss, moved, allow_unused=True)
        with torch.no_grad():
            for p, g, m, v in zip(moved, slopes, means, squares, strict=True):
                if g is not None:
                    m.lerp_(g, 0.1)
                    v.lerp_(g.square(), 0.001)
                    scale = (v / (1 - 0.999**step)).sqrt() + 1e-8
                    p -= RATE * m / (1 - 0.9**step) / scale
            rows.copy_(_unit(rows))
        values.append(float(loss.detach()))
    return Embedding(start, rows.detach(), labels, goal, (values[0], values[-1]))


def _circle(angles: Tensor) -> Tensor:
    angles = angles.double()
    return torch.stack([angles.cos(), angles.sin()], dim=1)

"""Mining by explicit loops over a matrix of distances, in plain PyTorch and Python."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def batch(n: int, d: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple:
    return torch.randn(n, d, dtype=torch.float64).to(dtype), torch.randint(0, classes, (n,))


def matrix(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """The metric by its formula, in float64."""
    x, y = x.double(), y.double()
    if metric == "cosine":
        x, y = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
    if metric in ("dot", "cosine"):
        return (x[:, None] * y).sum(dim=2)
    apart = x[:, None] - y
    if metric == "cityblock":
        return apart.abs().sum(dim=2)
    squared = apart.square().sum(dim=2)
    return squared.sqrt() if metric == "euclidean" else squared


def allowed(labels: Tensor, ref_labels: Tensor, own: bool, ids=None, ref_ids=None) -> tuple:
    """For each row the columns of its label and of others, lists."""
    same, different = [], []
    for i in range(len(labels)):
        columns = [
            j
            for j in range(len(ref_labels))
            if not (own and i == j) and not (ids is not None and ids[i] == ref_ids[j])
        ]
        same.append([j for j in columns if labels[i] == ref_labels[j]])
        different.append([j for j in columns if labels[i] != ref_labels[j]])
    return same, different


def best(columns: list[int], z: list[float], farthest: bool) -> list[int]:
    """The first of the farthest, or nearest, columns, as a list of one or none."""
    return [min(columns, key=lambda j: (-z[j] if farthest else z[j], j))] if columns else []


def triplets_by_loops(
    d: Tensor,
    sign: int,
    same: list[list[int]],
    different: list[list[int]],
    positive: str = "hardest",
    negative: str = "hardest",
    keep=lambda g: True,
    ranges: tuple = (None, None),
    fallback: bool = False,
) -> list[tuple[int, int, int]]:
    out = []
    for i in range(len(d)):
        raw = d[i].tolist()
        z = [sign * v for v in raw]
        ps, ns = (
            [j for j in side if bounds is None or bounds[0] <= raw[j] <= bounds[1]]
            for side, bounds in ((same[i], ranges[0]), (different[i], ranges[1]))
        )

        def side(which: str, columns: list[int], hardest: bool, z: list = z) -> list[int]:
            return columns if which == "all" else best(columns, z, hardest == (which == "hardest"))

        pairs = []
        if negative == "semihard":
            for p in side(positive, ps, True):
                chosen = best([n for n in ns if z[n] > z[p]], z, False)
                chosen = chosen or (best(ns, z, True) if fallback else [])
                pairs += [(p, n) for n in chosen]
        elif positive == "semihard":
            for n in side(negative, ns, False):
                pairs += [(p, n) for p in best([p for p in ps if z[p] < z[n]], z, True)]
        else:
            pairs = list(itertools.product(side(positive, ps, True), side(negative, ns, False)))
        out += [(i, p, n) for p, n in sorted(pairs) if keep(z[n] - z[p])]
    return out


def lines(found: tuple[Tensor, ...]) -> list[tuple[int, int, int]]:
    return list(zip(*(t.tolist() for t in found[:3]), strict=True))


def pairs_by_loops(d: Tensor, sign: int, same: list, different: list, choose) -> tuple:
    """choose(z, positives, negatives) -> the kept ones of a row."""
    positive, negative = [], []
    for i in range(len(d)):
        ps, ns = choose([sign * v for v in d[i].tolist()], same[i], different[i])
        positive += [(i, p) for p in sorted(ps)]
        negative += [(i, n) for n in sorted(ns)]
    return positive, negative


def multi_similarity(z: list[float], ps: list[int], ns: list[int]) -> tuple:
    if not ps or not ns:
        return [], []
    nearest, farthest = min(z[n] for n in ns), max(z[p] for p in ps)
    return [p for p in ps if z[p] + 0.1 > nearest], [n for n in ns if z[n] - 0.1 < farthest]

"""Divergences of two score matrices in float64 from their formulas: the Triton tests' truth.

The formulas of `divergence_formulas` go row by row and are of moderate scores; these are of any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_losses.primitives.divergence import triton
from fused_losses.primitives.divergence.inputs import (
    DivergenceGradients,
    DivergenceInputs,
    DivergenceNeeds,
    DivergenceSaved,
)

NAMES = ("x", "weight", "teacher", "teacher_weight", "bias", "teacher_bias", "teacher_scale")
INF = float("inf")
# each kind with a parameter of it
KINDS: dict[str, list[float]] = {
    "forward": [],
    "reverse": [],
    "power": [0.75],
    "jensen_shannon": [0.25],
    "total_variation": [],
    "bernoulli": [4.5],
    "bernoulli_norm": [INF],
    "squared": [],
}


@dataclass
class Case:
    """One call, forward and backward."""

    kind: str = "forward"
    n: int = 37
    c: int = 53
    d: int = 24
    teacher_d: int = 16
    dtype: torch.dtype = torch.float32
    precision: str = "fp32"
    dense: bool = False  # the teacher's scores are given
    normalize: bool = False
    extra: bool = False  # biases of both sides, and of dense scores a scale a row
    classes: int = 0  # how many take part; 0 = all
    no_target: float = 0.2  # share of the labels that are -1
    scale: float = 3.0
    strided: bool = False
    near: int = 0  # of how many rows and classes both sides are near each other
    name: str = field(default="", compare=False)


def call(case: Case, seed: int = 0) -> DivergenceInputs:
    g = torch.Generator().manual_seed(seed)
    n, c = case.n, case.c

    def side(d: int) -> tuple[Tensor, Tensor]:
        rows = case.scale * torch.randn(n, d, generator=g)
        return rows.to(case.dtype), (torch.randn(c, d, generator=g) * d**-0.5).to(case.dtype)

    x, weight = side(case.d)
    teacher, teacher_weight = side(case.teacher_d)
    for own, others in ((x, teacher), (weight, teacher_weight)) if case.near else ():
        others[: case.near] = own[: case.near] * (1 + 2**-8 * torch.rand(case.near, 1, generator=g))
    ids = torch.randperm(c, generator=g)[: case.classes].sort().values if case.classes else None
    pool = torch.arange(c) if ids is None else ids
    labels = pool[torch.randint(len(pool), (n,), generator=g)]
    labels = torch.where(torch.rand(n, generator=g) < case.no_target, -1, labels)
    bias, teacher_bias = (
        torch.randn(c, generator=g).to(case.dtype) if case.extra else None for _ in range(2)
    )
    if case.dense:
        teacher = (teacher.double() @ teacher_weight.double().T).to(case.dtype)
    if case.strided:
        x, weight, teacher = (t.T.contiguous().T for t in (x, weight, teacher))
    return DivergenceInputs(
        x, weight, teacher, None if case.dense else teacher_weight, labels, ids, bias, teacher_bias,
        1 + 0.1 * torch.randn(n, generator=g) if case.dense and case.extra else None,
        case.normalize, case.normalize and not case.dense, case.kind, KINDS[case.kind],
        case.precision,
    )  # fmt: skip


def leaves(p: DivergenceInputs, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What has gradients, in the order of `DivergenceNeeds`."""
    given = {name: getattr(p, name) for name in NAMES}
    return {k: t.detach().to(dtype).requires_grad_() for k, t in given.items() if t is not None}


def statistics(p: DivergenceInputs, given: dict[str, Tensor]) -> list[Tensor]:
    """lse, teacher_lse, target, teacher_target and the kind's folds that have gradients."""

    def scores(rows: str, weight: str, normalize: bool, bias: str) -> Tensor:
        if weight in given:
            w = given[weight]
            z = given[rows] @ (w / w.norm(dim=1, keepdim=True) if normalize else w).T
        else:
            z = given[rows]
            z = z * given["teacher_scale"][:, None] if "teacher_scale" in given else z
        return z + given[bias] if bias in given else z

    u = scores("x", "weight", p.normalize, "bias")
    v = scores("teacher", "teacher_weight", p.teacher_normalize, "teacher_bias")
    takes_part = torch.zeros(u.shape[1], dtype=torch.bool)
    takes_part[slice(None) if p.classes is None else p.classes] = True
    others = takes_part & (torch.arange(u.shape[1]) != p.labels[:, None])
    picked = p.labels.clamp_min(0)[:, None]
    targets = [torch.where(p.labels >= 0, z.gather(1, picked)[:, 0], 0.0) for z in (u, v)]

    def over(z: Tensor) -> Tensor:
        return torch.where(others, z, -torch.inf).logsumexp(1)

    def total(z: Tensor) -> Tensor:
        return torch.where(others, z, 0.0).sum(1)

    lse, teacher_lse = over(u), over(v)
    log_s = torch.where(others, u - lse[:, None], 0.0)
    log_t = torch.where(others, v - teacher_lse[:, None], 0.0)
    q_s, q_t = log_s.exp(), log_t.exp()
    folds: list[Any]
    match p.kind:
        case "forward":
            folds = [total(q_t * (log_t - log_s))]
        case "reverse":
            folds = [total(q_s * (log_s - log_t))]
        case "power":
            (eps,) = p.params
            share = torch.where(others, eps * v, -torch.inf).softmax(1)
            folds = [over(eps * v), total(share * u)]
        case "jensen_shannon":
            (beta,) = p.params
            m = (beta * q_t + (1 - beta) * q_s).log()
            folds = [total(beta * q_t * (log_t - m) + (1 - beta) * q_s * (log_s - m))]
        case "total_variation":
            folds = [total((q_t - q_s).abs() / 2)]
        case "squared":
            folds = [total((u - v) ** 2)]
        case _:
            (limit,) = p.params
            a, b = (u, v) if p.kind == "bernoulli" else (u - v, torch.zeros_like(v))
            a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
            yes, no = (
                torch.sigmoid(z) * (logsigmoid(z) - logsigmoid(y)) for y, z in ((a, b), (-a, -b))
            )
            folds = [total(yes + no)]
    return [lse, teacher_lse, *targets, *folds]


def forward_and_gradients(
    p: DivergenceInputs, grads: list[Tensor], compact: bool = False, only: tuple[str, ...] = NAMES
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    out = triton.forward(p)
    of_folds = torch.zeros_like(out[4])
    of_folds[: len(grads) - 4] = torch.stack(grads[4:])
    needed = [name in only and getattr(p, name) is not None for name in NAMES]
    got = triton.backward(
        p,
        DivergenceSaved(out[0], out[1], out[4]),
        DivergenceGradients(*grads[:4], of_folds),
        DivergenceNeeds(compact, *needed),
    )
    for name, g, need in zip(NAMES, got, needed, strict=True):
        assert (g is not None) == need, name
    return out, {name: g for name, g in zip(NAMES, got, strict=True) if g is not None}


def truth(p: DivergenceInputs, seed: int = 1) -> tuple[list[Tensor], list[Tensor], dict]:
    """Statistics, gradients that come in, and those that go out."""
    given = leaves(p)
    want = statistics(p, given)
    g = torch.Generator().manual_seed(seed)
    grads = [torch.randn(w.shape, generator=g, dtype=torch.float64) for w in want]
    loss = sum((w * g).sum() for w, g in zip(want, grads, strict=True))
    found = torch.autograd.grad(loss, list(given.values()))
    return [w.detach() for w in want], grads, dict(zip(given, found, strict=True))

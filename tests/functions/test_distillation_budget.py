"""`memory_budget` of distillation: scores that the forward keeps change no bit of anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import require
from torch import Tensor

import fused_losses
from fused_losses import TopTeacher, distillation

N, C = 37, 900
BUDGETS = [1, 2 * 64 * 4 * 500, 1 << 24]  # nothing, some classes, all


def drawn(seed: int = 0) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    shapes = ((N, 16), (C, 16), (N, 24), (C, 24), (N, C))
    x, w, t, wt, scores = (torch.randn(*s, generator=make) for s in shapes)
    return x.requires_grad_(), w.requires_grad_(), t, wt, scores


def teacher_of(name: str, t: Tensor, wt: Tensor, scores: Tensor) -> tuple[Any, ...]:
    if name == "top":
        values, ids = scores.topk(8)
        return (TopTeacher(ids, values),)
    return (scores,) if name == "scores" else (t, wt)


@pytest.mark.parametrize("teacher", ["weights", "scores", "top"])
@pytest.mark.parametrize("kind", ["kl", "jsd", "pskd"])
def test_a_budget_changes_nothing(kind: str, teacher: str) -> None:
    require("cpu")
    x, w, *rest = drawn()
    given = (x, w, *teacher_of(teacher, *rest))
    options: dict[str, Any] = dict(kind=kind, normalize="student", student_scale=8.0, backend="cpu")
    options["labels"] = torch.arange(N)
    wanted = distillation(*given, **options)
    slopes = torch.autograd.grad(wanted, [x, w])
    for budget in BUDGETS:
        got = distillation(*given, memory_budget=budget, **options)
        assert torch.equal(got, wanted)
        for g, s in zip(torch.autograd.grad(got, [x, w]), slopes, strict=True):
            assert torch.equal(g, s)


def test_explain_counts_what_is_kept() -> None:
    """Both scores of a row and a class, or beside a teacher's own scores the student's alone."""
    require("cpu")
    x, w, t, wt, scores = drawn()
    for given, each in (
        ((x, w, t, wt), 2),
        ((x, w, scores), 1),
        ((x.detach(), w.detach(), t, wt), 0),
    ):
        told = [
            fused_losses.explain(distillation, *given, memory_budget=b, backend="cpu")
            for b in (0, 1 << 24)
        ]
        assert told[1].peak_extra_bytes - told[0].peak_extra_bytes == each * 64 * 4 * C


def test_a_budget_is_compiled() -> None:
    require("cpu")
    x, w, t, wt, _ = drawn()

    def loss(x: Tensor) -> Tensor:
        return distillation(x, w, t, wt, memory_budget=1 << 24, backend="cpu")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, traced = loss(x), compiled(x)
    assert torch.equal(plain, traced)
    assert torch.equal(*(torch.autograd.grad(o, x)[0] for o in (plain, traced)))

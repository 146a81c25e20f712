"""Distillation from a teacher's K best classes, against formulas on whole matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA
from head_goldens import exactness
from torch import Tensor

from fused_losses import TopTeacher, backends, distillation


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


CALLS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in ("kl", "jsd", "tv", "soft_ce", "pskd", "ofa", "dkd")),
    ("ofa", {"eps": 1.5}),
    ("dkd", {"alpha": 2.0, "beta": 0.5}),
    ("dkd", {"removed": -1.5}),
]
FORMS = [form for form in ("reference", "bounded", "cpu") if backends.unavailable(form) is None]


def decoupled(p: Tensor, q: Tensor, hot: Tensor, o: dict[str, float]) -> Tensor:
    """Of probabilities [N, C], some of p zero."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        a, b = (torch.where(a > 0, t, 1) for t in (a, b))
        return (a * (a / b).log()).sum(1)

    def without(a: Tensor) -> Tensor:
        a = a * (math.exp(o["removed"]) * hot + 1 - hot) if "removed" in o else a * (1 - hot)
        return a / a.sum(1, keepdim=True)

    def both(a: Tensor) -> Tensor:
        return torch.stack([(a * hot).sum(1), (a * (1 - hot)).sum(1)], 1)

    rest = kl(without(p), without(q))
    return o.get("alpha", 1.0) * kl(both(p), both(q)) + o.get("beta", 8.0) * rest


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("some", [False, True], ids=["all", "classes"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_top_teacher(call: tuple[str, dict[str, Any]], some: bool, form: str) -> None:
    kind, options = call
    n, c, k = 6, 30, 4
    x, w, b, values = rows(n, 5), rows(c, 5), rows(c), rows(n, k)
    ids = torch.stack([torch.randperm(26)[:k] for _ in range(n)])
    labels = torch.randint(0, 26, (n,))
    labels[0], labels[1] = ids[0, 1], 29  # in the list, and beyond it
    if options.get("removed"):  # in some classes the label is all that the teacher knows
        ids[2], labels[2] = torch.tensor([20, 26, 27, 28]), 20
    classes = None
    if some:
        kept = torch.rand(c) < 0.5
        kept[labels] = kept[ids[:, :2]] = True
        kept[26:29] = False
        classes = torch.nonzero(kept)[:, 0].flip(0)
    shared: dict[str, Any] = dict(
        kind=kind, temperature=2.0, student_bias=b, labels=labels, normalize="student",
        student_scale=4.0, classes=classes, backend=form, **options,
    )  # fmt: skip
    got = distillation(x, w, TopTeacher(ids, values), teacher_grad=True, reduction="none", **shared)
    part = torch.ones(c, dtype=torch.bool) if classes is None else kept
    u = ((4 * unit(x) @ unit(w).T + b) / 2).masked_fill(~part, -torch.inf)
    whole = torch.full((n, c), -torch.inf, dtype=torch.float64).scatter(1, ids, values / 2)
    p = torch.softmax(whole.masked_fill(~part, -torch.inf), 1)[:, part]
    q = torch.softmax(u, 1)[:, part]
    hot = F.one_hot(labels, c).to(q)[:, part]
    m = (p + q) / 2
    eps = options.get("eps", 1.0)
    expected = {
        "kl": lambda: 4 * (torch.xlogy(p, p) - p * q.log()).sum(1),
        "jsd": lambda: 2 * (torch.xlogy(p, p) - p * m.log() + q * (q / m).log()).sum(1),
        "tv": lambda: (p - q).abs().sum(1) / 2,
        "soft_ce": lambda: -(p * q.log()).sum(1),
        "pskd": lambda: -((0.2 * hot + 0.8 * p) * q.log()).sum(1),
        "ofa": lambda: -(((p + hot) ** eps - hot) * q.log()).sum(1),
        "dkd": lambda: 4 * decoupled(p, q, hot, options),
    }[kind]()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    drawn = torch.rand(n, dtype=torch.float64)
    mine = torch.autograd.grad((got * drawn).sum(), [x, w, b, values])
    u_only = torch.autograd.grad((expected * drawn).sum(), [x, w, b], retain_graph=True)
    for a, e in zip(mine[:3], u_only, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    step = torch.randn_like(values)
    ahead, behind = (
        distillation(
            x, w, TopTeacher(ids, (values + s * step).detach()), reduction="none", **shared
        ).detach()
        for s in (1e-6, -1e-6)
    )  # fmt: skip
    torch.testing.assert_close(
        (mine[3] * step).sum(), ((ahead - behind) * drawn).sum() / 2e-6, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["kl", "pskd", "ofa", "dkd"])
def test_an_ignored_row_may_hold_anything(kind: str, form: str) -> None:
    x, w, values = rows(3, 4), rows(9, 4), rows(3, 2).detach()
    values[1] = torch.nan
    values.requires_grad_()
    ids, labels = torch.tensor([[0, 1], [4, 5], [3, 7]]), torch.tensor([0, -100, 2])
    loss = distillation(
        x, w, TopTeacher(ids, values), kind=kind, labels=labels, teacher_grad=True, backend=form
    )
    assert loss.isfinite()
    of_x, of_w, of_values = torch.autograd.grad(loss, [x, w, values])
    assert of_w.isfinite().all()
    assert of_x.isfinite().all() and of_values.isfinite().all()
    assert not of_x[1].any() and not of_values[1].any()


@pytest.mark.parametrize("form", [*FORMS, *CUDA])
def test_all_classes_in_the_list_are_a_dense_teacher(form: str) -> None:
    dtype, within = exactness(form)
    x, w, scores = (rows(*shape).detach().to(dtype) for shape in ((5, 4), (12, 4), (5, 12)))
    ids = torch.stack([torch.randperm(12) for _ in range(5)])
    labels = torch.randint(0, 12, (5,))
    for kind, options in CALLS:
        whole, listed = (
            distillation(x, w, teacher, kind=kind, labels=labels, backend=form, **options)
            for teacher in (scores, TopTeacher(ids, scores.gather(1, ids)))
        )
        torch.testing.assert_close(listed, whole, rtol=100 * within, atol=10 * within)

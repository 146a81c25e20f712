"""Distillation from a teacher's K best classes, against formulas on whole matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import TopTeacher, backends, distillation


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("form", ["reference", "bounded", "cpu"])
@pytest.mark.parametrize("kind", ["kl", "jsd", "tv", "soft_ce", "pskd"])
def test_top_teacher(kind: str, form: str) -> None:
    if backends.unavailable(form):
        pytest.skip("it is not built")
    n, c, k = 6, 30, 4
    x, w, b, values = rows(n, 5), rows(c, 5), rows(c), rows(n, k)
    ids = torch.stack([torch.randperm(c)[:k] for _ in range(n)])
    labels = torch.randint(0, c, (n,))
    labels[0] = ids[0, 1]
    got = distillation(
        x, w, TopTeacher(ids, values), kind=kind, temperature=2.0, student_bias=b, labels=labels,
        normalize="student", student_scale=4.0, teacher_grad=True, reduction="none", backend=form,
    )  # fmt: skip
    u = (4 * unit(x) @ unit(w).T + b) / 2
    p = torch.zeros(n, c, dtype=torch.float64).scatter(1, ids, torch.softmax(values / 2, 1))
    q = torch.softmax(u, 1)
    hot = F.one_hot(labels, c).to(q)
    m = (p + q) / 2
    expected = {
        "kl": lambda: 4 * (torch.xlogy(p, p) - p * q.log()).sum(1),
        "jsd": lambda: 2 * (torch.xlogy(p, p) - p * m.log() + q * (q / m).log()).sum(1),
        "tv": lambda: (p - q).abs().sum(1) / 2,
        "soft_ce": lambda: -(p * q.log()).sum(1),
        "pskd": lambda: -((0.2 * hot + 0.8 * p) * q.log()).sum(1),
    }[kind]()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    mine = torch.autograd.grad(got.sum(), [x, w, b, values])
    u_only = torch.autograd.grad(expected.sum(), [x, w, b], retain_graph=True)
    for a, e in zip(mine[:3], u_only, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    step = torch.randn_like(values)
    ahead, behind = (
        distillation(
            x, w, TopTeacher(ids, (values + s * step).detach()), kind=kind, temperature=2.0,
            student_bias=b, labels=labels, normalize="student", student_scale=4.0,
            reduction="sum", backend=form,
        ).detach()
        for s in (1e-6, -1e-6)
    )  # fmt: skip
    torch.testing.assert_close(
        (mine[3] * step).sum(), (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-7
    )


def test_all_classes_in_the_list_are_a_dense_teacher() -> None:
    x, w, scores = rows(5, 4), rows(12, 4), rows(5, 12).detach()
    ids = torch.stack([torch.randperm(12) for _ in range(5)])
    for kind in ("kl", "jsd", "tv", "soft_ce"):
        whole = distillation(x, w, scores, kind=kind)
        listed = distillation(x, w, TopTeacher(ids, scores.gather(1, ids)), kind=kind)
        torch.testing.assert_close(listed, whole, rtol=1e-10, atol=1e-12)

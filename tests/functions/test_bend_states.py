"""What margins that bend keep, tell and refuse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from margin_bends import (
    LOSSES,
    Case,
    Data,
    ask,
    stored_curricular,
)
from torch import Tensor

import fused_losses
from fused_losses import margins
from fused_losses.margins import ArcFace, CosFace, CurricularFace, InterclassFilter, MVSoftmax


@pytest.mark.float64
def test_curricular_moves_once_a_call_and_before_use(backend: str) -> None:
    data = Data(Case("ema", "curricular"))
    valid = data.labels != -100
    cosine = F.cosine_similarity(data.x[valid], data.w[data.labels[valid]])
    margin, stored = CurricularFace(momentum=0.25).double(), CurricularFace().double().eval()
    wanted = 0.0
    for _ in range(2):
        wanted = 0.25 * cosine.mean().item() + 0.75 * wanted
        moving = fused_losses.margin_softmax(
            data.x, data.w, data.labels, margin=margin, scale=16.0, backend=backend
        )
        assert abs(margin.t.item() - wanted) < 1e-12
        stored.t.fill_(wanted)
        still = fused_losses.margin_softmax(
            data.x, data.w, data.labels, margin=stored, scale=16.0, backend=backend
        )
        torch.testing.assert_close(moving, still, rtol=1e-12, atol=0)
        assert stored.t.item() == wanted


def test_rows_that_do_not_count_leave_the_average_alone(backend: str) -> None:
    margin = CurricularFace(momentum=0.5)
    margin.t.fill_(0.25)
    x, w = torch.randn(5, 4), torch.randn(9, 4)
    x[3] = torch.nan
    labels = torch.tensor([1, -100, 4, 2, -100])
    cosine = F.cosine_similarity(x, w[labels.clamp_min(0)])
    fused_losses.margin_softmax(x, w, labels, margin=margin, backend=backend)
    assert margin.t.item() == pytest.approx(0.125 + 0.25 * (cosine[0] + cosine[2]).item(), abs=1e-6)
    before = margin.t.clone()
    nobody = torch.full((5,), -100)
    fused_losses.margin_softmax(x, w, nobody, margin=margin, backend=backend)
    fused_losses.margin_softmax(x[:0], w, nobody[:0], margin=margin, backend=backend)
    assert torch.equal(margin.t, before)


def test_curricular_state_is_saved() -> None:
    margin, other = stored_curricular(0.7), CurricularFace()
    other.load_state_dict(margin.state_dict())
    assert other.t.item() == pytest.approx(0.7)
    assert list(margin.state_dict()) == ["t"]


@pytest.mark.float64
@pytest.mark.parametrize("name", ["curricular", "mv-am-fixed", "filter-arc"])
def test_stats_tell_the_bent_hardest(name: str, backend: str) -> None:
    case = Case("stats", name)
    data = Data(case)
    (_, stats), _ = ask(case, data, backend, return_stats=True)
    valid = data.labels != -100
    cosine = F.normalize(data.x[valid]) @ F.normalize(data.w).T
    labels = data.labels[valid]
    is_target = labels[:, None] == torch.arange(case.c)
    bent = LOSSES[name][1](cosine, is_target).masked_fill(is_target, -torch.inf)
    target = cosine.gather(1, labels[:, None])[:, 0]
    best = bent.max(1)
    torch.testing.assert_close(stats.hardest_cosine[valid], best.values)
    assert torch.equal(stats.hardest_class[valid], best.indices)
    torch.testing.assert_close(stats.target_cosine[valid], target)
    assert torch.equal(stats.hit[valid], target > best.values)
    logits = 16 * LOSSES[name][1](cosine, is_target)
    torch.testing.assert_close(stats.logsumexp[valid], logits.logsumexp(1))


@pytest.mark.float64
@pytest.mark.parametrize("margin", [margins.MagFace(l_a=0.5, u_a=9.0), None], ids=["mag", "none"])
def test_a_filter_that_meets_no_class_is_its_margin(margin: object, backend: str) -> None:
    data = Data(Case("around", "filter-arc"))
    values = []
    for given in (margin, InterclassFilter(margin, 1.5)):
        x, w = data.leaves()
        loss = fused_losses.margin_softmax(x, w, data.labels, margin=given, backend=backend)
        values.append((loss, *torch.autograd.grad(loss, (x, w))))
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_a_filter_carries_the_state_of_its_margin() -> None:
    margin = InterclassFilter(margins.AdaFace())
    assert set(margin.state_dict()) == {"margin.mean", "margin.std"}
    assert margin.uses_norm and not hasattr(margin, "penalty")
    assert not InterclassFilter(CosFace()).uses_norm
    assert hasattr(InterclassFilter(margins.MagFace()), "penalty")


@pytest.mark.float64
def test_no_hardness_is_the_margin_alone(backend: str) -> None:
    data = Data(Case("soft", "mv-arc"))
    x, w = data.leaves()[:2]
    given = {"scale": 16.0, "backend": backend}
    for weighting in ("adaptive", "fixed"):
        soft = MVSoftmax("arc", 0.5, 0.0, weighting)
        a = fused_losses.margin_softmax(x, w, data.labels, margin=soft, **given)
        b = fused_losses.margin_softmax(x, w, data.labels, margin=ArcFace(0.5), **given)
        torch.testing.assert_close(a, b)


BAD = {
    "base": (lambda: MVSoftmax("cos"), "base: expected one of arc, am, got 'cos'"),
    "weighting": (
        lambda: MVSoftmax(weighting="hard"),
        "weighting: expected one of adaptive, fixed",
    ),
    "hardness": (
        lambda: MVSoftmax(hardness=-0.1),
        "hardness: expected a finite value >= 0, got -0.1",
    ),
    "nan": (lambda: MVSoftmax(hardness=math.nan), "hardness: expected a number, got nan"),
    "beyond": (lambda: MVSoftmax(beyond_pi="far"), "beyond_pi: expected one of"),
    "momentum": (lambda: CurricularFace(momentum=1.5), r"momentum: expected a value in \[0, 1\]"),
    "twice": (lambda: InterclassFilter(MVSoftmax()), "margin: expected one that bends no other"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bend_of_another_shape_names_itself(backend: str) -> None:
    class Wrong(CurricularFace):
        def bend(self, cosine: Tensor) -> Tensor:
            return super().bend(cosine)[:3]

    with pytest.raises(ValueError, match=r"margin.bend: expected it to return shape \(4, 2\)"):
        fused_losses.margin_softmax(
            torch.randn(2, 3), torch.randn(5, 3), torch.tensor([1, 4]), margin=Wrong(),
            backend=backend,
        )  # fmt: skip


def test_compile_without_breaks_for_any_batch_size() -> None:
    # the ops are traced alike whatever runs them
    torch.compiler.reset()
    margin, plain = CurricularFace(momentum=0.3), CurricularFace(momentum=0.3)

    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return fused_losses.margin_softmax(x, w, labels, margin=margin, backend="bounded")

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    w = torch.randn(50, 8, requires_grad=True)
    for n in (12, 31, 33):
        x = torch.randn(n, 8, requires_grad=True)
        labels = torch.randint(0, 50, (n,))
        labels[3] = -100
        with torch.compiler.set_stance("fail_on_recompile" if n == 33 else "default"):
            got = torch.autograd.grad(compiled(x, w, labels), (x, w))
        eager = fused_losses.margin_softmax(x, w, labels, margin=plain, backend="bounded")
        for a, b in zip(got, torch.autograd.grad(eager, (x, w)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(margin.t, plain.t)
    torch.compiler.reset()

"""Margins that bend other classes: the losses of it. The primitive is in test_bent_statistics.py.

The losses stand here once more as their papers' logits on the matrix of cosines, in float64, with
autograd through them; nothing of them is said by (t, p, q, r).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from places import GOLDEN
from torch import Tensor

import fused_losses
from fused_losses import margins
from fused_losses.margins import ArcFace, CosFace, CurricularFace, InterclassFilter, MVSoftmax
from fused_losses.primitives.row_statistics import reference

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
EXACT = 1e-9


# --- the papers' cosines, margin and bends applied ------------------------------------------------


def arc(t: Tensor, m: float) -> Tensor:
    """cos(theta + m), or t - m sin(m) past pi, by the addition theorem."""
    added = t * math.cos(m) - (1 - t * t).sqrt() * math.sin(m)
    return torch.where(t > math.cos(math.pi - m), added, t - m * math.sin(m))


def curricular(cosine: Tensor, is_target: Tensor, m: float = 0.5, t: float = 0.3) -> Tensor:
    """N(t, theta_j) = cos(theta_j) (t + cos(theta_j)) where cos(theta_y + m) < cos(theta_j)."""
    y = (cosine * is_target).sum(1, keepdim=True)
    hard = cosine > torch.cos(torch.acos(y) + m)
    return torch.where(is_target, arc(y, m), torch.where(hard, cosine * (t + cosine), cosine))


def mv_softmax(
    cosine: Tensor, is_target: Tensor, f: Callable[[Tensor], Tensor], t: float, adaptive: bool
) -> Tensor:
    """log(h e^{s cos}) / s with log(h) / s = t (cos + 1), or t, where f(theta_y) < cos(theta_j)."""
    y = f((cosine * is_target).sum(1, keepdim=True))
    wrong = (cosine > y).to(cosine.dtype)
    return torch.where(is_target, y, cosine + wrong * t * (cosine + 1 if adaptive else 1))


def filtered(
    cosine: Tensor, is_target: Tensor, f: Callable[[Tensor], Tensor], threshold: float
) -> Tensor:
    """insightface: 0 in the place of another class's cosine above the threshold."""
    y = f((cosine * is_target).sum(1, keepdim=True))
    return torch.where(is_target, y, cosine * (cosine <= threshold))


def stored_curricular(t: float = 0.3, dtype: torch.dtype = F64) -> CurricularFace:
    margin = CurricularFace().to(dtype).eval()
    margin.t.fill_(t)
    return margin


def easy(t: Tensor, m: float) -> Tensor:
    return torch.where(t > 0, torch.cos(torch.acos(t) + m), t)


Formula = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Callable[[], margins.Margin], Formula]] = {
    "curricular": (stored_curricular, curricular),
    "mv-arc": (
        lambda: MVSoftmax("arc", 0.5, 0.2),
        lambda c, y: mv_softmax(c, y, lambda t: arc(t, 0.5), 0.2, True),
    ),
    "mv-arc-easy": (
        lambda: MVSoftmax("arc", 0.4, 0.3, beyond_pi="easy"),
        lambda c, y: mv_softmax(c, y, lambda t: easy(t, 0.4), 0.3, True),
    ),
    "mv-am-fixed": (
        lambda: MVSoftmax("am", 0.35, 0.15, "fixed"),
        lambda c, y: mv_softmax(c, y, lambda t: t - 0.35, 0.15, False),
    ),
    "filter-arc": (
        lambda: InterclassFilter(ArcFace(0.5), 0.25),
        lambda c, y: filtered(c, y, lambda t: arc(t, 0.5), 0.25),
    ),
    "filter-alone": (
        lambda: InterclassFilter(None, 0.1),
        lambda c, y: filtered(c, y, lambda t: t, 0.1),
    ),
}


@dataclass(frozen=True)
class Case:
    """One call: sizes, the loss, and the options of `margin_softmax`."""

    id: str
    loss: str
    n: int = 23
    c: int = 61
    d: int = 12
    scale: float | str = 16.0  # "rows": one a row
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    shares: bool = False
    part: bool = False  # of the classes
    normalize: bool = True


CASES = [
    *(Case(name, name) for name in LOSSES),
    Case("everything", "curricular", scale="rows", bias=True, shares=True, part=True,
         options={"label_smoothing": 0.2}),
    Case("mv-everything", "mv-arc", scale="rows", bias=True, shares=True, part=True,
         options={"label_smoothing": 0.1}),
    Case("filter-bias", "filter-arc", bias=True, options={"label_smoothing": 0.1}),
    Case("blocks-of-rows", "curricular", n=301, c=97, d=7, part=True),
    Case("one-row", "mv-am-fixed", n=1, c=2, d=3, scale=2.0),
    Case("kept", "curricular", n=65, c=130, d=9, options={"memory_budget": 100 * 128 * 8}),
    Case("products", "filter-arc", normalize=False, scale=8.0),
]  # fmt: skip


class Data:
    def __init__(self, case: Case) -> None:
        n, c, d = case.n, case.c, case.d
        self.labels = torch.randint(0, c, (n,))
        self.w = torch.randn(c, d, dtype=F64)
        near = self.w[self.labels] / self.w[self.labels].norm(dim=1, keepdim=True)
        self.x = near + 0.3 * torch.randn(n, d, dtype=F64)
        if not case.normalize:
            self.x, self.w = F.normalize(self.x), F.normalize(self.w)
        self.options: dict[str, Any] = dict(case.options)
        self.scale = case.scale
        if case.scale == "rows":
            self.scale = torch.linspace(6, 20, n, dtype=F64)
        if case.bias:
            self.options["bias"] = torch.randn(c, dtype=F64)
        if case.shares:
            self.options["class_weight"] = torch.rand(c, dtype=F64) + 0.5
        if case.part:
            keep = torch.rand(c) < 0.6
            keep[self.labels] = True
            self.options["classes"] = keep.nonzero()[:, 0].flip(0)
        if n > 3:
            self.labels[2] = -100
            self.x[2] = torch.nan  # an ignored row touches nothing

    def leaves(self) -> list[Tensor]:
        found = [self.x, self.w, self.options.get("bias")]
        return [t.clone().requires_grad_() for t in found if t is not None]


def truth(case: Case, data: Data) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients from the formula on the matrix."""
    leaves = data.leaves()
    x, w = leaves[:2]
    ids = data.options.get("classes", torch.arange(case.c))
    valid = data.labels != -100
    x, labels, w = x[valid], data.labels[valid], w[ids]
    is_target = labels[:, None] == ids
    cosine = F.normalize(x) @ F.normalize(w).T if case.normalize else x @ w.T
    # rounding past 1 has no angle
    cosine = cosine.clamp(-1 + 1e-15, 1 - 1e-15) if case.normalize else cosine
    logits = LOSSES[case.loss][1](cosine, is_target)
    scale = data.scale[valid][:, None] if isinstance(data.scale, Tensor) else data.scale
    logits = logits * scale
    if case.bias:
        logits = logits + leaves[2][ids]
    shares = data.options.get("class_weight")
    loss = F.cross_entropy(
        logits,
        is_target.int().argmax(1),
        weight=None if shares is None else shares[ids],
        label_smoothing=data.options.get("label_smoothing", 0.0),
    )
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def ask(case: Case, data: Data, backend: str, **changes: Any) -> tuple[Any, list[Tensor]]:
    leaves = data.leaves()
    options = data.options | ({"bias": leaves[2]} if case.bias else {}) | changes
    out = fused_losses.margin_softmax(
        leaves[0],
        leaves[1],
        data.labels,
        margin=LOSSES[case.loss][0](),
        scale=data.scale,
        normalize=case.normalize,
        backend=backend,
        **options,
    )
    loss = out[0] if isinstance(out, tuple) else out
    return out, list(torch.autograd.grad(loss, leaves))


@pytest.mark.float64
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_value_and_gradients_are_the_papers(case: Case, backend: str) -> None:
    data = Data(case)
    loss, gradients = ask(case, data, backend)
    wanted, wanted_gradients = truth(case, data)
    assert abs(loss - wanted) <= EXACT * (wanted + 1e-3)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        got = torch.where(torch.isnan(data.x), 0, got) if got.shape == data.x.shape else got
        want = torch.nan_to_num(want)
        assert relative_error(got.numpy(), want.numpy()) <= EXACT


def test_every_loss_bends_some_class_and_leaves_some() -> None:
    # or the cases above would prove nothing
    for name, (make, _) in LOSSES.items():
        data = Data(Case(name, name))
        valid = data.labels >= 0
        cosine = F.normalize(data.x[valid]) @ F.normalize(data.w).T
        target = cosine.gather(1, data.labels[valid][:, None])
        above = cosine > make().bend(target[:, 0])[0][:, None]
        others = above.scatter(1, data.labels[valid][:, None], False)
        assert 5 < others.sum() < others.numel() - 5, name


@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=str)
@pytest.mark.parametrize("loss", ["curricular", "mv-arc", "filter-arc"])
def test_narrow_dtypes(loss: str, dtype: torch.dtype, streamed: str) -> None:
    # the same rounded inputs in float64; thresholds kept clear of every cosine
    n, c, d = 40, 70, 16
    w = torch.randn(c, d).to(dtype)
    labels = torch.arange(n) % c
    x = (w[labels].float() + 0.3 * torch.randn(n, d)).to(dtype)
    cosine = F.normalize(x.double()) @ F.normalize(w.double()).T
    target = cosine[torch.arange(n), labels]
    gap = (cosine - LOSSES[loss][0]().bend(target)[0][:, None]).abs().min(1).values
    clear = gap > 1e-4
    assert clear.sum() > n // 2
    x, labels = x[clear], labels[clear]

    def run(x: Tensor, w: Tensor, backend: str) -> tuple[Tensor, ...]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss_value = fused_losses.margin_softmax(
            x, w, labels, margin=LOSSES[loss][0](), scale=16.0, backend=backend
        )
        return (loss_value.detach(), *torch.autograd.grad(loss_value, (x, w)))

    got, wanted = run(x, w, streamed), run(x.double(), w.double(), "reference")
    assert got[0].dtype == F32
    room = {F32: 1e-5, BF16: 5e-3, FP16: 6e-4}[dtype]  # a gradient is rounded to the input's dtype
    near = 1e-5
    if streamed in ("triton", "cuda") and dtype != F32:  # tensor cores take the unit rows rounded
        near, room = {BF16: (2e-2, 5e-2), FP16: (1e-3, 1e-2)}[dtype]
    assert abs(got[0] - wanted[0]) <= near * wanted[0]
    for a, b in zip(got[1:], wanted[1:], strict=True):
        assert a.dtype == dtype
        assert relative_error(a.double().numpy(), b.numpy()) <= room


@pytest.mark.float64
def test_straight_through_leaves_the_bends_alone(backend: str) -> None:
    case = Case("straight", "curricular")
    data = Data(case)
    x, w = data.leaves()
    value, found = ask(case, data, backend, gradient="straight_through")
    valid = data.labels != -100
    is_target = data.labels[valid][:, None] == torch.arange(case.c)
    cosine = F.normalize(x[valid]) @ F.normalize(w).T
    moved = curricular(cosine, is_target)
    moved = torch.where(is_target, cosine + (moved - cosine).detach(), moved)
    wanted = F.cross_entropy(16.0 * moved, data.labels[valid])
    assert abs(value - wanted) <= EXACT * wanted
    for a, b in zip(found, torch.autograd.grad(wanted, (x, w)), strict=True):
        there = ~a.isnan()
        assert relative_error(a[there].numpy(), b[there].numpy()) <= EXACT


# --- the authors' numbers -------------------------------------------------------------------------


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def assert_golden(data: dict[str, Tensor], margin: margins.Margin, backend: str, **options) -> None:
    x, w = data["x"].clone().requires_grad_(), data["w"].clone().requires_grad_()
    loss = fused_losses.margin_softmax(
        x, w, data["labels"], margin=margin, scale=64.0, backend=backend, **options
    )
    loss.backward()
    assert abs(loss - data["loss"]).item() <= EXACT * data["loss"].item()
    for got, wanted in ((x.grad, data["grad_x"]), (w.grad, data["grad_w"])):
        error = (got - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-3)
        assert error.max() <= EXACT


@pytest.mark.float64
def test_golden_curricular_face(backend: str) -> None:
    data = golden("curricular_CurricularFace")
    margin = CurricularFace(0.5).double()
    margin.t.fill_(data["t_before"])
    assert_golden(data, margin, backend)
    assert abs(margin.t - data["t_after"].item()) <= 1e-12
    # and its logits, from those before: every class, not what a sum leaves of them
    bend = margin.eval().bend(data["origin_logits"].gather(1, data["labels"][:, None])[:, 0] / 64)
    bent = 64 * reference.bent(data["origin_logits"] / 64, bend)
    others = torch.ones_like(bent).scatter(1, data["labels"][:, None], 0).bool()
    torch.testing.assert_close(bent[others], data["logits"][others], rtol=1e-12, atol=1e-12)


@pytest.mark.float64
def test_golden_insightface_filter(backend: str) -> None:
    data = golden("insightface_arc_filter")
    params = json.loads((GOLDEN / "index.json").read_text())["entries"]["insightface_arc_filter"]
    threshold = params["params"]["interclass_filtering_threshold"]
    assert (data["cos"] > threshold).sum() > 10
    margin = InterclassFilter(ArcFace(0.5, "none"), threshold)
    assert_golden(data, margin, backend, gradient="straight_through")


# --- the margins ----------------------------------------------------------------------------------


@pytest.mark.float64
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str, backend: str) -> None:
    labels = torch.tensor([0, 3, 12, 3, -100, 5, 7])
    x, w = (torch.randn(n, 5, dtype=F64, requires_grad=True) for n in (7, 13))
    margin = LOSSES[loss][0]()
    assert torch.autograd.gradcheck(
        lambda x, w: fused_losses.margin_softmax(
            x, w, labels, margin=margin, scale=4.0, backend=backend
        ),
        (x, w),
        fast_mode=True,
    )


def test_second_derivatives_on_the_reference() -> None:
    labels = torch.tensor([0, 3, 5, 3])
    x, w = (torch.randn(n, 3, dtype=F64, requires_grad=True) for n in (4, 7))
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    margin = stored_curricular()
    assert torch.autograd.gradgradcheck(
        lambda x, w, s: fused_losses.margin_softmax(
            x, w, labels, margin=margin, scale=s, backend="reference"
        ),
        (x, w, scale),
    )


def test_a_learned_scale_is_refused_where_its_gradient_would_be_wrong(streamed: str) -> None:
    x, w = torch.randn(4, 3), torch.randn(7, 3)
    labels = torch.tensor([0, 3, 5, 3])
    scale = torch.tensor(8.0, requires_grad=True)
    given = {"margin": stored_curricular(0.3, F32), "backend": streamed}
    with pytest.raises(NotImplementedError, match="scale: its gradient through a margin"):
        fused_losses.margin_softmax(x, w, labels, scale=scale, **given)
    with torch.no_grad():
        value = fused_losses.margin_softmax(x, w, labels, scale=scale, **given)
    torch.testing.assert_close(value, fused_losses.margin_softmax(x, w, labels, scale=8.0, **given))


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

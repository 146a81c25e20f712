"""Class losses over tiles of classes: formulas, the authors' numbers, shards, transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MEASURED, require, widest
from counted import COUNTER, MIB, told_by_child
from places import GOLDEN
from torch import Tensor

from fused_losses import margins
from fused_losses.class_losses import MLCD, ClassLoss, SFace, Softmax, SoftTriple, SphereFace2
from fused_losses.losses.class_loss import class_loss
from fused_losses.losses.margin_softmax import margin_softmax
from fused_losses.primitives.class_rules import bounded as class_rules_bounded
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.op import (
    CLASS_RULES,
    CLASS_TARGETS,
    class_gradients,
    class_statistics,
    class_targets,
)
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS, merge_statistics

N, D, C, K, L = 7, 5, 19, 3, 4
FOLDER = GOLDEN


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, the last one shorter, at the sizes of these tests."""
    monkeypatch.setattr(class_rules_bounded, "TILE_BYTES", 700)
    monkeypatch.setattr(class_rules_bounded, "GPU_TILE_BYTES", 700)


# ---- literal formulas, in float64; nothing of the package ----------------------------------------


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


@dataclass
class Row:
    """Cosines of one row with its labels' classes, and with all others that take part."""

    labels: Tensor
    others: Tensor


def rows_of(
    x: Tensor, w: Tensor, labels: Tensor, taking_part: list[int], pool: Callable[[Tensor], Tensor]
) -> list[Row | None]:
    """Row by row, class by class; None for a row without labels."""
    w = w if w.dim() == 3 else w[:, None]
    found: list[Row | None] = []
    for i in range(len(x)):
        mine = [int(y) for y in labels[i].flatten() if y != -100]
        if not mine:
            found.append(None)
            continue
        cosine = {c: pool(unit(w[c]) @ unit(x[i])) for c in taking_part}
        others = [cosine[c] for c in taking_part if c not in mine]
        found.append(
            Row(
                torch.stack([cosine[c] for c in mine]),
                torch.stack(others) if others else x.new_zeros(0),
            )
        )
    return found


def softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


def softmax_formula(row: Row, scale: float, margin: float) -> Tensor:
    total = sum(
        -torch.log(torch.exp(z) / (torch.exp(z) + torch.exp(scale * row.others).sum()))
        for z in scale * (row.labels - margin)
    )
    return total / len(row.labels)


def sface_formula(row: Row, s: float, k: float, a: float, b: float) -> Tensor:
    pull = 1 / (1 + torch.exp(-k * (torch.acos(row.labels) - a)))
    push = 1 / (1 + torch.exp(k * (torch.acos(row.others) - b)))
    return s * ((push.detach() * row.others).sum() - (pull.detach() * row.labels).sum())


def sphereface2_formula(row: Row, bias: Tensor, exact: bool) -> Tensor:
    def g(c: Tensor) -> Tensor:
        value = 2 * ((c + 1) / 2) ** 3 - 1
        return value if exact else c + (value - c).detach()

    of_labels = softplus(-(40 * (g(row.labels) - 0.4) + bias)).sum()
    of_others = softplus(40 * (g(row.others) + 0.4) + bias).sum()
    return 50 / 40 * (0.7 * of_labels + 0.3 * of_others)


def mlcd_formula(row: Row, s: float) -> Tensor:
    return torch.log(1 + torch.exp(-s * row.labels).sum()) + torch.log(
        1 + torch.exp(s * row.others).sum()
    )


def hard(c: Tensor) -> Tensor:
    return c.max()


def soft(c: Tensor) -> Tensor:
    weight = torch.exp(c / 0.1)
    return (weight / weight.sum() * c).sum()


BIAS = 0.7


@dataclass(frozen=True)
class Named:
    """A loss beside its literal formula."""

    loss: Callable[[Tensor], ClassLoss]  # of the bias
    formula: Callable[[Row, Tensor], Tensor]
    pool: Callable[[Tensor], Tensor] = hard


LOSSES: dict[str, Named] = {
    "softmax": Named(
        lambda b: Softmax(margins.CosFace(0.3), 8.0), lambda r, b: softmax_formula(r, 8.0, 0.3)
    ),
    "soft-triple": Named(lambda b: SoftTriple(), lambda r, b: softmax_formula(r, 20.0, 0.01), soft),
    "sface": Named(lambda b: SFace(), lambda r, b: sface_formula(r, 64.0, 80.0, 0.8, 1.23)),
    "sphereface2": Named(lambda b: SphereFace2(b), lambda r, b: sphereface2_formula(r, b, True)),
    "sphereface2-through": Named(
        lambda b: SphereFace2(b, gradient="straight_through"),
        lambda r, b: sphereface2_formula(r, b, False),
    ),
    "mlcd": Named(lambda b: MLCD(8.0), lambda r, b: mlcd_formula(r, 8.0)),
}


def inputs(several: bool, centers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and labels: with an ignored row of NaN, a label given twice, padding."""
    x = torch.randn(N, D, dtype=dtype)
    x[3] = torch.nan
    w = torch.randn(C, centers, D, dtype=dtype)
    labels = torch.tensor([0, 3, 18, -100, 3, 5, 11])
    if several:
        labels = torch.stack([labels, (labels + 1).clamp(max=18), (labels * 5) % C, labels], 1)
        labels[1, 2] = labels[4, 0] = -100
        labels[3] = -100
    return x.requires_grad_(), (w if centers > 1 else w[:, 0]).requires_grad_(), labels


@pytest.mark.parametrize("sampled", [False, True], ids=["all", "classes"])
@pytest.mark.parametrize(("several", "centers"), [(False, 1), (False, K), (True, K), (True, 1)])
@pytest.mark.parametrize("name", LOSSES)
def test_literal(name: str, several: bool, centers: int, sampled: bool, backend: str) -> None:
    named, dtype = LOSSES[name], widest(backend)
    x, w, labels = inputs(several, centers, dtype)
    bias = torch.tensor(BIAS, dtype=torch.float64, requires_grad=True)
    taking_part = list(range(C))
    if sampled:
        taking_part = sorted({int(y) for y in labels.flatten() if y >= 0} | {2, 7, 13})
    ids = torch.tensor(taking_part).flip(0) if sampled else None
    each = [
        None if row is None else named.formula(row, bias)
        for row in rows_of(x.double(), w.double(), labels, taking_part, named.pool)
    ]
    present = [row for row in each if row is not None]
    leaves = [x, w, bias]
    wanted = torch.stack(present).mean()
    slopes = torch.autograd.grad(wanted, leaves, allow_unused=True)
    loss = named.loss(bias)
    options = {"classes": ids, "backend": backend}
    got = class_loss(x, w, labels, loss, **options)
    assert got.dtype == dtype
    tolerance = 2e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(got, leaves, allow_unused=True), slopes, strict=True):
        if b is None:  # the loss has no bias
            assert a is None
            continue
        # the row of NaN, whose gradient in the formula is NaN times nothing
        a, b = a.double(), b.double().nan_to_num(0)
        assert (a - b).norm() <= tolerance * b.norm() + 1e-14
    rows = class_loss(x, w, labels, loss, reduction="none", **options)
    total = class_loss(x, w, labels, loss, reduction="sum", **options)
    zeros = [torch.zeros((), dtype=torch.float64) if row is None else row for row in each]
    torch.testing.assert_close(rows.double(), torch.stack(zeros), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total.double(), sum(present), rtol=tolerance, atol=tolerance)


FILTER = margins.InterclassFilter(margins.ArcFace(0.5, "none"))


def curricular(t: float) -> margins.CurricularFace:
    margin = margins.CurricularFace().double()
    margin.t.fill_(t)
    return margin


@pytest.mark.parametrize(
    "margin",
    [
        None,
        margins.SphereFace(2.0),
        margins.AdaFace().eval(),
        margins.MagFace(1, 9),
        margins.CurricularFace().eval(),
        margins.MVSoftmax(),
        FILTER,
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_softmax_is_margin_softmax(margin: Any, gradient: str, backend: str) -> None:
    x, w, labels = inputs(False, 1, widest(backend))
    x = torch.where(x.isnan(), 1, 4 * x).detach().requires_grad_()
    losses = (
        margin_softmax(x, w, labels, margin=margin, gradient=gradient, backend="reference"),
        class_loss(x, w, labels, Softmax(margin, gradient=gradient), backend=backend),
    )
    answers = [
        [t.double() for t in (loss.detach(), *torch.autograd.grad(loss, (x, w)))] for loss in losses
    ]
    for a, b in zip(*answers, strict=True):
        tolerance = 1e-5 if backend == "cuda" else 1e-11
        assert (a - b).norm() <= tolerance * a.norm()


# ---- the authors' numbers ------------------------------------------------------------------------


def golden(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def assert_golden(
    loss: Tensor, leaves: list[Tensor], data: dict[str, Tensor], wanted: list[Tensor]
) -> None:
    assert abs(loss.item() - data["loss"].item()) <= 1e-9 * data["loss"].item()
    for got, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert (got - want).norm() <= 1e-9 * want.norm()


def leaf(data: Tensor) -> Tensor:
    return data.clone().requires_grad_()


@pytest.mark.float64
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("sface", lambda data: SFace()),
        ("curricular_CurricularFace", lambda data: Softmax(curricular(float(data["t_before"])))),
        ("insightface_arc_filter", lambda data: Softmax(FILTER, gradient="straight_through")),
    ],
)
def test_golden(name: str, loss: Callable, backend: str) -> None:
    data = golden(name)
    x, w = leaf(data["x"]), leaf(data["w"])
    found = class_loss(x, w, data["labels"], loss(data), backend=backend)
    assert_golden(found, [x, w], data, [data["grad_x"], data["grad_w"]])


@pytest.mark.float64
def test_golden_sphereface2(backend: str) -> None:
    # its gradient of the (unit) weight lacks the projection, so the cosines are given as products
    data = golden("opensphere_SphereFace2")
    x, bias = leaf(data["x"]), leaf(data["bias"])
    w = leaf(unit(data["w"]))
    loss = SphereFace2(bias, gradient="straight_through")
    found = class_loss(F.normalize(x), w, data["labels"], loss, normalize=False, backend=backend)
    wanted = [data["grad_x"], data["grad_w"], data["grad_bias"]]
    assert_golden(found, [x, w, bias], data, wanted)
    assert abs(SphereFace2.balanced(50).bias - data["bias"].item()) <= 1e-9


@pytest.mark.float64
def test_golden_soft_triple(backend: str) -> None:
    data = golden("pml_SoftTripleLoss")
    x = leaf(data["x"])
    w = leaf(data["param_fc"].T.reshape(50, 10, 16))
    found = class_loss(x, w, data["labels"], SoftTriple(), backend=backend)
    wanted = data["gradparam_fc"].T.reshape(50, 10, 16)
    assert_golden(found, [x, w], data, [data["grad_x"], wanted])


def test_balanced_bias_is_the_minimum() -> None:
    start = SphereFace2.balanced(1000)
    bias = torch.tensor(start.bias, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1000, dtype=torch.float64)
    loss = sphereface2_formula(Row(zero[:1], zero[1:]), bias, True)
    assert abs(torch.autograd.grad(loss, bias)[0].item()) <= 1e-9 * loss.item()


# ---- shards --------------------------------------------------------------------------------------

RULE_PARAMS = {
    "softmax": (8.0,),
    "softmax-bent": (8.0,),
    "sface": (80.0, 1.23),
    "sphereface2": (4.0, 0.4, 3.0, 0.0),
}


def op_inputs(
    rule: str, dtype: torch.dtype = torch.float64, softness: float = 0.0, sampled: bool = True
) -> ClassInputs:
    x = unit(torch.randn(N, D, dtype=dtype)).requires_grad_()
    labels = torch.randint(0, C, (N, 2))
    labels[1, 1] = labels[4, 0] = labels[4, 1] = -1
    classes = torch.unique(torch.cat([labels[labels >= 0], torch.arange(0, C, 2)]))
    classes = classes if sampled else None
    values = None
    if rule == "softmax-bent":
        p, q, r = torch.rand(3, N, dtype=dtype)
        values = torch.stack([torch.full_like(p, 0.1), p, q, r])
    elif rule == "sphereface2":
        values = torch.full((1, N), 0.3, dtype=dtype)
    return ClassInputs(
        x,
        torch.randn(C * K, D, dtype=dtype).requires_grad_(),
        labels,
        classes,
        values,
        rule.partition("-")[0],
        list(RULE_PARAMS[rule]),
        K,
        softness,
    )


def shard(p: ClassInputs, start: int, stop: int) -> ClassInputs:
    """The classes from start up to stop, as their own table, numbered from 0."""
    classes = torch.arange(C) if p.classes is None else p.classes
    inside = (classes >= start) & (classes < stop)
    here = (p.labels >= start) & (p.labels < stop)
    return p._replace(
        weight=p.weight.detach()[start * K : stop * K],
        x=p.x.detach(),
        labels=torch.where(here, p.labels - start, -1),
        classes=classes[inside] - start,
    )


@pytest.mark.float64
@pytest.mark.parametrize("softness", [0.0, 0.2])
@pytest.mark.parametrize("rule", RULE_PARAMS)
def test_shards_merge_to_the_whole(rule: str, softness: float, streamed: str) -> None:
    p = op_inputs(rule, softness=softness)
    kinds = CLASS_FOLDS[p.rule].kinds
    whole = class_statistics(p, backend=streamed)
    up = torch.rand_like(whole.statistics), torch.rand_like(whole.targets)
    value = (whole.statistics * up[0]).sum() + (whole.targets * up[1]).sum()
    dx, dw = torch.autograd.grad(value, (p.x, p.weight))
    # uneven ones, and one without classes
    parts = [shard(p, *cut) for cut in ((0, 8), (8, 8), (8, 18), (18, C))]
    found = [class_statistics(part, backend=streamed) for part in parts]
    merged = found[0].statistics
    for each in found[1:]:
        merged = merge_statistics(kinds, merged, each.statistics)
    torch.testing.assert_close(merged, whole.statistics, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(f.targets for f in found), whole.targets, rtol=1e-12, atol=1e-12)
    best = torch.stack([f.hardest_score for f in found]).max(dim=0).values
    torch.testing.assert_close(best, whole.hardest_score, rtol=1e-12, atol=1e-12)
    given = [class_gradients(part, merged, *up, compact=True, backend=streamed) for part in parts]
    torch.testing.assert_close(sum(g[0] for g in given), dx, rtol=1e-11, atol=1e-12)
    compact = torch.cat([g[1] for g in given])
    rows = (p.classes[:, None] * K + torch.arange(K)).flatten()
    torch.testing.assert_close(compact, dw[rows], rtol=1e-11, atol=1e-12)
    assert compact.shape[0] == len(p.classes) * K < C * K
    assert torch.equal(dw.index_fill(0, rows, 0), torch.zeros_like(dw))


def test_compact_without_classes_changes_nothing(streamed: str) -> None:
    p = op_inputs("softmax", torch.float32, sampled=False)
    p = p._replace(x=p.x.detach(), weight=p.weight.detach())
    found = class_statistics(p, backend=streamed)
    up = torch.ones_like(found.statistics), torch.ones_like(found.targets)
    one, other = (
        class_gradients(p, found.statistics, *up, compact=compact, backend=streamed)
        for compact in (False, True)
    )
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert one[1].shape == p.weight.shape
    part = class_gradients(p, found.statistics, *up, need_x=False, backend=streamed)
    assert part[0].numel() == 0 and torch.equal(part[1], one[1])


@pytest.mark.parametrize("rule", RULE_PARAMS)
def test_op_is_its_reference(rule: str, streamed: str) -> None:
    p = op_inputs(rule, widest(streamed))
    loose = {"rtol": 1e-4, "atol": 1e-4} if streamed == "cuda" else {"rtol": 1e-11, "atol": 1e-12}
    answers = []
    for name in ("reference", streamed):
        out = class_statistics(p, backend=name)
        slope = torch.linspace(1, 2, out.statistics.numel(), dtype=torch.float64)
        value = (out.statistics * slope.view_as(out.statistics)).sum() + out.targets.square().sum()
        answers.append((*out, *torch.autograd.grad(value, (p.x, p.weight))))
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b, **loose)
    torch.testing.assert_close(class_targets(p), answers[0][1].detach(), **loose)


def test_hardest_is_the_highest_cosine(backend: str) -> None:
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    x = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([[0, -1], [0, 3], [-1, -1]])
    p = ClassInputs(x, w, labels, params=(1.0,))
    found = class_statistics(p, backend=backend)
    assert found.hardest.tolist() == [1, 1, 1]  # of equal ones the first
    torch.testing.assert_close(found.hardest_score, torch.tensor([0.8, 0.0, 1.0]))
    only = p._replace(x=x[:1], labels=labels[:1], classes=torch.tensor([0]))
    alone = class_statistics(only, backend=backend)
    assert alone.hardest.tolist() == [-1] and alone.hardest_score.tolist() == [-math.inf]
    assert alone.statistics.tolist() == [[-math.inf]]


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_alone_with_its_class(name: str, backend: str) -> None:
    named = LOSSES[name]
    x = torch.randn(3, D, requires_grad=True)
    w = torch.randn(1, 2, D, requires_grad=True)
    labels = torch.zeros(3, dtype=torch.int64)
    loss = class_loss(x, w, labels, named.loss(torch.tensor(BIAS)), backend=backend)
    bias = torch.tensor(BIAS, dtype=torch.float64)
    rows = rows_of(x.double(), w.double(), labels[:, None], [0], named.pool)
    wanted = torch.stack([named.formula(row, bias) for row in rows]).mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    for slope in torch.autograd.grad(loss, (x, w)):
        assert slope.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_and_only_ignored_rows(name: str, backend: str) -> None:
    loss = LOSSES[name].loss(torch.tensor(BIAS))
    for x, labels in (
        (torch.randn(0, D), torch.zeros(0, 2, dtype=torch.int64)),
        (torch.full((4, D), torch.nan), torch.full((4, 2), -100)),
    ):
        x, w = x.requires_grad_(), torch.randn(C, K, D, requires_grad=True)
        for reduction in ("mean", "sum"):
            value = class_loss(x, w, labels, loss, reduction=reduction, backend=backend)
            assert value.item() == 0
        for slope in torch.autograd.grad(value, (x, w)):
            assert torch.equal(slope, torch.zeros_like(slope))


def test_sface_where_rounding_takes_a_cosine_beyond_one(backend: str) -> None:
    # the authors' code has acos of 1.0000001 here, NaN
    x = torch.tensor([[1.0000002, 0.0]], requires_grad=True)
    w = torch.tensor([[1.0, 0.0], [1.0, 1e-9], [-1.0000002, 0.0]], requires_grad=True)
    loss = class_loss(x, w, torch.tensor([0]), SFace(), normalize=False, backend=backend)
    assert abs(loss.item() - 64.0) <= 1e-4  # the second class pushes with weight 1
    for slope in torch.autograd.grad(loss, (x, w)):
        assert slope.isfinite().all()


def test_nan_stays_in_its_row_and_a_zero_centre_has_no_gradient(backend: str) -> None:
    for name, named in LOSSES.items():
        x, w, labels = inputs(False, K, torch.float32)
        w = w.detach().clone()
        w[2, 1] = 0
        w.requires_grad_()
        loss = named.loss(torch.tensor(BIAS))
        rows = class_loss(
            x, w, labels + (labels < 0) * 101, loss, reduction="none", backend=backend
        )
        assert rows.isnan().tolist() == [i == 3 for i in range(N)], name
        dw = torch.autograd.grad(rows[[0, 1, 2, 4, 5, 6]].sum(), w)[0]
        assert torch.equal(dw[2, 1], torch.zeros(D))


def test_equal_centres_send_the_gradient_to_the_first(backend: str) -> None:
    x = torch.tensor([[0.6, 0.8]], dtype=widest(backend), requires_grad=True)
    w = torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [0, 1]]], dtype=x.dtype, requires_grad=True)
    loss = class_loss(x, w, torch.tensor([0]), Softmax(None, 2.0), backend=backend)
    dw = torch.autograd.grad(loss, w)[0]
    assert torch.equal(dw[:, 1], torch.zeros_like(dw[:, 1])) and (dw[:, 0] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_each_dtype_against_its_own_values_in_float64(
    name: str, dtype: torch.dtype, streamed: str
) -> None:
    x, w, labels = inputs(True, K, torch.float32)
    x, w = (t.detach().to(dtype).requires_grad_() for t in (x, w))
    bias = torch.tensor(BIAS)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = class_loss(*wide, labels, LOSSES[name].loss(bias.double()), backend="reference")
    loss = class_loss(x, w, labels, LOSSES[name].loss(bias), backend=streamed)
    assert loss.dtype == torch.float32
    # a scale of 64 and a weight by sigmoids of 80 times an angle enlarge float32's rounding
    assert abs(loss.item() - exact.item()) <= 1e-4 * abs(exact.item())
    rounding = torch.finfo(dtype).eps
    for got, want in zip(
        torch.autograd.grad(loss, (x, w)), torch.autograd.grad(exact, wide), strict=True
    ):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= (2e-4 + rounding) * want.norm()


# ---- derivatives and transforms ------------------------------------------------------------------


@pytest.mark.float64
@pytest.mark.parametrize("softness", [0.0, 0.2])
@pytest.mark.parametrize("rule", [r for r in RULE_PARAMS if r != "sface"])  # it holds its weights
def test_gradcheck(rule: str, softness: float, backend: str) -> None:
    p = op_inputs(rule, softness=softness)

    def statistics(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return class_statistics(p._replace(x=x, weight=weight), backend=backend)[:2]

    assert torch.autograd.gradcheck(statistics, (p.x, p.weight), fast_mode=True)


def test_second_derivatives() -> None:
    x, w, labels = inputs(True, K, torch.float64)
    x = torch.where(x.isnan(), 1, x).detach().requires_grad_()
    for loss in (Softmax(margins.CosFace(0.2), 3.0), SphereFace2(0.1, 4.0), SoftTriple(3.0)):
        assert torch.autograd.gradgradcheck(
            lambda x, w, loss=loss: class_loss(x, w, labels, loss, backend="reference"),
            (x, w),
            fast_mode=True,
        )


def test_second_derivative_is_refused_by_the_tiles(streamed: str) -> None:
    x, w, labels = inputs(False, K, widest(streamed))
    loss = class_loss(x, w, labels, SFace(), backend=streamed)
    dx, _ = torch.autograd.grad(loss, (x, w), create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative.*backend='reference'"):
        dx.square().sum().backward()


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        ("softmax-bent", torch.float32),
        ("sphereface2", torch.float32),
        ("softmax", torch.bfloat16),
    ],
)
def test_opcheck(rule: str, dtype: torch.dtype, streamed: str) -> None:
    p = op_inputs(rule, dtype)
    torch.library.opcheck(CLASS_RULES.op(streamed), tuple(p))
    still = [t.detach() if isinstance(t, Tensor) else t for t in p]
    found = CLASS_RULES.op(streamed)(*still)
    own = CLASS_FOLDS[p.rule].own_slope
    for needs in ((False, True, True, own), (True, False, True, False)):
        up = torch.rand_like(found[0]), torch.rand_like(found[1]), found[0]
        arguments = (*up, *still, *needs)
        torch.library.opcheck(CLASS_RULES.op(streamed, "_backward"), arguments)
    targets = CLASS_TARGETS.op("bounded")
    torch.library.opcheck(targets, (*still[:3], K, 0.0, True))


@pytest.fixture
def fresh_compiler() -> object:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_without_breaks_for_any_batch_size() -> None:
    bent = Softmax(curricular(0.3).eval())
    binary = SphereFace2(torch.tensor(BIAS))

    def run(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        several = class_loss(x, w, labels, binary, backend="bounded")
        return several + class_loss(x, w, labels[:, 0], bent, backend="bounded")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    w = torch.randn(C, K, D, requires_grad=True)
    for n in (12, 31):
        x = torch.randn(n, D, requires_grad=True)
        labels = torch.randint(0, C, (n, 2))
        labels[3] = -100
        got, wanted = compiled(x, w, labels), run(x, w, labels)
        torch.testing.assert_close(got, wanted)
        for a, b in zip(
            torch.autograd.grad(got, (x, w)), torch.autograd.grad(wanted, (x, w)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_func_grad(name: str, backend: str) -> None:
    x, w, labels = inputs(True, K, widest(backend))
    bias = torch.tensor(BIAS, dtype=x.dtype, requires_grad=True)

    def value(x: Tensor, w: Tensor) -> Tensor:
        return class_loss(x, w, labels, LOSSES[name].loss(bias.detach()), backend=backend)

    wanted = torch.autograd.grad(value(x, w), (x, w))
    for a, b in zip(torch.func.grad(value, (0, 1))(x, w), wanted, strict=True):
        torch.testing.assert_close(a.detach(), b)


def test_autocast_takes_the_weights_dtype(backend: str) -> None:
    x, w, labels = inputs(True, K, torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = class_loss(low, w, labels, SFace(), backend=backend)
    loss.backward()
    wide = low.detach().float().requires_grad_()
    wanted = class_loss(wide, w.detach(), labels, SFace(), backend="reference")
    assert loss.dtype == w.grad.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)


def test_weight_that_is_not_contiguous(backend: str) -> None:
    x, w, labels = inputs(True, K, torch.float32)
    turned = w.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    wanted = class_loss(x, w, labels, MLCD(8.0), backend=backend)
    got = class_loss(x, turned, labels, MLCD(8.0), backend=backend)
    torch.testing.assert_close(got, wanted)
    a, b = torch.autograd.grad(got, turned)[0], torch.autograd.grad(wanted, w)[0]
    torch.testing.assert_close(a, b)


# ---- bad input -----------------------------------------------------------------------------------

X, W, Y = torch.randn(4, D), torch.randn(C, K, D), torch.tensor([0, 1, 2, -100])
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "embeddings": ({"embeddings": X[0]}, ValueError, "embeddings: expected two dimensions"),
    "width": ({"weight": W[:, :, 1:]}, ValueError, "weight: expected .C, 5."),
    "no centres": ({"weight": W[:, :0]}, ValueError, r"weight: expected \[C, K >= 1, D\]"),
    "no classes": ({"weight": W[:0]}, ValueError, "weight: expected at least one class"),
    "dtype": ({"weight": W.double()}, TypeError, "weight: expected the dtype of embeddings"),
    "labels": ({"labels": Y[:3]}, ValueError, r"labels: expected shape \(4,\)"),
    "labels' dtype": ({"labels": Y.float()}, TypeError, "labels: expected int64"),
    "label": ({"labels": Y + 17}, IndexError, r"labels: expected class ids in \[0, 19\)"),
    "stray label": ({"labels": Y.clamp_min(-1)}, IndexError, "labels: .* from -1 to -1"),
    "class": ({"classes": torch.tensor([0, 1, 2, C])}, IndexError, "classes: expected class ids"),
    "twice": ({"classes": torch.tensor([0, 1, 2, 2])}, ValueError, "classes: expected distinct"),
    "missing": ({"classes": torch.tensor([0, 1])}, ValueError, "classes: expected every label"),
    "none": ({"classes": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one class id"),
    "loss": ({"loss": margins.ArcFace()}, TypeError, "loss: expected a ClassLoss, got ArcFace"),
    "reduction": ({"reduction": "all"}, ValueError, "reduction: expected one of"),
    "precision": ({"precision": "fp8"}, ValueError, "precision: expected one of"),
    "bend": (
        {"loss": Softmax(margins.CurricularFace()), "labels": torch.stack([Y, Y], 1)},
        ValueError,
        "labels: expected one a row with CurricularFace, got 2",
    ),
    "norm": (
        {"loss": Softmax(margins.MagFace()), "labels": torch.stack([Y, Y], 1)},
        ValueError,
        "labels: expected one a row with MagFace, got 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    changed, error, message = BAD[case]
    given = {"embeddings": X, "weight": W, "labels": Y, "loss": MLCD()} | changed
    with pytest.raises(error, match=message):
        class_loss(**given, backend=backend)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Softmax(scale=0.0), "scale: expected a finite value > 0"),
        (lambda: Softmax(gradient="none"), "gradient: expected one of"),
        (lambda: SoftTriple(gamma=-1.0), "gamma: expected a finite value > 0"),
        (lambda: SFace(k=math.inf), "k: expected a finite value > 0"),
        (lambda: SphereFace2(0.0, t=0.5), "t: expected a finite value >= 1"),
        (lambda: SphereFace2(0.0, alpha=1.0), "alpha: expected a value in"),
        (lambda: SphereFace2(torch.zeros(2)), "bias: expected one number"),
        (lambda: SphereFace2.balanced(1), "classes: expected at least 2"),
        (lambda: MLCD(math.nan), "scale: expected a number, got nan"),
    ],
)
def test_bad_losses(make: Callable[[], ClassLoss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_scale_whose_gradient_would_be_lost_is_refused() -> None:
    for make in (
        lambda s: Softmax(scale=s),
        SFace,
        MLCD,
        SoftTriple,
        lambda s: SphereFace2(0.0, s),
    ):
        with pytest.raises(TypeError, match="expected a float, got a tensor"):
            make(torch.tensor(8.0, requires_grad=True))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"centers": 4}, ValueError, "centers: expected a divisor of weight's 57 rows, got 4"),
        ({"softness": -1.0}, ValueError, "softness: expected a value >= 0"),
        ({"rule": "hinges"}, ValueError, "rule: expected one of"),
        ({"params": []}, ValueError, "params: expected 1 of 'softmax', got 0"),
        ({"values": torch.zeros(1, N)}, ValueError, r"values: expected None or \(4, 7\)"),
        ({"labels": torch.zeros(N, dtype=torch.int64)}, ValueError, r"labels: expected shape \(7"),
        ({"labels": torch.zeros(N, 1)}, TypeError, "labels: expected int64"),
        ({"x": torch.zeros(N, D, dtype=torch.float16)}, TypeError, "x: expected torch.float32"),
    ],
)
def test_bad_op_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    p = op_inputs("softmax", torch.float32)._replace(**changed)
    with pytest.raises(error, match=message):
        class_statistics(p)


def test_gradients_by_hand_are_not_the_references() -> None:
    p = op_inputs("softmax")
    found = class_statistics(p, backend="reference")
    with pytest.raises(ValueError, match="backend: expected a streamed one"):
        class_gradients(p, found.statistics, found.statistics, found.targets, backend="reference")


# ---- memory --------------------------------------------------------------------------------------

MEMORY = {
    "softmax": ("Softmax()", 1),
    "sphereface2": ("SphereFace2(0.0)", 1),
    "sub-centres": ("Softmax()", 3),
}
MEMORY_N, MEMORY_D, MEMORY_C = 256, 64, 24_000
MEMORY_BOUND = 17 * MIB

CHILD = (
    COUNTER
    + """
from fused_losses.class_losses import *

def run(made, centers, n, d, c, backend):
    torch.manual_seed(0)
    x = torch.randn(n, d, requires_grad=True)
    w = torch.randn(c // centers, centers, d, requires_grad=True)
    y = torch.randint(0, c // centers, (n, 2))  # one label a row goes by row_statistics
    loss = eval(made)
    peak = extra(lambda: class_loss(x, w, y, loss, backend=backend).backward())
    plan = fused_losses.explain(class_loss, x, w, y, loss, backend=backend)
    return peak - x.grad.nbytes - w.grad.nbytes, plan.peak_extra_bytes

cases, n, d, c = json.loads(sys.argv[1])
for name, made, centers, backend in cases:
    run(made, centers, n, d, 3000, backend)
print(json.dumps({f"{backend} {name}": run(made, centers, n, d, c, backend)
                  for name, made, centers, backend in cases}))
"""
)


@pytest.mark.slow
def test_peak_is_bounded_whatever_the_number_of_classes() -> None:
    for name in MEASURED:
        require(name)
    scores = MEMORY_N * MEMORY_C * 4
    sizes = [MEMORY_N, MEMORY_D, MEMORY_C]
    cases = [(name, *case, backend) for backend in MEASURED for name, case in MEMORY.items()]
    cases.append(("softmax", *MEMORY["softmax"], "reference"))
    told = told_by_child(CHILD, [cases, *sizes], OMP_WAIT_POLICY="passive")
    assert len(told) == len(cases)
    for name, (peak, plan) in told.items():
        if name.startswith("reference"):  # the control: a harness that saw nothing would pass
            assert peak > scores > 1.3 * MEMORY_BOUND, (name, peak)
        else:
            assert peak <= MEMORY_BOUND, (name, peak)
            assert peak <= plan <= 4 * peak, (name, peak, plan)

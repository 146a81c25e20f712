"""Distillation against its formulas on whole matrices, in float64, and the authors' numbers."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from distillation_formulas import TEMPERATURE, of_scores
from places import GOLDEN
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_losses
from fused_losses import TopTeacher, backends, distillation
from fused_losses.functions.distillation_kinds import KINDS
from fused_losses.primitives.divergence import bounded

FORMS = tuple(f for f in ("reference", "bounded", "cpu") if backends.unavailable(f) is None)
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "TILE_BYTES", 1)


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "jsd": [{}, {"beta": 0.1}],
    "pskd": [{}, {"alpha": 0.3}],
    "ofa": [{}, {"eps": 1.5}],
    "dkd": [{}, {"alpha": 2.0, "beta": 0.5}, {"removed": -2.0}],
    "bernoulli": [{}, {"eps": 0.2}],
    "bernoulli_norm": [{}, {"eps": 0.2}],
}
CALLS: list[tuple[str, dict[str, Any]]] = [
    (kind, options) for kind in KINDS for options in OPTIONS.get(kind, [{}])
]
LABELLED = [kind for kind, of in KINDS.items() if of.labelled]


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE).requires_grad_()


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dense", [False, True], ids=["two weights", "scores"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_loss_and_gradients(call: tuple[str, dict[str, Any]], dense: bool, form: str) -> None:
    kind, options = call
    n, c = 7, 40
    x, w = rows(n, 5), rows(c, 5)
    teacher, wt = (rows(n, c), None) if dense else (rows(n, 6), rows(c, 6))
    b, bt = rows(c), rows(c)
    scale, other = torch.full((), 3.0, dtype=DOUBLE).requires_grad_(), rows(n)
    other = (1 + other.detach().abs()).requires_grad_()
    t = torch.tensor(TEMPERATURE.get(kind, 1.0) * 1.25, dtype=DOUBLE).requires_grad_()
    labels = torch.randint(0, c, (n,))
    ignored = labels.clone()
    ignored[2] = -100
    got = distillation(
        x, w, teacher, wt, kind=kind, labels=ignored, temperature=t, student_bias=b,
        teacher_bias=bt, student_scale=scale, teacher_scale=other, teacher_grad=True,
        normalize="student" if dense else True, reduction="none", backend=form, **options,
    )  # fmt: skip
    v = teacher if wt is None else unit(teacher) @ unit(wt).T
    u, v = (scale * unit(x) @ unit(w).T + b) / t, (other[:, None] * v + bt) / t
    expected = of_scores(kind, u, v, labels, t, **options) * (ignored >= 0)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    leaves = [leaf for leaf in (x, w, teacher, wt, b, bt, scale, other, t) if leaf is not None]
    drawn = torch.rand(n, dtype=DOUBLE)
    mine, theirs = (torch.autograd.grad((o * drawn).sum(), leaves) for o in (got, expected))
    for a, e in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_take_part(kind: str, form: str) -> None:
    n, c = 5, 50
    x, w, y, wt = rows(n, 4), rows(c, 4), rows(n, 3).detach(), rows(c, 3).detach()
    classes = torch.tensor([49, 2, 30, 4, 17, 9])
    labels = classes[torch.randint(0, 6, (n,))]
    given: dict[str, Any] = {"labels": labels} if kind in LABELLED else {}
    got = distillation(x, w, y, wt, kind=kind, classes=classes, backend=form, **given)
    place = (labels[:, None] == classes).int().argmax(1)
    t = TEMPERATURE.get(kind, 1.0)
    u, v = x @ w[classes].T / t, y @ wt[classes].T / t
    expected = of_scores(kind, u, v, place, t).mean()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    mine, theirs = (torch.autograd.grad(o, [x, w]) for o in (got, expected))
    for a, e in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_an_ignored_row_are_not_read(kind: str, form: str) -> None:
    n, c = 5, 40
    x, w, y, b, scale = rows(n, 4), rows(c, 4), rows(n, c), rows(c), rows(n)
    scale = (1 + scale.detach().abs()).requires_grad_()
    labels = torch.randint(0, c, (n,))
    labels[1] = labels[3] = -100
    given: dict[str, Any] = dict(kind=kind, labels=labels, teacher_grad=True, backend=form)

    def gradients(spoilt: Tensor) -> tuple[Tensor, ...]:
        loss = distillation(x, w, spoilt, teacher_bias=b, teacher_scale=scale, **given)
        return loss, *torch.autograd.grad(loss, [x, w, spoilt, b, scale])

    spoilt = y.detach().clone()
    spoilt[1, 7], spoilt[3] = torch.nan, torch.inf
    for a, e in zip(gradients(spoilt.requires_grad_()), gradients(y), strict=True):
        assert torch.equal(a, e)


class _Largest(TorchDispatchMode):
    """The most elements that any op gave, but for views of what is known."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.elements, self.known = 0, [t.untyped_storage().data_ptr() for t in known]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, made.numel())
        return out


@pytest.mark.parametrize("form", [form for form in FORMS if form != "reference"])
def test_dense_scores_are_not_copied(form: str) -> None:
    n, c = 96, 40_000
    x, w, y = (torch.randn(*shape) for shape in ((n, 4), (c, 4), (n, c)))
    labels = torch.arange(n)
    labels[1] = -100
    leaves = [x.requires_grad_(), w.requires_grad_()]
    with _Largest(y) as largest:
        distillation(x, w, y, labels=labels, temperature=2.0, backend=form).backward()
    assert leaves[1].grad is not None and leaves[1].grad.isfinite().all()
    assert largest.elements < n * c / 4


def test_rows_of_positions() -> None:
    """[2, 3, D] is what its six rows are, of every kind of teacher."""
    x, w, y, wt, scores = rows(6, 4), rows(9, 4), rows(6, 3), rows(9, 3), rows(6, 9)
    labels = torch.randint(0, 9, (6,))
    labels[1] = -100
    scale = 1 + torch.rand(6, dtype=DOUBLE)
    values, ids = scores.topk(3)

    def at(t: Tensor) -> Tensor:
        return t.unflatten(0, (2, 3))

    teachers: list[tuple[tuple[Any, Any], tuple[Any, Any]]] = [
        ((y, wt), (at(y), wt)),
        ((scores, None), (at(scores), None)),
        ((TopTeacher(ids, values), None), (TopTeacher(at(ids), at(values)), None)),
    ]
    for flat, shaped in teachers:
        for reduction in ("none", "mean"):
            options: dict[str, Any] = dict(reduction=reduction, teacher_grad=True, kind="pskd")
            one = distillation(x, w, *flat, labels=labels, student_scale=scale, **options)
            two = distillation(
                at(x), w, *shaped, labels=at(labels), student_scale=at(scale), **options
            )
            assert two.shape == ((2, 3) if reduction == "none" else ())
            assert torch.equal(two.flatten(), one.flatten())
            mine, theirs = (torch.autograd.grad(o.sum(), [x, w]) for o in (one, two))
            assert all(torch.equal(a, e) for a, e in zip(mine, theirs, strict=True))


# ---- the authors' numbers -----------------------------------------------------------------------

FOLDER = GOLDEN / "distillation"
INDEX = json.loads((FOLDER / "index.json").read_text())["entries"]
GOLDENS: dict[str, dict[str, Any]] = {
    "dkd": dict(kind="dkd", removed=-1000.0),
    "ofakd_eps1.5": dict(kind="ofa", eps=1.5),
    "dhkd_BinaryKL": dict(kind="bernoulli", eps=1e-8),
    "pskd": dict(kind="pskd", alpha=0.3),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GOLDENS)
def test_the_authors_numbers(name: str, form: str) -> None:
    with np.load(FOLDER / f"{name}.npz") as stored:
        data = {key: torch.from_numpy(stored[key]) for key in stored.files}
    student = data["student"].requires_grad_()
    c = student.shape[1]
    teacher = data["teacher" if "teacher" in data else "past_logits"]
    options: dict[str, Any] = GOLDENS[name]
    if KINDS[options["kind"]].labelled:
        options = options | {"labels": data["labels"]}
    eye = torch.eye(c, dtype=DOUBLE)
    loss = distillation(student, eye, teacher, backend=form, **options)
    torch.testing.assert_close(loss, data["loss"], rtol=1e-9, atol=0)
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(grad, data["grad_student"], rtol=1e-9, atol=1e-12)


def test_every_golden_is_asked_for() -> None:
    assert set(GOLDENS) == set(INDEX) == {path.stem for path in FOLDER.glob("*.npz")}


# ---- dtypes, programs, derivatives --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    x, w, y, wt, t = rows(3, 4), rows(20, 4), rows(3, 3), rows(20, 3), rows(1).detach().abs() + 1
    labels = torch.tensor([0, 5, 19])

    def loss(*given: Tensor) -> Tensor:
        *sides, t = given
        return distillation(*sides, kind=kind, labels=labels, temperature=t, teacher_grad=True)

    given = (x, w, y, wt, t.requires_grad_())
    assert torch.autograd.gradcheck(loss, given, fast_mode=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        (first,) = torch.autograd.grad(loss(*given), x, create_graph=True)
        torch.autograd.grad(first.sum(), x)


def test_second_derivatives_of_the_reference() -> None:
    x, w, y = rows(3, 4), rows(8, 4), rows(3, 8).detach()
    assert torch.autograd.gradgradcheck(
        lambda x, w: distillation(x, w, y, backend="reference"), (x, w)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    x, w, y, wt = (rows(*s).to(dtype).detach() for s in ((6, 8), (50, 8), (6, 4), (50, 4)))
    x.requires_grad_()
    labels = torch.zeros(6, dtype=torch.long)
    loss = distillation(x, w, y, wt)
    exact = of_scores(
        "kl", x.double() @ w.double().T, y.double() @ wt.double().T, labels, 1.0
    ).mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, x)[0].dtype == dtype


def test_autocast_takes_the_weights_dtype() -> None:
    x, y = torch.randn(6, 8, requires_grad=True), torch.randn(6, 4)
    w, wt = torch.randn(50, 8).bfloat16(), torch.randn(50, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation(x, w, y, wt)
    plain = distillation(x.bfloat16(), w, y.bfloat16(), wt)
    assert loss == plain and loss.dtype == torch.float32


@pytest.mark.parametrize("kind", ["kl", "dkd", "bernoulli"])
def test_compiled(kind: str) -> None:
    x, w, y, wt = (torch.randn(*s) for s in ((6, 8), (50, 8), (6, 4), (50, 4)))
    x.requires_grad_()
    labels = torch.randint(0, 50, (6,))

    def loss(x: Tensor) -> Tensor:
        return distillation(x, w, y, wt, kind=kind, labels=labels, temperature=2.0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, traced = loss(x), compiled(x)
    torch.testing.assert_close(traced, plain)
    torch.testing.assert_close(*(torch.autograd.grad(o, x) for o in (traced, plain)))


# ---- recipes ------------------------------------------------------------------------------------


def test_dino_is_a_soft_cross_entropy_with_prototypes() -> None:
    """Centred and sharpened teacher, one table of prototypes for both."""
    student, teacher, prototypes = rows(6, 8), rows(6, 8).detach(), rows(40, 8)
    center = torch.randn(40, dtype=DOUBLE)
    got = distillation(
        student, prototypes, teacher, prototypes.detach(), kind="soft_ce", normalize=True,
        student_scale=1 / 0.1, teacher_scale=1 / 0.04, teacher_bias=-center / 0.04,
    )  # fmt: skip
    s, t = unit(student) @ unit(prototypes).T, unit(teacher) @ unit(prototypes.detach()).T
    expected = -(torch.softmax((t - center) / 0.04, 1) * torch.log_softmax(s / 0.1, 1)).sum(1)
    torch.testing.assert_close(got, expected.mean(), rtol=1e-10, atol=0)


# ---- arguments ----------------------------------------------------------------------------------

X, W, Y, WT = torch.ones(4, 3), torch.ones(9, 3), torch.ones(4, 2), torch.ones(9, 2)
IDS, VALUES = torch.tensor([[0, 1]] * 4), torch.zeros(4, 2)
TWICE, HIGH = torch.tensor([[0, 0]] * 4), torch.tensor([[0, 9]] * 4)
BAD: list[tuple[tuple, dict, type, str]] = [
    ((X, W, Y, torch.ones(8, 2)), {}, ValueError, "teacher_weight: expected 9 classes"),
    ((X, W, Y), {}, ValueError, r"teacher: expected scores \(4, 9\)"),
    ((X, W, Y[:3], WT), {}, ValueError, "teacher: expected 4 rows"),
    ((X, W, Y, WT.double()), {}, TypeError, "teacher_weight: expected the dtype of student"),
    ((X, W, Y.double(), WT), {}, TypeError, "teacher_weight: expected the dtype of teacher"),
    ((X, W, Y.clone().requires_grad_(), WT), {}, ValueError, "teacher: expected a teacher without"),
    ((X, W, Y, WT.clone().requires_grad_()), {}, ValueError, "teacher_weight: expected a teacher"),
    ((X, W, Y, WT), {"temperature": 0.0}, ValueError, "temperature: expected a value > 0"),
    ((X, W, Y, WT), {"temperature": -1.0}, ValueError, "temperature: expected a value > 0"),
    ((X, W, Y, WT), {"student_scale": 0.0}, ValueError, "student_scale: expected a value > 0"),
    ((X, W, Y, WT), {"kind": "hinton"}, ValueError, "kind: expected one of kl"),
    ((X, W, Y, WT), {"alpha": 0.5}, ValueError, "alpha: expected None with kind='kl'"),
    (
        (X, W, Y, WT),
        {"kind": "jsd", "beta": 1.0},
        ValueError,
        r"beta: expected a value in \(0, 1\)",
    ),
    ((X, W, Y, WT), {"kind": "dkd"}, ValueError, "labels: expected class ids"),
    ((X, W, Y, WT), {"kind": "dkd", "labels": torch.full((4,), 9)}, IndexError, "labels: expected"),
    ((X, W, Y, WT), {"kind": "ofa", "labels": IDS[:, 0], "eps": 0.0}, ValueError, "eps: expected"),
    ((X, W, Y, WT), {"normalize": "both"}, ValueError, "normalize: expected one of"),
    ((X, W, Y, WT), {"memory_budget": -1}, ValueError, "memory_budget: expected bytes"),
    ((X, W, Y, WT), {"student_bias": torch.ones(4)}, ValueError, "student_bias: expected shape"),
    ((X, W, Y, WT), {"classes": torch.tensor([1, 1])}, ValueError, "classes: expected distinct"),
    ((X, W, TopTeacher(TWICE, VALUES)), {}, ValueError, "teacher.ids: expected distinct"),
    ((X, W, TopTeacher(HIGH, VALUES)), {}, IndexError, "teacher.ids: expected class ids"),
    ((X, W, TopTeacher(IDS, VALUES[:, :1])), {}, ValueError, "teacher.values: expected shape"),
    ((X, W, TopTeacher(IDS, VALUES)), {"kind": "reverse_kl"}, ValueError, "kind: expected one of"),
    ((X, W, TopTeacher(IDS, VALUES), WT), {}, ValueError, "teacher_weight: expected None"),
    (
        (X, W, TopTeacher(IDS, VALUES)),
        {"classes": torch.tensor([2, 3])},
        ValueError,
        "teacher.ids: expected a listed class of every row among `classes`, got none in row 0",
    ),
    (
        (X, W, TopTeacher(IDS[:, :1], VALUES[:, :1])),
        {"kind": "dkd", "labels": torch.tensor([1, 0, 1, 0])},
        ValueError,
        "teacher.ids: expected with kind='dkd' a listed class of every row beside its label, "
        "got none in row 1",
    ),
    ((X[None], W, Y, WT), {}, ValueError, r"teacher: expected \[1, 4, ...\] beside such a student"),
    (
        (X[None], W, TopTeacher(IDS[None], VALUES)),
        {},
        ValueError,
        r"teacher.values: expected \[1, 4, ...\]",
    ),
    (
        (X[None], W, Y[None], WT),
        {"labels": torch.zeros(4, dtype=torch.long)},
        ValueError,
        r"labels: expected shape \(1, 4\)",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[3][:30])
def test_bad_arguments(case: tuple[tuple, dict, type, str]) -> None:
    given, options, error, message = case
    with pytest.raises(error, match=message):
        distillation(*given, **options)


def test_public() -> None:
    assert fused_losses.distillation is distillation
    assert math.isfinite(float(distillation(X, W, Y, WT)))

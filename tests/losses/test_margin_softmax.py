"""margin_softmax on every backend against the NumPy oracle: chosen rows, not a full product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conftest import CUDA, require, widest
from oracles import relative_error
from torch import Tensor

import fused_losses
from fused_losses import margins

# package margin (a factory: AdaFace has state) and the oracle's formula for it
MARGINS: dict[str, tuple[Callable[[], Any], Any]] = {
    "none": (lambda: None, None),
    "cosface": (lambda: margins.CosFace(0.35), oracles.cosface(0.35)),
    "arcface": (lambda: margins.ArcFace(0.5), oracles.arcface(0.5)),
    "arcface-monotone": (
        lambda: margins.ArcFace(0.5, "monotone"),
        oracles.arcface(0.5, "monotone"),
    ),
    "sphereface": (lambda: margins.SphereFace(4.0), oracles.sphereface4()),
    "combined": (
        lambda: margins.CombinedMargin(1.35, 0.3, 0.2),
        oracles.combined(1.35, 0.3, 0.2),
    ),
    "adaface": (
        lambda: margins.AdaFace().eval().requires_grad_(False),
        oracles.adaface(20.0, 100.0),
    ),
    "magface": (lambda: margins.MagFace(), oracles.magface()),
    "callable": (
        lambda: lambda t: t**3 - 0.1,
        lambda t, norm: (t**3 - 0.1, 3 * t**2, 0 * t),
    ),
}


@dataclass(frozen=True)
class Case:
    """One call of margin_softmax: shapes and options, with options made from a generator."""

    id: str
    n: int
    d: int
    c: int
    margin: str = "arcface"
    scale: float | str = 64.0
    normalize: bool = True
    bias: bool = False
    smoothing: float = 0.0
    ignored: float = 0.0  # the share of rows with ignore_index
    class_weight: bool = False
    classes: str = ""  # "", "sorted" or "unsorted"
    gradient: str = "exact"
    reduction: str = "mean"
    size: float = 1.0  # of the embeddings
    options: dict = field(default_factory=dict)


CASES = [
    Case("arcface-plain", 32, 16, 50),
    Case("one-row-three-dimensions", 1, 3, 5, "cosface"),
    Case("one-class-has-loss-zero", 6, 8, 1, "cosface"),
    Case("one-row-one-class-with-smoothing", 1, 4, 1, "arcface", smoothing=0.1),
    Case("two-classes", 9, 7, 2, "arcface", scale=10.0),
    Case("more-rows-than-classes", 300, 12, 5, "arcface", scale=16.0),
    Case("one-dimension-not-normalised", 37, 1, 19, "none", scale=2.0, normalize=False),
    Case("65-dimensions", 37, 65, 129, "arcface"),
    Case("513-dimensions-997-classes", 37, 513, 997, "arcface-monotone"),
    Case("300-rows-1000-classes", 300, 33, 1000, "cosface"),
    Case("4099-classes-pass-several-tiles", 130, 17, 4099, "arcface", scale=30.0),
    Case("no-margin-products-with-bias", 37, 33, 101, "none", 1.0, False, bias=True),
    Case("cosine-with-bias-and-smoothing", 21, 9, 40, "cosface", 20.0, bias=True, smoothing=0.1),
    Case("smoothing-weights-ignored-mean", 40, 11, 23, smoothing=0.2, ignored=0.3,
         class_weight=True),
    Case("smoothing-weights-ignored-sum", 40, 11, 23, smoothing=0.2, ignored=0.3, class_weight=True,
         reduction="sum"),
    Case("smoothing-weights-ignored-none", 40, 11, 23, smoothing=0.2, ignored=0.3,
         class_weight=True, reduction="none"),
    Case("smoothing-one-is-uniform", 12, 8, 17, scale=8.0, smoothing=1.0),
    Case("class-weight-alone", 40, 11, 23, "cosface", class_weight=True),
    Case("ignored-alone", 40, 11, 23, "arcface", ignored=0.5),
    Case("classes-sorted", 50, 20, 301, "arcface", classes="sorted"),
    Case("classes-unsorted-bias-weights-smoothing-ignored", 50, 20, 301, "cosface", bias=True,
         smoothing=0.1, ignored=0.2, class_weight=True, classes="unsorted"),
    Case("classes-just-the-target", 5, 8, 40, "arcface", classes="target"),
    Case("straight-through-arcface", 32, 16, 50, gradient="straight_through"),
    Case("straight-through-magface-keeps-penalty", 32, 16, 50, "magface", size=8.0,
         gradient="straight_through"),
    Case("scale-one", 32, 16, 50, scale=1.0),
    Case("scale-200", 32, 16, 50, scale=200.0),
    Case("scale-1000", 32, 16, 50, scale=1000.0),
    Case("scale-tensor", 32, 16, 50, scale="scalar"),
    Case("scale-each-row", 32, 16, 50, scale="rows", reduction="none"),
    Case("scale-each-row-products", 32, 16, 50, "none", scale="rows", normalize=False),
    Case("sphereface-scaled-by-its-norm", 32, 16, 50, "sphereface", scale="norm"),
    Case("sphereface", 32, 16, 50, "sphereface", scale=10.0),
    Case("combined", 32, 16, 50, "combined"),
    Case("adaface-in-eval", 32, 16, 50, "adaface", size=20.0),
    Case("magface", 32, 16, 50, "magface", size=8.0),
    Case("magface-ignored-weights", 40, 16, 50, "magface", size=8.0, ignored=0.3,
         class_weight=True),
    Case("any-callable", 32, 16, 50, "callable"),
    Case("budget-partial", 70, 16, 301, options={"memory_budget": 128 * 8 * 100}),
    Case("budget-ample", 70, 16, 301, options={"memory_budget": 1 << 26}),
    Case("budget-below-one-class", 70, 16, 301, options={"memory_budget": 8}),
    Case("budget-partial-classes-bias-smoothing", 70, 16, 301, bias=True, smoothing=0.1,
         class_weight=True, ignored=0.1, classes="unsorted",
         options={"memory_budget": 128 * 8 * 50}),
]  # fmt: skip


class Data:
    """Peaked data of a case: a third of the rows near their centre, duplicates among the rest."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        rng = np.random.default_rng([case.n, case.d, case.c])
        w = rng.standard_normal((case.c, case.d))
        labels = rng.integers(0, case.c, case.n)
        x = rng.standard_normal((case.n, case.d))
        x[::3] = 0.5 * x[::3] + w[labels[::3]]
        if case.n > 3:
            x[3], labels[3] = x[2], labels[2]  # the same row twice
        if case.c > 7:
            w[7] = w[2]  # the same centre twice: a tie for the hardest class
        x *= case.size / (np.sqrt(case.d) if not case.normalize else 1)
        ignored = rng.random(case.n) < case.ignored
        labels[ignored] = -100
        self.options: dict[str, Any] = {}
        self.x, self.w = (torch.from_numpy(a).to(dtype) for a in (x, w))
        self.labels = torch.from_numpy(labels)
        if case.bias:
            self.options["bias"] = torch.from_numpy(rng.standard_normal(case.c)).to(dtype)
        if case.class_weight:
            self.options["class_weight"] = torch.from_numpy(rng.uniform(0.2, 2, case.c)).to(dtype)
        if case.classes:
            own = np.unique(labels[labels >= 0])
            extra = np.setdiff1d(rng.permutation(case.c)[: case.c // 3], own)
            ids = own if case.classes == "target" else np.concatenate([own, extra])
            ids = np.sort(ids) if case.classes == "sorted" else rng.permutation(ids)
            self.options["classes"] = torch.from_numpy(ids)
        if case.scale == "scalar":
            self.options["scale"] = torch.tensor(23.0, dtype=dtype)
        elif case.scale == "rows":
            self.options["scale"] = torch.from_numpy(rng.uniform(5, 40, case.n)).to(dtype)
        elif case.scale == "norm":
            self.options["scale"] = self.x.norm(dim=1)
        else:
            self.options["scale"] = case.scale
        self.options["label_smoothing"] = case.smoothing
        # what multiplies the rows' losses under reduction="none"
        self.upstream = torch.from_numpy(rng.standard_normal(case.n))

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable inputs, as fresh leaves, by the oracle's name of their gradient."""
        found = {"dx": self.x, "dw": self.w, "dbias": self.options.get("bias")}
        if isinstance(self.options["scale"], Tensor):
            found["dscale"] = self.options["scale"]
        return {k: v.clone().requires_grad_() for k, v in found.items() if v is not None}


def oracle(case: Case, data: Data) -> oracles.Answer:
    """What the exact answer is for the (already rounded) inputs."""
    options = {k: v.double().numpy() if isinstance(v, Tensor) and v.is_floating_point() else v
               for k, v in data.options.items()}  # fmt: skip
    if "classes" in options:
        options["classes"] = options["classes"].numpy()
    return oracles.margin_softmax(
        data.x.double().numpy(),
        data.w.double().numpy(),
        data.labels.numpy(),
        margin=MARGINS[case.margin][1],
        penalty=oracles.magface_penalty if case.margin == "magface" else None,
        normalize=case.normalize,
        straight_through=case.gradient == "straight_through",
        reduction=case.reduction,
        upstream=data.upstream.numpy() if case.reduction == "none" else None,
        **options,
    )


def ask(
    case: Case, data: Data, backend: str, **changes: Any
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """The loss (under "none": weighted and summed), its gradients by name, and the stats."""
    leaves = data.leaves()
    options = {
        "margin": MARGINS[case.margin][0](),
        "normalize": case.normalize,
        "gradient": case.gradient,
        "reduction": case.reduction,
        "return_stats": True,
        **data.options,
        **case.options,
        **changes,
    }
    if "dbias" in leaves:
        options["bias"] = leaves["dbias"]
    if "dscale" in leaves:
        options["scale"] = leaves["dscale"]
    loss, stats = fused_losses.margin_softmax(
        leaves["dx"], leaves["dw"], data.labels, backend=backend, **options
    )
    if case.reduction == "none":
        assert loss.shape == (case.n,)
        loss = (loss * data.upstream).sum()
    loss.backward()
    return loss.detach(), {k: v.grad for k, v in leaves.items()}, stats


def row_losses(case: Case, data: Data, backend: str, **changes: Any) -> Tensor:
    with torch.no_grad():
        return fused_losses.margin_softmax(
            data.x, data.w, data.labels, margin=MARGINS[case.margin][0](),
            normalize=case.normalize, reduction="none", backend=backend,
            **{**data.options, **case.options, **changes},
        )  # fmt: skip


def root_mean_square(error: np.ndarray) -> float:
    """Over the rows: in their mean, errors of either sign would cancel by luck."""
    return float(np.sqrt(np.mean(np.square(error))))


def eager(case: Case, data: Data) -> tuple[Tensor, dict[str, Tensor]]:
    """The yardstick, plain PyTorch in the inputs' dtype: the rows' losses, the gradients."""
    leaves = data.leaves()
    options = dict(data.options)
    if "dbias" in leaves:
        options["bias"] = leaves["dbias"]
    if "dscale" in leaves:
        options["scale"] = leaves["dscale"]
    rows = oracles.eager_margin_softmax(
        leaves["dx"], leaves["dw"], data.labels, margin=MARGINS[case.margin][0](),
        normalize=case.normalize, **options,
    )  # fmt: skip
    valid = data.labels != -100
    shares = data.options.get("class_weight", torch.ones(case.c))
    (rows.sum() / shares[data.labels[valid]].sum()).backward()
    return rows.detach(), {k: v.grad for k, v in leaves.items()}


def room_of(data: Data) -> float:
    """The relative error that sums in the data's dtype may leave in a loss or a gradient."""
    return 1e-10 if data.x.dtype == torch.float64 else 2e-5


def wanted_gradient(answer: oracles.Answer, name: str, like: Tensor) -> np.ndarray:
    wanted = getattr(answer, name)
    return wanted.sum() if name == "dscale" and like.dim() == 0 else wanted


@pytest.mark.float64
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_float64_is_the_formula(case: Case, backend: str) -> None:
    data = Data(case)
    answer = oracle(case, data)
    loss, gradients, stats = ask(case, data, backend)
    assert loss.dtype == torch.float64
    assert abs(loss.item() - answer.loss) <= 1e-11 * (1 + abs(answer.loss))
    # a gradient that is a difference of large terms keeps their rounding: 1e-9 of the terms
    floor = 1e-13 * float(np.abs(np.asarray(data.options["scale"])).max())
    for name, got in gradients.items():
        wanted = wanted_gradient(answer, name, got)
        error = np.linalg.norm(got.numpy() - wanted)
        assert error <= 1e-10 * np.linalg.norm(wanted) + floor, name
    for name, wanted in answer.stats.items():
        got = getattr(stats, name)
        assert not got.requires_grad, name
        if name == "hit":
            # with two equal centres, the target and its twin, rounding decides
            tied = np.isin(data.labels.numpy(), (2, 7)) & (case.c > 7)
            np.testing.assert_array_equal(got.numpy()[~tied], wanted[~tied])
        elif name == "hardest_class":
            twins = np.arange(-1, case.c)
            twins[twins == 7] = 2
            np.testing.assert_array_equal(twins[got.numpy() + 1], twins[wanted + 1])
        else:
            np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-10, atol=1e-12, err_msg=name)


# Rows for the narrower dtypes: those whose arithmetic differs from one another.
NARROW = [case for case in CASES if case.id in {
    "arcface-plain", "one-class-has-loss-zero", "more-rows-than-classes",
    "one-dimension-not-normalised", "65-dimensions", "513-dimensions-997-classes",
    "300-rows-1000-classes", "4099-classes-pass-several-tiles", "no-margin-products-with-bias",
    "smoothing-weights-ignored-mean", "classes-unsorted-bias-weights-smoothing-ignored",
    "scale-200", "scale-1000", "scale-tensor", "adaface-in-eval",
    "budget-partial", "budget-ample", "any-callable",
}]  # fmt: skip
# the least that a result of this dtype can be off by, with room for a sum of rounded terms
ROOM = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
@pytest.mark.parametrize("case", NARROW, ids=lambda case: case.id)
def test_error_is_within_that_of_eager(case: Case, dtype: torch.dtype, streamed: str) -> None:
    data = Data(case, dtype)
    answer = oracle(case, data)
    loss, gradients, _ = ask(case, data, streamed)
    rows = row_losses(case, data, streamed)
    eager_rows, eager_gradients = eager(case, data)
    assert loss.dtype == rows.dtype == torch.float32  # also for 16-bit inputs
    # scores of size s round by s 2^-24; exp hands that on as a relative error of each p
    rounding = 2**-24 * float(torch.as_tensor(data.options["scale"]).max())
    budget = root_mean_square(eager_rows.double().numpy() - answer.rows)
    budget = (budget if np.isfinite(budget) else 1) + 2 * rounding
    budget += 1e-6 * root_mean_square(answer.rows)
    assert root_mean_square(rows.double().numpy() - answer.rows) <= budget
    assert abs(loss.item() - answer.loss) <= 2 * budget
    for name, got in gradients.items():
        assert got.dtype == dtype, name
        wanted = wanted_gradient(answer, name, got)
        if np.linalg.norm(wanted) < 1e-12:  # one class: nothing to be relative to
            assert got.abs().max() <= 1e-6, name
            continue
        allowed = relative_error(eager_gradients[name], wanted)
        allowed = ROOM[dtype] + rounding + (allowed if np.isfinite(allowed) else 1)
        assert relative_error(got, wanted) <= allowed, name


@pytest.mark.parametrize("name", ["cpu", *CUDA])
@pytest.mark.parametrize("precision", ["bf16", "mixed"])
@pytest.mark.parametrize(
    "case",
    [case for case in NARROW if case.id in {
        "arcface-plain", "65-dimensions", "513-dimensions-997-classes", "300-rows-1000-classes",
        "4099-classes-pass-several-tiles", "classes-unsorted-bias-weights-smoothing-ignored",
        "smoothing-weights-ignored-mean", "budget-partial",
    }],
    ids=lambda case: case.id,
)  # fmt: skip
def test_bf16_products_are_within_eager_bf16(case: Case, precision: str, name: str) -> None:
    require(name)
    reasons = fused_losses.backends.reasons_against(
        name, torch.device("cpu"), torch.float32, precision
    )
    if reasons:
        pytest.skip(reasons[0])
    data = Data(case, torch.float32)
    answer = oracle(case, data)
    _, gradients, _ = ask(case, data, name, precision=precision)
    rows = row_losses(case, data, name, precision=precision)
    eager_rows, eager_gradients = eager(case, Data(case, torch.bfloat16))
    budget = root_mean_square(eager_rows.double().numpy() - answer.rows)
    if precision == "mixed":  # promises the exact loss
        budget = 1e-6 * root_mean_square(answer.rows) + 2**-23 * 64
    assert root_mean_square(rows.double().numpy() - answer.rows) <= budget
    for which, got in gradients.items():
        wanted = wanted_gradient(answer, which, got)
        allowed = relative_error(eager_gradients[which], wanted) + 2**-8
        assert relative_error(got, wanted) <= allowed, which


# ArcFace: the slope sin(theta + m) / sin(theta) = 1.4 and acos in float32 double the error
@pytest.mark.parametrize("margin, room", [("cosface", 5e-6), ("arcface", 1e-5)])
def test_trained_embeddings_keep_the_gradient_that_eager_loses(
    margin: str, room: float, streamed: str
) -> None:
    # late in training 1 - p is 1e-5 or less: eager takes it from p, which has no digits for it
    rng = np.random.default_rng(5)
    w = rng.standard_normal((2000, 512))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    labels = rng.integers(0, 2000, 64)
    noise = rng.standard_normal((64, 512)) / np.sqrt(512)
    x = w[labels] + np.sqrt(1 / 0.75**2 - 1) * noise
    x, w = torch.from_numpy(x).float(), torch.from_numpy(w).float()
    make, formula = MARGINS[margin]
    answer = oracles.margin_softmax(x.numpy(), w.numpy(), labels, margin=formula, scale=64.0)
    assert 0.7 < answer.stats["target_cosine"].mean() < 0.8
    y = torch.from_numpy(labels)

    def errors(head: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        head(a, b).backward()
        return relative_error(a.grad, answer.dx), relative_error(b.grad, answer.dw)

    ours = errors(
        lambda a, b: fused_losses.margin_softmax(a, b, y, margin=make(), backend=streamed)
    )
    theirs = errors(lambda a, b: oracles.eager_margin_softmax(a, b, y, margin=make()).mean())
    assert max(ours) <= room, ours
    assert min(theirs) > 1e-4, theirs  # otherwise this data shows nothing


@pytest.mark.parametrize("frozen", ["embeddings", "weight"])
def test_frozen_side_changes_nothing_for_the_other(frozen: str, backend: str) -> None:
    case = Case("frozen", 20, 9, 31)
    data = Data(case, widest(backend))
    answer = oracle(case, data)
    x = data.x.clone().requires_grad_(frozen != "embeddings")
    w = data.w.clone().requires_grad_(frozen != "weight")
    fused_losses.margin_softmax(x, w, data.labels, backend=backend).backward()
    if frozen == "weight":
        assert w.grad is None
        assert relative_error(x.grad, answer.dx) <= room_of(data)
    else:
        assert x.grad is None
        assert relative_error(w.grad, answer.dw) <= room_of(data)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda a: a.T.contiguous().T,
    "every-other-column": lambda a: torch.stack([a, a + 1], dim=2).flatten(1)[:, ::2],
    "rows-backwards-in-memory": lambda a: a.flip(0).contiguous().flip(0),
    "offset-into-storage": lambda a: torch.cat([a[:1], a])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layout_in_memory_changes_nothing(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, backend: str
) -> None:
    case = Case("layout", 20, 10, 31, bias=True, class_weight=True)
    data = Data(case, dtype)
    wide = {name: layout(getattr(data, name)) for name in ("x", "w")}
    assert torch.equal(wide["x"], data.x)

    def gradients(x: Tensor, w: Tensor, labels: Tensor, options: dict) -> tuple[Tensor, ...]:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        loss = fused_losses.margin_softmax(x, w, labels, backend=backend, **options)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    strided = {
        k: torch.stack([v, v], 1)[:, 0] if isinstance(v, Tensor) else v
        for k, v in data.options.items()
    }
    labels = torch.stack([data.labels, data.labels], 1)[:, 1]
    plain = gradients(data.x, data.w, data.labels, data.options)
    laid = gradients(wide["x"], wide["w"], labels, strided)
    # products of the same numbers; a library may sum them in another order for other strides
    room = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, wanted in zip(laid, plain, strict=True):
        assert relative_error(got, wanted.double().numpy()) <= room


def test_expanded_inputs(backend: str) -> None:
    # the same row for everyone, with stride 0; so is the gradient that reaches the op
    rng, dtype = np.random.default_rng(3), widest(backend)
    room, tiny = (1e-10, 1e-12) if dtype == torch.float64 else (1e-5, 1e-6)
    one = torch.from_numpy(rng.standard_normal((1, 6))).to(dtype).requires_grad_()
    w = torch.from_numpy(rng.standard_normal((11, 6))).to(dtype)
    label = torch.tensor([4])
    loss = fused_losses.margin_softmax(
        one.expand(5, 6), w, label.expand(5), reduction="sum", backend=backend
    )
    loss.backward()
    answer = oracles.margin_softmax(
        one.detach().numpy(), w.numpy(), label.numpy(), margin=oracles.arcface(0.5)
    )
    assert relative_error(one.grad, 5 * answer.dx) <= room
    weight = torch.from_numpy(rng.standard_normal((1, 6))).to(dtype).requires_grad_()
    x = torch.from_numpy(rng.standard_normal((3, 6))).to(dtype)
    # all classes are one vector: every class is as likely, and the sum of its gradients is 0
    loss = fused_losses.margin_softmax(
        x, weight.expand(7, 6), torch.tensor([0, 3, 6]), margin=None, backend=backend
    )
    loss.backward()
    assert abs(loss.item() - np.log(7)) <= tiny
    # a sum of 21 terms, in all |G| of 2 * 64 / |w| at most a row, of the mean over rows
    most = (21 + 16) * torch.finfo(dtype).eps / 2 * 2 * 64 / float(weight.detach().norm())
    assert weight.grad.abs().max() <= most


def test_reductions_are_of_the_same_rows(backend: str) -> None:
    case = Case("reductions", 30, 8, 19, ignored=0.3, class_weight=True)
    data = Data(case, widest(backend))
    rows, total, mean = (
        fused_losses.margin_softmax(
            data.x, data.w, data.labels, reduction=how, backend=backend, **data.options
        )
        for how in ("none", "sum", "mean")
    )
    valid = data.labels != -100
    assert (rows[~valid] == 0).all()
    torch.testing.assert_close(total, rows.sum())
    weights = data.options["class_weight"][data.labels[valid]]
    torch.testing.assert_close(mean, rows.sum() / weights.sum())


def test_another_ignore_index(backend: str) -> None:
    # -1 is the primitives' own mark, 3 is a class that exists: both only mean "ignored" here
    case = Case("ignore", 30, 8, 19)
    data = Data(case, widest(backend))
    kept = data.labels != 3
    assert not kept.all()
    by_class = fused_losses.margin_softmax(
        data.x, data.w, data.labels, ignore_index=3, backend=backend
    )
    by_minus_one = fused_losses.margin_softmax(
        data.x,
        data.w,
        torch.where(kept, data.labels, -1),
        ignore_index=-1,
        backend=backend,
    )
    wanted = oracles.margin_softmax(
        data.x.numpy()[kept],
        data.w.numpy(),
        data.labels.numpy()[kept],
        margin=oracles.arcface(0.5),
    )
    assert abs(by_class.item() - wanted.loss) <= room_of(data) * wanted.loss
    assert abs(by_minus_one.item() - wanted.loss) <= room_of(data) * wanted.loss


def test_int32_labels_and_classes(backend: str) -> None:
    case = Case("int32", 30, 8, 19, classes="unsorted")
    data = Data(case, widest(backend))
    wide = fused_losses.margin_softmax(
        data.x, data.w, data.labels, classes=data.options["classes"], backend=backend
    )
    narrow = fused_losses.margin_softmax(
        data.x, data.w, data.labels.int(), classes=data.options["classes"].int(), backend=backend
    )
    assert torch.equal(wide, narrow)


def test_all_classes_listed_is_no_classes_at_all(backend: str) -> None:
    case = Case("listed", 30, 8, 19)
    data = Data(case, widest(backend))
    _, whole, _ = ask(case, data, backend)
    _, listed, _ = ask(case, data, backend, classes=torch.randperm(19))
    room = 1e-12 if data.x.dtype == torch.float64 else 1e-4
    for name in whole:
        torch.testing.assert_close(listed[name], whole[name], rtol=room, atol=0.01 * room)


def test_unsampled_classes_get_gradient_zero(backend: str) -> None:
    case = Case("sampled", 10, 8, 200, classes="unsorted")
    data = Data(case, widest(backend))
    _, gradients, _ = ask(case, data, backend)
    out = torch.ones(200, dtype=torch.bool)
    out[data.options["classes"]] = False
    assert out.any() and (gradients["dw"][out] == 0).all()
    assert (gradients["dw"][~out].abs().sum(1) > 0).all()


@pytest.mark.parametrize("scale", [1.0, 64.0, 1000.0])
def test_shifting_every_bias_changes_nothing(scale: float, backend: str) -> None:
    # the largest score is taken out online: 1e4 more on every score must not overflow
    case = Case("shift", 30, 8, 19)
    data = Data(case, widest(backend))
    zero = torch.zeros(19, dtype=data.x.dtype)
    losses = [
        fused_losses.margin_softmax(
            data.x, data.w, data.labels, bias=zero + shift, scale=scale, backend=backend
        )
        for shift in (0.0, 1e4, -1e4)
    ]
    # a float32 score of 1e4 has steps of 1e-3
    room = 1e-10 if data.x.dtype == torch.float64 else 2e-3
    torch.testing.assert_close(losses[1], losses[0], rtol=room, atol=room)
    torch.testing.assert_close(losses[2], losses[0], rtol=room, atol=room)


def test_float32_scores_of_a_thousand_stay_finite(backend: str) -> None:
    # exp(1000) is inf in every dtype of ours
    x = torch.eye(3, 8).requires_grad_()
    w = torch.cat([torch.eye(3, 8), -torch.eye(3, 8)]).requires_grad_()
    loss = fused_losses.margin_softmax(
        x, w, torch.tensor([3, 4, 5]), margin=None, scale=1000.0, backend=backend
    )
    loss.backward()
    assert abs(loss.item() - 2000) <= 1e-3
    assert torch.isfinite(x.grad).all() and torch.isfinite(w.grad).all()


def test_order_of_the_rows_changes_nothing(streamed: str) -> None:
    case = Case("order", 100, 24, 700, reduction="none")
    data = Data(case, torch.float32)
    order = torch.randperm(100)
    rows = fused_losses.margin_softmax(
        data.x, data.w, data.labels, reduction="none", backend=streamed
    )
    mixed = fused_losses.margin_softmax(
        data.x[order], data.w, data.labels[order], reduction="none", backend=streamed
    )
    torch.testing.assert_close(mixed, rows[order], rtol=1e-6, atol=2e-5)


def test_the_same_call_twice_is_the_same_to_the_bit(streamed: str) -> None:
    case = Case("twice", 100, 24, 5000, bias=True, smoothing=0.1)
    data = Data(case, torch.float32)
    first, second = ask(case, data, streamed), ask(case, data, streamed)
    assert torch.equal(first[0], second[0])
    for name in first[1]:
        assert torch.equal(first[1][name], second[1][name]), name


def test_adaface_state_moves_once_a_call(backend: str) -> None:
    case = Case("state", 30, 8, 19, "adaface", size=20.0)
    data = Data(case, widest(backend))
    margin = margins.AdaFace(momentum=0.1).to(data.x.dtype)
    mean, std = oracles.adaface_state(np.linalg.norm(data.x.numpy(), axis=1), 20.0, 100.0, 0.1)
    loss = fused_losses.margin_softmax(data.x, data.w, data.labels, margin=margin, backend=backend)
    wanted = oracles.margin_softmax(
        data.x.numpy(), data.w.numpy(), data.labels.numpy(), margin=oracles.adaface(mean, std)
    )
    assert abs(margin.mean.item() - mean) <= 0.1 * room_of(data) * mean
    assert abs(margin.std.item() - std) <= 0.1 * room_of(data) * std
    assert abs(loss.item() - wanted.loss) <= room_of(data) * wanted.loss


def test_elastic_draws_once_a_call_and_uses_them(backend: str) -> None:
    case = Case("elastic", 30, 8, 19)
    data = Data(case, widest(backend))

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(11)

    margin = margins.ElasticArcFace(0.5, 0.1, generator=generator())
    loss = fused_losses.margin_softmax(data.x, data.w, data.labels, margin=margin, backend=backend)
    draws = 0.5 + 0.1 * torch.randn(30, generator=generator(), dtype=torch.float64)
    wanted = oracles.margin_softmax(
        data.x.numpy(),
        data.w.numpy(),
        data.labels.numpy(),
        margin=oracles.arcface(draws.numpy(), "none"),
    )
    assert abs(loss.item() - wanted.loss) <= room_of(data) * wanted.loss


def test_a_margin_needs_to_return_one_value_a_row(backend: str) -> None:
    case = Case("shape", 30, 8, 19)
    data = Data(case, widest(backend))
    with pytest.raises(ValueError, match=r"margin: expected it to return shape \(30,\), got \(\)"):
        fused_losses.margin_softmax(
            data.x, data.w, data.labels, margin=lambda t: t.mean(), backend=backend
        )


def test_stats_change_neither_loss_nor_gradient(backend: str) -> None:
    case = Case("stats", 30, 8, 19)
    data = Data(case, widest(backend))
    loss, gradients, _ = ask(case, data, backend)
    x, w = data.x.clone().requires_grad_(), data.w.clone().requires_grad_()
    alone = fused_losses.margin_softmax(x, w, data.labels, backend=backend)
    alone.backward()
    assert torch.equal(alone, loss)
    assert torch.equal(x.grad, gradients["dx"]) and torch.equal(w.grad, gradients["dw"])

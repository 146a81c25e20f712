"""margin_softmax on every backend against the NumPy oracle: chosen rows, not a full product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conftest import CUDA, require
from margin_softmax_cases import MARGINS, Case, Data, ask, oracle
from oracles import relative_error
from torch import Tensor

import fused_losses

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

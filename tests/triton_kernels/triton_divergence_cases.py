"""The kernels of `divergence` against float64, in Triton's interpreter.

`test_interpreted.py` runs this file. Bounds: a few steps of the dtype that is multiplied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_divergence_oracle import (
    KINDS,
    Case,
    call,
    forward_and_gradients,
    leaves,
    statistics,
    truth,
)

import fused_losses.backends
from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.primitives.divergence import rules, triton
from fused_losses.primitives.divergence.inputs import DivergenceInputs
from fused_losses.primitives.divergence.op import divergence
from fused_losses.primitives.row_statistics import triton_chunks

# a few dozen: products whose factors were rounded so, and what multiplies them
STEPS = 32
FORWARD = {"fp32": 2**-24, "mixed": 2**-24, "tf32": 2**-24, "bf16": 2**-8}
BACKWARD = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def close(got: Tensor, want: Tensor, step: float, what: str) -> None:
    error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-3)
    assert error <= STEPS * step, f"{what}: error {error:.3g}, allowed {STEPS * step:.3g}"


def check(case: Case) -> None:
    p = call(case)
    want, grads, of_inputs = truth(p)
    out, got = forward_and_gradients(p, grads)
    found = (*out[:4], *out[4])
    for index, (g, w) in enumerate(zip(found, want, strict=False)):
        assert g.dtype == torch.float64
        close(g, w, FORWARD[case.precision], f"statistic {index}")
    low = case.precision in ("mixed", "bf16") and case.dtype == torch.float32
    step = BACKWARD[torch.bfloat16 if low else case.dtype]
    for name, g in got.items():
        assert g.dtype == getattr(p, name).dtype and g.shape == getattr(p, name).shape
        close(g, of_inputs[name], step, f"gradient of {name}")
    if p.classes is not None:
        _, compact = forward_and_gradients(p, grads, compact=True)
        for name, g in compact.items():
            whole = got[name][p.classes] if name in ("weight", "teacher_weight") else got[name]
            assert torch.equal(g, whole), name


SHAPES = [
    Case(name="plain"),
    Case(name="dense", dense=True),
    Case(name="everything", normalize=True, extra=True, classes=41, teacher_d=24),
    Case(name="one width", normalize=True, extra=True, classes=41, teacher_d=24),
    Case(name="dense everything", dense=True, normalize=True, extra=True, classes=41, d=32),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_kinds(case: Case, kind: str) -> None:
    check(replace(case, kind=kind))


ALONE = [
    Case(name="bfloat16", dtype=torch.bfloat16, kind="forward"),
    Case(name="float16", dtype=torch.float16, kind="jensen_shannon", normalize=True, extra=True),
    Case(name="dense float16", dtype=torch.float16, kind="reverse", dense=True, extra=True),
    Case(name="rounded", precision="bf16", kind="squared", extra=True),
    Case(name="mixed", precision="mixed", kind="forward", teacher_d=24),
    Case(name="strided", strided=True, kind="reverse", teacher_d=24),
    Case(name="strided scores", strided=True, dense=True, kind="power"),
    Case(name="one row", n=1, kind="forward"),
    Case(name="two classes", c=2, no_target=1.0, kind="total_variation"),
]


@pytest.mark.parametrize("case", ALONE, ids=lambda c: c.name)
def test_dtypes_and_layouts(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dense", (False, True))
def test_runs_chunks_and_row_blocks(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is one piece at these sizes, cut into several ragged ones."""
    monkeypatch.setattr(gpu_device, "processors", lambda device: 7)
    monkeypatch.setattr(triton_chunks, "ROW_BLOCK", 32)
    monkeypatch.setattr(triton_chunks, "MAX_CHUNK", 64)
    check(Case(n=75, c=203, kind="forward", dense=dense, extra=True))
    check(Case(n=75, c=203, kind="jensen_shannon", dense=dense, extra=True, classes=131))


# ---- near agreement, and far from it -------------------------------------------------------------


def exact_products(n: int, c: int, d: int) -> DivergenceInputs:
    """Rows of so few bits that float32 rounds none of their products, nor sums of these."""
    g = torch.Generator().manual_seed(3)

    def steps(*shape: int) -> Tensor:
        return torch.randint(-16, 17, shape, generator=g).float()

    x, weight = steps(n, d) / 16, steps(c, d) / 16
    teacher = torch.where(torch.rand(n, d, generator=g) < 0.2, x + 2**-9, x)
    labels = torch.where(torch.arange(n) % 3 == 0, -1, torch.arange(n) % c)
    return DivergenceInputs(x, weight, teacher, weight, labels)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "power"])
def test_near_agreement_keeps_its_digits(kind: str) -> None:
    """At a divergence of 1e-6 the value and its gradient are those of float64."""
    p = exact_products(19, 203, 16)._replace(kind=kind, params=KINDS[kind])
    given = leaves(p)
    want = statistics(p, given)
    value = want[4]
    assert kind not in ("forward", "reverse") or 1e-7 < value.max() < 1e-5
    found = torch.autograd.grad(value.sum(), list(given.values()))
    zero = [torch.zeros_like(value)] * 4
    out, got = forward_and_gradients(p, [*zero, torch.ones_like(value)])
    assert ((out[4][0] - value).abs() <= 2**-18 * value.abs()).all()
    for name, w in zip(given, found, strict=True):
        error = (got[name].double() - w).norm() / w.norm()
        assert error < 1e-5, (name, float(error))


def near_call(case: Case, moved: str) -> DivergenceInputs:
    """A teacher and a little of noise, in `moved`: gaps of 2e-3, whose KL is 2e-6."""
    p = call(replace(case, teacher_d=case.d, scale=1.0))
    g = torch.Generator().manual_seed(4)

    def near(t: Tensor, name: str) -> Tensor:
        noise = torch.randn(t.shape, generator=g) * t.square().mean().sqrt()
        return t + 1.4e-3 * noise * (name in moved)

    given = dict(teacher=near(p.x, "rows"), teacher_weight=near(p.weight, "weights"))
    bias = None if p.bias is None else near(p.bias, "weights")
    return p._replace(**given, teacher_bias=bias)


def check_near(p: DivergenceInputs) -> None:
    """The value within 1e-3 and its gradients within 1e-5 of float64."""
    given = leaves(p)
    value = statistics(p, given)[4]
    assert p.kind not in ("forward", "reverse") or 2e-7 < value.mean() < 8e-6
    found = torch.autograd.grad(value.sum(), list(given.values()))
    zero = [torch.zeros_like(value)] * 4
    out, got = forward_and_gradients(p, [*zero, torch.ones_like(value)])
    torch.testing.assert_close(out[4][0], value.detach(), rtol=1e-3, atol=0)
    for name, w in zip(given, found, strict=True):
        error = (got[name].double() - w).norm() / w.norm()
        assert error < 1e-5, (name, float(error))


NEAR = {
    "rows": Case(n=8, c=75, d=32),
    "weights": Case(n=8, c=75, d=27, normalize=True),
    "rows and weights": Case(n=20, c=90, d=32, normalize=True, extra=True, classes=75),
}


@pytest.mark.parametrize("moved", NEAR)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "power"])
def test_products_that_are_rounded_leave_near_agreement_its_digits(kind: str, moved: str) -> None:
    check_near(near_call(replace(NEAR[moved], kind=kind), moved))


@pytest.mark.parametrize("normalize", (False, True))
def test_a_class_that_is_not_near_takes_no_digits_of_the_others(normalize: bool) -> None:
    p = near_call(Case(n=8, c=75, d=32, normalize=normalize, extra=True), "rows and weights")
    assert p.teacher_weight is not None and p.bias is not None and p.teacher_bias is not None
    far = [5, 40]  # whose probability is nothing on both sides
    p.teacher_weight[far] *= -1
    p.bias[far] = p.teacher_bias[far] = -100.0
    p.labels[p.labels == 5] = 6
    check_near(p)


def test_a_row_that_is_not_near_changes_no_other() -> None:
    for kind in ("forward", "jensen_shannon", "bernoulli"):
        p = near_call(Case(kind=kind, n=20), "rows and weights")
        x, teacher = p.x.clone(), p.teacher.clone()
        x[3, 5], teacher[7, 2], x[11, 0], x[15] = torch.nan, torch.inf, torch.inf, -3 * x[15]
        others = torch.ones(20, dtype=torch.bool)
        others[[3, 7, 11, 15]] = False
        clean = triton.forward(p)
        for got, want in zip(triton.forward(p._replace(x=x, teacher=teacher)), clean, strict=True):
            assert torch.equal(got[..., others], want[..., others]), kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_scores_differ_by_nothing(kind: str) -> None:
    p = call(Case(kind=kind, teacher_d=24))
    p = p._replace(teacher=p.x.clone(), teacher_weight=p.weight.clone())
    zero = [torch.zeros(37, dtype=torch.float64)] * 4
    folds = 2 if kind == "power" else 1
    out, got = forward_and_gradients(p, zero + [torch.ones_like(zero[0])] * folds)
    assert torch.equal(out[0], out[1]) and torch.equal(out[2], out[3])
    if kind != "power":
        assert not out[4][0].any() and not any(g.any() for g in got.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", (60.0, 3000.0))
@pytest.mark.parametrize("teacher_d", (16, 24))
def test_scores_far_from_one_another(kind: str, scale: float, teacher_d: int) -> None:
    """Peaked teachers and students, scores to 1e4: as the rounding of a score has it."""
    p = call(Case(kind=kind, n=16, c=101, teacher_d=teacher_d))
    for more in (dict(teacher=p.teacher * scale), dict(x=p.x * scale)):
        q = p._replace(**more)
        want, grads, of_inputs = truth(q)
        out, got = forward_and_gradients(q, grads)
        step = 2**-24 * max(float(w.abs().max()) for w in want[2:4])
        for index, (g, w) in enumerate(zip((*out[:4], *out[4]), want, strict=False)):
            largest = w.abs().max().clamp_min(1.0)
            assert ((g - w).abs() <= STEPS * step * largest).all(), index
        for name, g in got.items():
            w = of_inputs[name]
            assert g.isfinite().all(), name
            largest = w.abs().max().clamp_min(1.0)
            assert (g - w).abs().max() <= STEPS * step * largest * 8, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_knows_nothing(kind: str) -> None:
    """All its scores are equal."""
    p = call(Case(kind=kind, dense=True))
    p = p._replace(teacher=torch.full_like(p.teacher, 3.0))
    want, grads, of_inputs = truth(p)
    out, got = forward_and_gradients(p, grads)
    for index, (g, w) in enumerate(zip((*out[:4], *out[4]), want, strict=False)):
        close(g, w, 2**-24, f"statistic {index}")
    for name, g in got.items():
        close(g, of_inputs[name], 2**-24, f"gradient of {name}")


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_other_classes(kind: str) -> None:
    p = call(Case(kind=kind, n=5, c=1, no_target=0.0, teacher_d=24))
    want, grads, _ = truth(p._replace(kind="squared", params=[]))
    count = rules.DIVERGENCES[kind].differentiable
    out, got = forward_and_gradients(p, grads[:4] + [grads[4]] * count)
    assert (out[0] == -torch.inf).all() and (out[1] == -torch.inf).all()
    assert torch.equal(out[4], torch.full_like(out[4], 0.0)) or kind == "power"
    if kind == "power":
        assert (out[4][0] == -torch.inf).all() and not out[4][1].any()
    close(out[2], want[2], 2**-24, "target")
    x = grads[2][:, None] * p.weight.double()[0]
    close(got["x"], x, 2**-24, "gradient of x")


def test_a_score_that_is_nan_or_infinite_stays_in_its_row() -> None:
    for kind in KINDS:
        p = call(Case(kind=kind, n=20))
        clean = triton.forward(p)
        x, teacher = p.x.clone(), p.teacher.clone()
        x[3, 5], teacher[7, 2], x[11, 0] = torch.nan, torch.nan, torch.inf
        bad = torch.zeros(20, dtype=torch.bool)
        bad[[3, 7, 11]] = True
        out = triton.forward(p._replace(x=x, teacher=teacher))
        for got, want in zip(out, clean, strict=True):
            assert torch.equal(got[..., ~bad], want[..., ~bad]), kind
        assert out[0][[3, 11]].isnan().all() and out[1][7].isnan(), kind
        assert not out[4][0][bad].isfinite().any() or kind in ("power", "bernoulli"), kind


@pytest.mark.parametrize("dense", (False, True))
def test_empty_batch(dense: bool) -> None:
    p = call(Case(kind="jensen_shannon", n=4, extra=True, dense=dense))
    scale = None if p.teacher_scale is None else p.teacher_scale[:0]
    p = p._replace(x=p.x[:0], teacher=p.teacher[:0], labels=p.labels[:0], teacher_scale=scale)
    out, got = forward_and_gradients(p, [torch.ones(0, dtype=torch.float64)] * 5)
    rule = rules.DIVERGENCES["jensen_shannon"]
    assert [t.shape for t in out] == [(0,)] * 4 + [(rule.folds + rule.kept, 0)]
    assert all(g.shape == getattr(p, name).shape for name, g in got.items())
    assert not any(g.any() for g in got.values())


def test_only_what_is_needed_is_computed() -> None:
    for dense in (False, True):
        p = call(Case(dense=dense, extra=True))
        _, grads, _ = truth(p)
        _, whole = forward_and_gradients(p, grads)
        for name, want in whole.items():
            _, part = forward_and_gradients(p, grads, only=(name,))
            assert torch.equal(part[name], want), name


def test_a_frozen_teacher_costs_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    launch = triton_launch.launch

    def noting(kernel: Any, programs: int, args: tuple, constants: dict, tile: Any) -> None:
        if kernel.fn.__name__ == "side_gradient":
            ran.append(constants["TEACHER"])
        launch(kernel, programs, args, constants, tile)

    monkeypatch.setattr(triton_launch, "launch", noting)
    p = call(Case())
    _, grads, _ = truth(p)
    forward_and_gradients(p, grads, only=("x", "weight"))
    assert ran and not any(ran)


def test_label_out_of_range() -> None:
    p = call(Case())
    p.labels[3] = 53
    with pytest.raises(IndexError, match=r"labels: expected class ids in \[0, 53\)"):
        triton.forward(p)


def test_every_kind_of_the_table_is_here() -> None:
    assert set(KINDS) == set(rules.DIVERGENCES)


def test_wired_as_a_backend() -> None:
    assert fused_losses.backends.unavailable("triton") is None
    p = call(Case(kind="forward", extra=True, classes=31))
    _, grads, of_inputs = truth(p)
    given = {name: getattr(p, name).requires_grad_() for name in of_inputs}
    out = divergence(p, backend="triton")
    found = (*out[:4], *out.folds)
    loss = sum((f * g).sum() for f, g in zip(found, grads, strict=True))
    for (name, w), g in zip(
        of_inputs.items(), torch.autograd.grad(loss, list(given.values())), strict=True
    ):
        close(g, w, 2**-24, name)

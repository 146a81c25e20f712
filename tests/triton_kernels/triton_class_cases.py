"""The Triton kernels of `class_rules` against float64, in the interpreter.

Bound: the error of eager torch in the same dtype, plus a few steps of that dtype.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from far_rows import far_rows
from torch import Tensor
from triton_class_oracle import (
    BEST,
    CASES,
    LOW,
    PRECISIONS,
    SFACE,
    SOFT,
    SOME,
    SPHERE,
    STRAIGHT,
    SUMMED,
    Call,
    Case,
    answer,
    call,
)
from triton_oracle import DTYPE_STEP, STEPS, close

from fused_losses.class_losses import MLCD, SFace, Softmax, SoftTriple, SphereFace2
from fused_losses.explain import explain
from fused_losses.functions.class_loss import class_loss
from fused_losses.primitives.class_rules import triton as form
from fused_losses.primitives.class_rules.inputs import ClassInputs, ClassNeeds
from fused_losses.primitives.class_rules.op import CLASS_RULES, class_gradients, class_statistics
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS, KERNEL_RULES, merge_statistics
from fused_losses.primitives.class_rules.triton_arguments import Params
from fused_losses.primitives.class_rules.triton_rules import slopes, terms
from fused_losses.primitives.row_statistics import triton_chunks

NAMES = ("statistics", "targets", "hardest", "hardest_score", "dx", "dweight")


def run(made: Call, compact: bool = False) -> tuple[Tensor, ...]:
    p = ClassInputs(**made.args)
    out = form.forward(p)
    given = made.of_statistics, made.of_targets, out.statistics, p
    return *out, *form.backward(*given, compact, True, True)


def check(case: Case) -> None:
    made = call(case)
    low = case.precision in ("mixed", "bf16") and case.dtype == torch.float32
    dtype = torch.bfloat16 if low else case.dtype
    of_gradients = 2**-11 if case.precision == "tf32" else DTYPE_STEP[dtype]
    exact = case.precision in ("fp32", "mixed")
    of_values = 2**-24 if exact else of_gradients
    got, want = run(made), answer(made, torch.float64)
    # scores are products of rounded operands, summed in float32 at least
    eager = answer(made, torch.float32), answer(made, dtype)
    for i, name in enumerate(NAMES):
        if name == "hardest":
            assert not exact or torch.equal(got[i], want[i]), case.name
            continue
        value = i < 4
        step = of_values if value else of_gradients
        if case.rule == "sface":  # sigmoid' <= 1/4 of k times the angle's own error, 3e-7
            step += case.params[0] / 4 * 3e-7 / STEPS
        beside = eager[0 if value and exact else 1][i]
        close(got[i], want[i], beside, step, f"{case.name}: {name}")
    assert got[0].dtype == got[1].dtype == torch.float64 and got[3].dtype == torch.float32
    assert got[4].dtype == made.args["x"].dtype and got[5].dtype == case.dtype
    if case.classes:
        compact = run(made, compact=True)
        rows = made.args["classes"][:, None] * case.centers + torch.arange(case.centers)
        assert torch.equal(compact[4], got[4])
        assert torch.equal(compact[5], got[5][rows.flatten()])
        others = torch.ones(len(got[5]), dtype=torch.bool)
        others[rows.flatten()] = False
        assert not got[5][others].any()


@pytest.mark.parametrize("case", CASES + LOW + PRECISIONS, ids=lambda c: c.name)
def test_class_rules(case: Case) -> None:
    check(case)


def test_more_partial_results_than_a_merge_reads_at_once() -> None:
    made = call(Case(n=5, c=1100, d=16, params=(16.0,)))
    got, want = form.forward(ClassInputs(**made.args)), answer(made, torch.float64)
    error = (got.statistics - want[0]).abs().max()
    assert error <= 24 * 16 * 2**-24  # a rounding of each of 16 products of at most 16, and sums
    assert torch.equal(got.hardest, want[2])


SEVERAL = [
    Case(n=75, c=203, d=40, many=2, **SUMMED),
    Case(n=75, c=203, d=40, classes=131, **BEST, **SPHERE),
]


@pytest.mark.parametrize("case", SEVERAL, ids=("classes", "centres"))
def test_segments_chunks_and_row_blocks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is one piece at these sizes, cut into several ragged ones."""
    whole = run(call(case))
    monkeypatch.setattr(form, "PARTIAL_BYTES", 4 * 5 * 75 * 3)
    monkeypatch.setattr(triton_chunks, "ROW_BLOCK", 32)
    monkeypatch.setattr(triton_chunks, "MAX_CHUNK", 64)
    check(case)
    for one, other in zip(whole, run(call(case)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", (dict(many=2), SFACE, SPHERE, SOFT, BEST), ids=str)
def test_nan_in_a_row_stays_in_that_row(more: dict[str, Any]) -> None:
    case = Case(edit="nan row", **more)
    bad = torch.arange(case.n) == case.n // 3
    got, clean = run(call(case)), run(call(replace(case, edit="")))
    assert torch.equal(got[0][:, ~bad], clean[0][:, ~bad]) and got[0][:, bad].isnan().all()
    for i in (2, 3, 4):
        assert torch.equal(got[i][~bad], clean[i][~bad])
    assert got[4][bad].isnan().any()


def test_only_what_is_needed_is_computed() -> None:
    made = call(Case(**BEST))
    p, whole = ClassInputs(**made.args), run(made)
    given = made.of_statistics, made.of_targets, whole[0], p, False
    for need_x, need_weight in ((True, False), (False, True), (False, False)):
        dx, dweight = form.backward(*given, need_x, need_weight)
        assert torch.equal(dx, whole[4]) if need_x else dx.numel() == 0
        assert torch.equal(dweight, whole[5]) if need_weight else dweight.numel() == 0


@pytest.mark.parametrize("rows, classes", ((0, None), (0, 5), (9, 0)))
def test_no_rows_or_no_classes(rows: int, classes: int | None) -> None:
    made = call(Case(n=9, many=2, **SUMMED, **BEST))
    args = made.args | dict(values=None)
    args["x"], args["labels"] = args["x"][:rows], torch.full((rows, 2), -1)
    if classes is not None:
        args["classes"] = torch.arange(classes)
    p = ClassInputs(**args)
    out = form.forward(p)
    assert out.statistics.shape == (2, rows) and out.targets.shape == (rows, 2)
    assert torch.equal(out.statistics[0], torch.full((rows,), -torch.inf, dtype=torch.float64))
    assert not out.statistics[1].any() and out.hardest.tolist() == [-1] * rows
    given = torch.ones(2, rows), torch.ones(rows, 2), out.statistics, p
    dx, dweight = form.backward(*given, True, True, True)
    assert dx.shape == args["x"].shape and not dx.any()
    assert dweight.shape == (len(p.weight) if classes is None else 3 * classes, 24)
    assert not dweight.any()


def test_label_out_of_range() -> None:
    args = call(Case()).args
    args["labels"][3] = 53
    with pytest.raises(IndexError, match=r"labels: expected class ids in \[0, 53\)"):
        form.forward(ClassInputs(**args))


def test_offsets_past_two_to_the_31() -> None:
    near = torch.nn.functional.normalize(torch.randn(3, 16)).half()
    labels, up = torch.tensor([[0], [2], [-1]]), torch.ones(1, 3)
    results = []
    for rows in (near, far_rows(near)):
        p = ClassInputs(rows, rows, labels, params=[4.0])
        out = form.forward(p)
        results.append((*out, *form.backward(up, torch.ones(3, 1), out[0], p, False, True, True)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- a rule is its twin in rules.py --------------------------------------------------------------


@triton.jit
def rule_kernel(c, numbers, params, out, RULE: tl.constexpr, BENT: tl.constexpr, N: tl.constexpr):
    """Terms and slopes of N cosines, as the kernels call them."""
    at = tl.arange(0, N)
    score = tl.load(c + at)[:, None]
    v0 = tl.load(numbers + 4 * at)[:, None]
    v1 = tl.load(numbers + 4 * at + 1)[:, None]
    v2 = tl.load(numbers + 4 * at + 2)[:, None]
    v3 = tl.load(numbers + 4 * at + 3)[:, None]
    one, two = terms(score, (v0, v1, v2, v3), params, RULE, BENT)
    tl.store(out + at[:, None], one)
    tl.store(out + N + at[:, None], two)
    one, two = slopes(score, (v0, v1, v2, v3), params, RULE, BENT)
    tl.store(out + 2 * N + at[:, None], one)
    tl.store(out + 3 * N + at[:, None], two)


# a rule's params, and how far float32 moves its terms where a cosine moves by a rounding
RULES = {
    "softmax": [((64.0,), 64.0)],
    "summed_softmax": [((64.0,), 64.0)],
    # sigmoid' <= 1/4 of k times the angle's own error, which the polynomial bounds by 3e-7
    "sface": [((80.0, 1.23), 2 + 80 / 4 * 3e-7 * 2**24), ((1.0, 0.5), 8.0)],
    "sphereface2": [((40.0, 0.4, 3.0, 0.0), 120.0), ((40.0, 0.4, 1.0, 1.0), 120.0)],
}


def test_rules_are_all_here() -> None:
    assert set(RULES) == KERNEL_RULES


@pytest.mark.parametrize("bend", (False, True))
@pytest.mark.parametrize("rule", RULES)
def test_rules_are_those_of_python(rule: str, bend: bool) -> None:
    fold = CLASS_FOLDS[rule]
    if bend and 4 not in fold.values:
        return
    edges = [-1.0, 1.0, -1 - 1e-6, 1 + 1e-6, 0.0, 0.5, -0.5, 1e-20, 1 - 2**-23, -1 + 2**-23]
    edges += [0.5 + 2**-24, -0.5 - 2**-24]
    n = 256
    c = torch.cat([torch.tensor(edges), torch.linspace(-1, 1, n - len(edges))])
    values = torch.zeros(4, n)
    if bend:
        values = torch.stack([torch.full((n,), 0.25), torch.rand(n), torch.rand(n), torch.rand(n)])
    elif rule == "sphereface2":
        values[0] = torch.randn(n)
    given = values[: 4 if bend else max(1, *fold.values) if rule == "sphereface2" else 0]
    wide = given.double()[:, :, None] if len(given) else None
    for params, steep in RULES[rule]:
        out = torch.empty(4, n)
        packed = values.T.contiguous()
        rule_kernel[(1,)](c, packed, Params.of(list(params)), out, rule, bend, n)
        score = c.double()[:, None]
        want = [*fold.terms(score, wide, list(params)), *fold.slopes(score, wide, list(params))]
        kinds = len(fold.kinds)
        got = [*out[:kinds], *out[2 : 2 + kinds]]
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            w = torch.as_tensor(w, dtype=torch.float64).expand(n, 1)[:, 0]
            # a slope moves with its own steepness: of sphereface2 a scale more
            allowed = 4 * steep * 2**-24 * (steep if i >= kinds and rule == "sphereface2" else 1)
            error = (g.double() - w).abs()
            assert (error <= allowed + 8 * 2**-24 * w.abs()).all(), (params, i, error.max())


# ---- shards, the op, losses ----------------------------------------------------------------------


@pytest.mark.parametrize("more", (SUMMED, SFACE, STRAIGHT), ids=("softmax", "sface", "sphere"))
def test_shards_merge_to_the_whole(more: dict[str, Any]) -> None:
    made = call(Case(many=2, c=60, **BEST, **more))
    p = ClassInputs(**made.args)
    whole, kinds = run(made), CLASS_FOLDS[p.rule].kinds
    found, dx, dweight = None, 0, []
    parts = []
    for start, stop in ((0, 8), (8, 8), (8, 60)):
        labels = torch.where((p.labels >= start) & (p.labels < stop), p.labels - start, -1)
        part = p._replace(weight=p.weight[3 * start : 3 * stop], labels=labels)
        out = class_statistics(part, backend="triton").statistics
        found = out if found is None else merge_statistics(kinds, found, out)
        parts.append(part)
    torch.testing.assert_close(found, whole[0], rtol=1e-6, atol=1e-6)
    for part in parts:
        given = class_gradients(part, found, made.of_statistics, made.of_targets, backend="triton")
        dx, dweight = dx + given[0], [*dweight, given[1]]
    torch.testing.assert_close(dx, whole[4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(dweight), whole[5], rtol=1e-5, atol=1e-5)


def test_op_is_registered() -> None:
    made = call(Case(many=2, **SOFT, **SOME))
    p = ClassInputs(**made.args)
    torch.library.opcheck(CLASS_RULES.op("triton"), (*p, 0))
    found = CLASS_RULES.op("triton")(*p, 0)
    up = made.of_statistics, made.of_targets, found[0], found[-1]
    torch.library.opcheck(CLASS_RULES.op("triton", "_backward"), (*up, *p, True, True, True, False))


LOSSES = {
    "SFace": SFace(),
    "SphereFace2": SphereFace2(0.3),
    "MLCD": MLCD(16.0),
    "SoftTriple": SoftTriple(),
    "Softmax": Softmax(scale=16.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_run_on_it(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(20, 16, generator=g), torch.randn(30, 2, 16, generator=g)
    labels = torch.randint(30, (20, 2), generator=g)
    wide = [t.double().requires_grad_() for t in (x, w)]
    want = class_loss(*wide, labels, LOSSES[name], backend="reference")
    near = [t.requires_grad_() for t in (x, w)]
    got = class_loss(*near, labels, LOSSES[name], backend="triton")
    # the scale of 64 and k = 80 enlarge the rounding of cosines
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    for a, b in zip(torch.autograd.grad(got, near), torch.autograd.grad(want, wide), strict=True):
        assert (a.double() - b).norm() <= 1e-4 * b.norm()


def test_plan_is_that_of_the_form() -> None:
    x, w = torch.randn(64, 32), torch.randn(500, 3, 32)
    labels = torch.randint(500, (64,))
    plan = explain(class_loss, x, w, labels, Softmax(), backend="triton")
    assert plan.backend == "triton"
    p = ClassInputs(x, w.flatten(0, 1), labels[:, None], params=[64.0], centers=3)
    for needs in (None, ClassNeeds(False, True, True, False)):
        told = CLASS_RULES.workspace(
            "triton", "" if needs is None else "_backward",
            (*p, 0) if needs is None else (x, x, x, x, *p, *needs),
        )  # fmt: skip
        assert told == form.workspace(p, needs) > 0

"""A head's distillation against literal formulas on whole matrices, on one rank and on two."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import torch
from counted import COUNTER, told_by_child
from head_distillation import (
    CASES,
    FAULTS,
    NEAR,
    SGD,
    UPDATES,
    all_found,
    batch,
    found,
    head,
    literal,
    literally_near,
    literally_trained,
    near,
    teacher_head,
    trained,
)
from torch import Tensor

from fused_losses.centers import ClassCenters


def same(found: Tensor, expected: Tensor, name: str, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
    )


def check(got: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        same(got[key], value, f"{name}, {key}")


def check_near(kind: str, loss: Tensor, dx: Tensor) -> None:
    """The bars of `distillation`: 1e-3 of the value; of a gap some 1e-7 / 1e-3 are roundings."""
    expected, of_x = literally_near(kind)
    assert 0 < float(expected) < 1e-2
    assert abs(float(loss) / float(expected) - 1) < 1e-3, (kind, loss, expected)
    assert float((dx - of_x).norm() / of_x.norm()) < 1e-3, kind


@pytest.mark.parametrize("name", CASES)
def test_is_the_formula(name: str) -> None:
    check(found(0, name), literal(name), name)


@pytest.mark.parametrize("update", UPDATES)
def test_rows_step_as_in_torch(update: str) -> None:
    same(trained(0, update), literally_trained(update), update)


@pytest.mark.parametrize("kind", NEAR)
def test_near_agreement_keeps_its_digits(kind: str) -> None:
    check_near(kind, *near(kind))
    for each in near(kind, 0.0):
        assert not bool(each.any()), kind  # teacher = student


@pytest.mark.slow
@pytest.mark.processes
def test_two_ranks_are_one_process() -> None:
    ranks: list[dict[str, Any]] = processes.run(2, all_found)
    first, second = ranks
    for name in CASES:
        whole = {key: torch.cat([each[name][key] for each in ranks]) for key in ("dx", "dw")}
        for each in ranks:
            check({**each[name], **whole}, literal(name), name)
    for update in UPDATES:
        rows = torch.cat([each["trained"][update] for each in ranks])
        same(rows, literally_trained(update), update)
    for kind in NEAR:
        (loss, dx), (again, none) = (each["near"][kind] for each in ranks)
        assert torch.equal(loss, again) and not len(none)
        check_near(kind, loss, dx)
    refused = dict(zip(FAULTS, zip(first["refused"], second["refused"], strict=True), strict=True))
    said = "RuntimeError: rank 1 refused its batch; its own error says why"
    assert refused["gradient"][0] == refused["width"][0] == said
    assert refused["gradient"][1].startswith("ValueError: teacher_weight: expected a teacher with")
    assert refused["width"][1].startswith("ValueError: teacher: expected [n, 5]")
    for each in (*refused["kinds"], *refused["labels"]):
        assert each.startswith("ValueError: distillation: expected the same call on all ranks")


# ---- the life of a head -------------------------------------------------------------------------


def asked(made: ClassCenters, **options: Any) -> tuple[Tensor, Tensor]:
    """Rows that need a gradient, and the loss."""
    whole = batch()
    x = whole.x.clone().requires_grad_()
    return x, made.distillation(x, whole.t, whole.table, **options)


def test_frozen_or_in_eval_mode_the_rows_alone_have_a_gradient() -> None:
    for quiet in (lambda h: h.eval(), lambda h: h.requires_grad_(False)):
        made = head("kl", optimizer="sgd", optimizer_options=SGD)
        keys, before = made.state_dict().keys(), made.weight.clone()
        quiet(made)
        x, loss = asked(made)
        loss.backward()
        assert x.grad is not None and bool(x.grad.any())
        assert torch.equal(made.weight, before) and made.step_count == 0
        assert made.state_dict().keys() == keys
        with torch.no_grad():
            assert torch.equal(asked(made)[1], loss)


@pytest.mark.parametrize("broken", ["teacher", "table"])
@pytest.mark.parametrize("kind", ["kl", "jsd", "mse"])
def test_what_is_not_finite_changes_no_row(kind: str, broken: str) -> None:
    made = head("kl", optimizer="sgd", optimizer_options=SGD)
    whole, before = batch(), made.weight.clone()
    (whole.t if broken == "teacher" else whole.table)[4, 2] = torch.nan
    loss = made.distillation(whole.x, whole.t, whole.table, kind=kind)
    with pytest.raises(FloatingPointError, match="no row was changed"):
        loss.backward()
    assert torch.equal(made.weight, before)


def test_an_ignored_rows_nan_reaches_nothing() -> None:
    whole, results = batch(), []
    for value in (0.0, torch.nan):
        made, t = head("kl"), whole.t.clone()
        t[2] = value  # of the row that is ignored
        loss = made.distillation(whole.x, t, whole.table, labels=whole.labels)
        loss.backward()
        results.append((loss.detach(), made.weight.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_positions_and_autocast() -> None:
    whole = batch()
    made = ClassCenters(len(whole.table), 6, scale=4.0)
    x, t, y = whole.x.float(), whole.t.float(), whole.labels
    flat = made.distillation(x, t, whole.table.float(), labels=y)
    with torch.autocast("cpu", torch.bfloat16):
        deep = made.distillation(
            x.view(3, 3, -1), t.view(3, 3, -1), whole.table.float(), labels=y.view(3, 3)
        )
    assert torch.equal(flat, deep)


def test_a_teacher_that_changes_before_backward_is_refused() -> None:
    made, whole = head("kl"), batch()
    loss = made.distillation(whole.x, whole.t, whole.table)
    whole.table.mul_(2)
    with pytest.raises(RuntimeError, match="teacher_weight: expected the values of the forward"):
        loss.backward()


def test_bad_arguments_are_named() -> None:
    made, whole = head("kl"), batch()
    x, t, w = whole.x, whole.t, whole.table
    learning = teacher_head().requires_grad_()
    small = ClassCenters(7, 5, dtype=torch.float64).requires_grad_(False)
    bad: list[tuple[str, Tensor, Any, dict[str, Any]]] = [
        ("kind: expected one of kl", t, w, dict(kind="other")),
        ("temperature: expected a value > 0, got 0", t, w, dict(temperature=0.0)),
        ("temperature: expected a value > 0, got -1", t, w, dict(temperature=-1.0)),
        ("temperature: expected a number, got a tensor that asks", t, w,
         dict(temperature=torch.tensor(2.0, requires_grad=True))),
        ("alpha: expected None with kind='kl'", t, w, dict(alpha=0.5)),
        ("labels: expected one class id a row with kind='dkd', got None", t, w, dict(kind="dkd")),
        ("teacher: expected a teacher without gradient", t.clone().requires_grad_(), w, {}),
        ("teacher_weight: expected a teacher without", t, w.clone().requires_grad_(), {}),
        ("teacher: expected 9 rows as embeddings has", t[:4], w, {}),
        (r"teacher_weight: expected the 23 classes of this rank's shard, \[0, 23\)", t, w[:9], {}),
        (r"teacher: expected \[n, 5\] as teacher_weight has", x, w, {}),
        ("teacher: expected float64 where the table is", t.float(), w, {}),
        ("teacher_weight: expected the dtype of the head's table", t, w.float(), {}),
        (r"teacher_weight: expected a tensor \[c, Dt\]", t, None, {}),
        (r"teacher_bias: expected shape \(23,\)", t, w, dict(teacher_bias=w[:3, 0])),
        ("teacher_scale: expected a value > 0", t, w, dict(teacher_scale=0.0)),
        ("teacher_weight: expected a frozen head", t, learning, {}),
        ("teacher_weight: expected a head of {'num_classes': 23", t, small, {}),
        ("teacher_scale: expected None beside a ClassCenters", t, teacher_head(),
         dict(teacher_scale=2.0)),
    ]  # fmt: skip
    for message, rows, weight, options in bad:
        with pytest.raises((ValueError, TypeError), match=message):
            made.distillation(x, rows, weight, **options)
    with pytest.raises(ValueError, match="sub_centers: expected 1"):
        head("kl", sub_centers=2).distillation(x, t, w)


# ---- memory -------------------------------------------------------------------------------------

CHILD = (
    COUNTER
    + """
from fused_losses.centers import ClassCenters

def made(classes, kind, **options):
    head = ClassCenters(classes, 64, chunk_bytes=1 << 20, **options)
    x, y = torch.randn(32, 64, requires_grad=True), torch.randint(0, classes, (32,))
    t, wt = torch.randn(32, 48), torch.randn(classes, 48)
    def step():
        head.distillation(x, t, wt, labels=y, kind=kind).backward()
    step()
    return extra(step)

sgd = dict(optimizer="sgd", optimizer_options=dict(lr=0.1, momentum=0.9))
print(json.dumps({kind: [made(c, kind, **sgd) for c in (20_000, 80_000)]
                  for kind in ("kl", "jsd", "dkd")}))
"""
)


@pytest.mark.slow
def test_memory_knows_no_classes() -> None:
    for kind, (small, large) in told_by_child(CHILD, None).items():
        assert large < 12 << 20, (kind, large)  # scores of both sides and a gradient: 20 MB each
        assert large - small < 1 << 20, (kind, small, large)

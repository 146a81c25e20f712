"""Which rows of a distillation are NaN: one with NaN or inf, and every row by a class with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BACKENDS

from fused_losses import TopTeacher
from fused_losses.functional import distillation
from fused_losses.functions.distillation_kinds import KINDS
from fused_losses.functions.top_teacher import TOP_KINDS

N, C, D = 6, 40, 5
FAULTS = (torch.nan, torch.inf, -torch.inf)


def given() -> dict[str, torch.Tensor]:
    shapes = {
        "student": (N, D),
        "student_weight": (C, D),
        "teacher": (N, D),
        "teacher_weight": (C, D),
        "student_bias": (C,),
        "teacher_bias": (C,),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def spoilt(values: dict[str, torch.Tensor], **more: Any) -> list[bool]:
    labels = torch.arange(N)
    labels[2] = -100
    return distillation(**values, labels=labels, reduction="none", **more).isnan().tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", BACKENDS)
def test_a_number_spoils_its_row_and_a_class_all(kind: str, form: str) -> None:
    more = dict(kind=kind, backend=form)
    every = [i != 2 for i in range(N)]
    for number, name in enumerate(given()):
        values = given()
        of_row = values[name].shape[0] == N
        # the row and the class in the middle of a tile
        values[name].view(values[name].shape[0], -1)[4 if of_row else 17, -1] = FAULTS[number % 3]
        assert spoilt(values, **more) == ([i == 4 for i in range(N)] if of_row else every), name
        ids = torch.arange(C)
        if not of_row:  # a class that takes no part says nothing
            assert not any(spoilt(values, classes=ids[ids != 17], **more)), name


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", BACKENDS)
def test_dense_scores(fault: float, form: str) -> None:
    values = {name: v for name, v in given().items() if name in ("student", "student_weight")}
    scores = torch.randn(N, C)
    scores[4, 17] = scores[2, 1] = fault
    for kind in KINDS:
        more = dict(kind=kind, backend=form, teacher=scores)
        assert spoilt(values, **more) == [i == 4 for i in range(N)], kind
        assert not any(spoilt(values, classes=torch.arange(16), **more)), kind


@pytest.mark.parametrize("kind", TOP_KINDS)
@pytest.mark.parametrize("form", BACKENDS)
def test_top_teacher(kind: str, form: str) -> None:
    top = TopTeacher(torch.arange(3).expand(N, 3), torch.randn(N, 3))
    more = dict(kind=kind, backend=form, teacher=top)
    for number, name in enumerate(("student", "student_weight", "student_bias")):
        values = {key: v for key, v in given().items() if key.startswith("student")}
        of_row = name == "student"
        # no class of the list
        values[name].view(values[name].shape[0], -1)[4 if of_row else 17, -1] = FAULTS[number]
        wanted = [i == 4 if of_row else i != 2 for i in range(N)]
        assert spoilt(values, **more) == wanted, name

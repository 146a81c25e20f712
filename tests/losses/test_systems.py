"""The papers' systems: each has what it is built of, and every recipe runs as it stands."""

from __future__ import annotations

import re

import pytest
import torch
from places import ROOT

import fused_losses
from fused_losses import losses, margins, metrics
from fused_losses.losses.systems import SYSTEMS

PAGE = (ROOT / "docs" / "recipes.md").read_text()
RECIPES = {
    part.splitlines()[0].strip(): re.findall(r"```python\n(.*?)```", part, re.S)
    for part in PAGE.split("\n## ")[1:]
}
ROOMS = {"metrics": metrics, "margins": margins}


def test_all_systems_stand_here_once() -> None:
    assert len(SYSTEMS) == 73
    assert len({s.title for s in SYSTEMS}) == 73


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.title[:30])
def test_a_system_has_what_it_is_built_of(system: fused_losses.losses.System) -> None:
    assert system.modules or system.functions or system.recipe
    known = {e.name for e in losses.catalogue()}
    assert set(system.modules) <= known
    for name in system.functions:
        room, _, last = name.rpartition(".")
        assert hasattr(ROOMS.get(room, fused_losses), last), name
    assert not system.recipe or system.recipe in RECIPES


def test_every_recipe_is_some_system_s() -> None:
    assert {s.recipe for s in SYSTEMS if s.recipe} == set(RECIPES)


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_runs(title: str) -> None:
    (code,) = RECIPES[title]
    assert len(code.splitlines()) <= 14, "a recipe is ten lines beside its imports"
    torch.manual_seed(0)
    exec(compile(code, title, "exec"), {})

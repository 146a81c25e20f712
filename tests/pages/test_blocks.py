"""Every block of code that people read, as it stands: Python runs, commands exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import documents
import pytest
import torch
from places import ROOT

from fused_losses import cli
from fused_losses.train import cli as train_cli

ALL = [block for page in documents.PAGES for block in documents.blocks(page)]
# tests/losses/test_systems.py runs the recipes, each with what it is a recipe of
PYTHON = [b for b in ALL if b.language == "python" and b.page.name != "recipes.md"]
SHELL = [b for b in ALL if b.language in ("sh", "bash")]
# commands that are not this project's: what they do is not run here
FOREIGN = ("apt-get", "pip", "python", "python3", "torchrun", "git", "import", "x", "print")


def test_every_block_is_of_a_language_that_is_checked() -> None:
    known = ("python", "sh", "bash", "text")
    assert [b.place for b in ALL if b.language not in known] == []


@pytest.mark.parametrize("block", PYTHON, ids=lambda b: b.place)
def test_a_block_runs_alone(
    block: documents.Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSED_LOSSES_CACHE", str(tmp_path))
    before = torch.get_float32_matmul_precision()
    space: dict[str, object] = {"__name__": "__main__"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.code, block.place, "exec"), space)
    finally:
        torch.set_float32_matmul_precision(before)
        for value in space.values():
            if hasattr(value, "undo"):  # an acceleration of another library's classes
                value.undo()


def commands(block: documents.Block) -> list[str]:
    """The lines of a shell's block, those that go on joined, without what is quoted or told."""
    text = re.sub(r'"[^"]*"', "''", block.code.replace("\\\n", " "), flags=re.DOTALL)
    return [
        line for line in (re.sub(r"(^| )#.*", "", t).strip() for t in text.splitlines()) if line
    ]


@pytest.mark.parametrize("block", SHELL, ids=lambda b: b.place)
def test_a_command_exists(block: documents.Block) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(block):
        words = [w for w in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", w)]
        if not words:
            continue
        if words[0] == "make":
            assert set(words[1:]) <= targets, line
        elif words[0] == "fused-losses":
            cli.parser(train_cli.recipe(words[1:])).parse_args(words[1:])
        else:
            assert words[0] in FOREIGN, line

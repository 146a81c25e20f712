"""The glyph recipe learns, goes on after a stop, compares heads, and says what is wrong."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import drawn_glyphs
import pytest
import torch
from drawn_glyphs import LATIN_GREEK_CYRILLIC

from fused_losses.datasets.glyphs import Glyphs, hold_out
from fused_losses.train import Interrupted
from fused_losses.train.frame.options import given_options
from fused_losses.train.glyphs import GlyphConfig, cli, compare, train
from fused_losses.train.glyphs import loop as loops
from fused_losses.train.glyphs.compare import COMPARED, options
from fused_losses.train.glyphs.model import Changes, change, normalize

comparing = sys.modules["fused_losses.train.glyphs.compare"]  # the package names its function so
# fixtures of these tests
cache, fonts, glyphs = drawn_glyphs.cache, drawn_glyphs.fonts, drawn_glyphs.glyphs


@pytest.fixture
def tiny(fonts: Path) -> GlyphConfig:
    return GlyphConfig(
        fonts=str(fonts),
        characters=LATIN_GREEK_CYRILLIC,
        held_out="STIX",
        embedding=32,
        batch_size=64,
        steps=6,
        subset=0,
        threads=1,
    )


def test_pictures_change_as_fonts_do(glyphs: Glyphs) -> None:
    pictures = glyphs.read(range(40))
    one, two = (change(pictures, Changes(), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == pictures.shape and one.isfinite().all()
    assert not torch.equal(one, change(pictures, Changes(), torch.Generator().manual_seed(4)))
    still = Changes(0, 0, 0, 0, 0)
    unchanged = change(pictures, still, torch.Generator())
    torch.testing.assert_close(unchanged, normalize(pictures), atol=1e-3, rtol=0)
    # ink to the power of less than one is bolder
    bold = change(pictures, Changes(0, 0, 0, 5.0, 0), torch.Generator().manual_seed(0))
    bolder, thinner = (
        (bold > unchanged + 0.1).any((1, 2, 3)),
        (bold < unchanged - 0.1).any((1, 2, 3)),
    )
    assert bolder.any() and thinner.any() and not (bolder & thinner).any()


def test_it_learns_and_writes_its_record(tiny: GlyphConfig, glyphs: Glyphs, tmp_path: Path) -> None:
    config = tiny.with_changes(steps=50, classes=100, queries=90, subset=60, subset_steps=8)
    result = train(config, tmp_path, quiet=True, glyphs=glyphs)
    assert result == json.loads((tmp_path / "result.json").read_text())
    curves = json.loads((tmp_path / "curves.json").read_text())["loss"]
    assert sum(curves["trained"][-5:]) < 0.8 * sum(curves["trained"][:5])
    assert result["recall_at_1"] > result["untrained"]["recall_at_1"] + 0.1
    assert result["recall_at_1_of_centres"] > result["untrained"]["recall_at_1_of_centres"] + 0.1
    assert result["gallery"] == result["classes"] == 100 and result["queries"] == 90
    assert result["step_ms"] > result["head_ms"] > 0 and result["peak_memory_mib"] > 0
    assert result["data"]["held_out"] == ["STIXGeneral"]
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert not (tmp_path / "checkpoint.pt").exists()
    # the same pictures, network and table: both heads differ by rounding, which steps amplify
    assert result["subset"]["classes"] == result["reference"]["classes"] == 60
    torch.testing.assert_close(
        torch.tensor(curves["subset"][:6]), torch.tensor(curves["reference"][:6]), rtol=1e-3, atol=0
    )
    with pytest.raises(ValueError, match="holds a run"):
        train(config, tmp_path, quiet=True, glyphs=glyphs)


@pytest.mark.parametrize(
    ("changes", "rounding"),
    # a checkpoint catches up the rows that a sampled head left behind, which rounds otherwise
    [
        ({}, 0.0),
        ({"sample_rate": 0.3, "log_q": True}, 1e-5),
        ({"head": "reference"}, 0.0),
        ({"head": "spherical", "head_momentum": 0.0, "margin": "none"}, 0.0),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not(
    changes: dict,
    rounding: float,
    tiny: GlyphConfig,
    glyphs: Glyphs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny.with_changes(classes=100, **changes)
    train(config, tmp_path / "whole", quiet=True, glyphs=glyphs)
    true = loops.GlyphTraining.step

    def step(self: loops.GlyphTraining) -> float:
        loss = true(self)
        if self.done == 3 and len(self.split.train.names) > loops.WARM_UP_CLASSES:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(loops.GlyphTraining, "step", step)
        train(config, tmp_path / "parts", quiet=True, glyphs=glyphs)
    with pytest.raises(ValueError, match="scale: the run has 32.0, asked for 5.0"):
        other = config.with_changes(scale=5.0)
        train(other, tmp_path / "parts", resume=True, quiet=True, glyphs=glyphs)
    train(config, tmp_path / "parts", resume=True, quiet=True, glyphs=glyphs)
    whole, parts = (
        json.loads((tmp_path / name / "curves.json").read_text())["loss"]["trained"]
        for name in ("whole", "parts")
    )
    assert len(parts) == config.steps and parts[:3] == whole[:3]
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=rounding, atol=0)


@pytest.mark.slow
def test_heads_are_compared_in_their_own_processes(
    tiny: GlyphConfig, glyphs: Glyphs, tmp_path: Path
) -> None:
    config = tiny.with_changes(steps=3)
    found = compare(config, tmp_path, quiet=True, heads=("full",))
    assert list(found) == ["full"]
    assert json.loads((tmp_path / "compare.json").read_text()) == found
    one = found["full"]
    assert one["classes"] == hold_out(glyphs, "STIX").train.classes
    assert one["subset"] is None and one["step_ms"] > 0 and one["peak_memory_mib"] > 0
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert len(lines) == 3 and lines[2].startswith("| full |")
    assert (tmp_path / "compare.png").stat().st_size > 0


@pytest.mark.processes
def test_a_signal_to_a_comparison_reaches_the_head_under_way(
    tiny: GlyphConfig, glyphs: Glyphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = comparing._status
    log = tmp_path / "heads" / "full" / "log.jsonl"

    def status(child: subprocess.Popen[bytes]) -> int | None:
        if log.exists() and log.read_text():
            signal.raise_signal(signal.SIGINT)
        return real(child)

    monkeypatch.setattr(comparing, "_status", status)
    with pytest.raises(Interrupted) as stopped:
        compare(tiny.with_changes(steps=5000), tmp_path, quiet=True, heads=("full",))
    assert stopped.value.signal == signal.SIGINT
    assert (log.parent / "checkpoint.pt").exists() and not (log.parent / "result.json").exists()


def test_the_heads_compared_differ_in_what_they_say(tiny: GlyphConfig) -> None:
    made = {name: tiny.with_changes(**changes) for name, changes in COMPARED.items()}
    assert len(set(made.values())) == len(made) == 6
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    for config in made.values():
        # what a head's process is told is what is compared
        args = parser.parse_args(options(config))
        assert GlyphConfig(**given_options(args, GlyphConfig)) == config


def test_the_command_line_says_what_is_wrong(
    fonts: Path, glyphs: Glyphs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--runs", str(tmp_path), "--quiet"]
    assert cli.main([*run, "--characters", "zz"]) == 2
    assert "--characters: expected ranges such as 21-17f, got 'zz'" in capsys.readouterr().err
    assert cli.main([*run, "--resume"]) == 2
    assert "--name: expected the run to go on with" in capsys.readouterr().err
    assert cli.main([*run, "--name", "typo", "--resume"]) == 2
    assert "--resume: expected a run to go on with" in capsys.readouterr().err
    assert cli.main([*run, "--head", "reference", "--sample-rate", "0.5"]) == 2
    assert "the reference takes every class" in capsys.readouterr().err
    assert cli.main([*run, "--head", "spherical"]) == 2
    assert "--head-momentum: expected 0 of spherical, got 0.9" in capsys.readouterr().err
    spherical = ["--head", "spherical", "--head-momentum", "0"]
    assert cli.main([*run, *spherical]) == 2
    assert "--margin: expected none of spherical, got cosface" in capsys.readouterr().err
    assert cli.main([*run, *spherical, "--margin", "none", "--log-q"]) == 2
    assert "spherical takes every class" in capsys.readouterr().err
    words = ["--fonts", str(fonts), "--characters", LATIN_GREEK_CYRILLIC, "--steps", "2"]
    words += ["--subset", "0", "--threads", "1", "--batch-size", "8", "--embedding", "16"]
    words += ["--classes", "40"]
    assert cli.main([*run, *words]) == 0
    assert (tmp_path / "glyphs" / "result.json").exists()
    # what is not said again stays as it was
    assert cli.main([*run, "--name", "glyphs", "--resume"]) == 0
    assert cli.main([*run, *words]) == 0 and (tmp_path / "glyphs-2").is_dir()

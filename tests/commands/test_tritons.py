"""The table of Tritons that the kernels are held to."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from tools import tritons


def test_the_daily_one_is_among_them() -> None:
    pinned = (ROOT / "requirements-tested.txt").read_text()
    (daily,) = re.findall(r"^triton==([\d.]+)", pinned, re.MULTILINE)
    assert daily in tritons.versions()


def test_every_pytorch_from_the_oldest_to_the_daily_one_is_in_the_table() -> None:
    oldest, *_ = re.findall(r'"torch>=2\.(\d+)', (ROOT / "pyproject.toml").read_text())
    (daily,) = re.findall(r"^torch==2\.(\d+)", (ROOT / "requirements-tested.txt").read_text(), re.M)
    listed = {minor for row in tritons.versions().values() for minor in row}
    assert {f"2.{minor}" for minor in range(int(oldest), int(daily) + 1)} <= listed


def test_one_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given: list[dict[str, str]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        given.append(env)
        failed = "gate" in command
        told = "1 failed, 2 passed in 3s" if failed else "5 passed in 1s"
        return subprocess.CompletedProcess(command, int(failed), f"...\n{told}\n", "leaked\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(tritons, "installed", lambda version: tmp_path / version)
    assert tritons.main(["3.9.0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "triton 3.9.0 (torch 2.15), interpreted: 5 passed in 1s"
    assert lines[1] == "triton 3.9.0 (torch 2.15), compiled: 1 failed, 2 passed in 3s"
    # the asked for stands before the one that is installed
    assert all(env["PYTHONPATH"].startswith(str(tmp_path / "3.9.0")) for env in given)
    assert [env["TRITON_INTERPRET"] for env in given] == ["1", "0"]

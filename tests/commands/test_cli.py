"""The commands info, verify and bench (train has tests of its own)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fused_losses import backends, cli, verify
from fused_losses.bench import measure
from fused_losses.version import __version__


def test_info_says_what_runs_and_why_the_rest_does_not(capsys) -> None:
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert __version__ in told
    for name, state in backends.available().items():
        assert any(name in line and state in line for line in told.splitlines())


@pytest.mark.slow
def test_verify_checks_every_backend_that_can_run(capsys, tmp_path) -> None:
    out = tmp_path / "verify" / "table.md"
    assert cli.main(["verify", "--shape", "13,58,24", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "FAIL" not in told
    for name in ("cpu", "cuda", "bounded"):
        ran = any(f" {name} " in line and line.endswith("pass") for line in told.splitlines())
        assert ran or f"not checked: {name}" in told
    table = out.read_text()
    assert ", 0 failed." in table and "13x58x24 | pass |" in table and "FAIL" not in table


def test_verify_says_when_a_device_is_not_there(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["verify", "--device", "cuda"]) == 1
    assert "no cuda device" in capsys.readouterr().out


def test_verify_fails_when_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    right = verify.TABLE["linear_cross_entropy"]

    def wrong(*args, backend, precision):
        loss = right.function(*args, backend=backend, precision=precision)
        return loss if backend == "reference" else loss * 1.1

    monkeypatch.setattr(verify, "TABLE", {right.name: replace(right, function=wrong)})
    assert cli.main(["verify", "--shape", "7,13,8"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_bench_writes_table_record_and_plots(tmp_path, capsys) -> None:
    options = ["--case", "margin_softmax", "--shape", "16,300,32", "--rounds", "2", "--no-growth"]
    options += ["--out", str(tmp_path)]
    assert cli.main(["bench", *options]) == 0
    record = json.loads((tmp_path / "result.json").read_text())
    case = record["cases"][0]
    names = {result["name"] for result in case["results"]}
    assert {"fused fp32", "eager", "torch.compile", "F.linear_cross_entropy"} <= names
    assert all(len(r["times_ms"]) == 2 for r in case["results"] if r["error"] is None)
    assert [r["name"] for r in case["results"] if r["error"]] == []
    assert case["flops_floor"] == 4 * 2 * 16 * 300 * 32
    assert "| fused fp32 |" in (tmp_path / "table.md").read_text()
    assert list(tmp_path.glob("*.png"))


def test_a_ratio_is_the_median_of_paired_turns() -> None:
    ours = measure.Result("ours", [1.0, 2.0, 10.0])
    theirs = measure.Result("theirs", [3.0, 4.0, 100.0])
    assert measure.paired_ratio(ours, theirs) == 3.0


def test_an_unknown_command_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["dance"])
    assert stopped.value.code == 2

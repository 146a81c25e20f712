"""Every case of the benchmarks at a tiny size: each provider computes what ours does."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from fused_losses import cli
from fused_losses.bench import measure
from fused_losses.bench.micro.cases import Case
from fused_losses.bench.table import CASES

SIZES = {"n": 48, "d": 32}
TOKENS = {"q": 5, "lq": 4, "b": 7, "ld": 9, "d": 32}
OTHERS = {
    "maxsim": TOKENS,
    "maxsim_scores": TOKENS,
    "distillation": {"n": 16, "c": 300, "d": 32},
}
MAKERS = {name: e.make for name, e in CASES.items() if e.sizes == "pairs" or name in OTHERS}


def made(name: str, rivals: str) -> Case:
    return MAKERS[name](**OTHERS.get(name, SIZES), rivals=rivals)


@pytest.mark.parametrize("name", MAKERS)
def test_every_provider_agrees_with_ours(name: str) -> None:
    # compiled: below, for one of them
    case = made(name, "eager")
    results = measure.paired(case, 1)
    assert {r.name: r.error for r in results if r.error} == {}
    assert {"fused fp32", "eager"} <= {r.name for r in results}
    assert all(r.difference is not None and len(r.times_ms) == 1 for r in results)
    assert case.flops > 0 and case.bytes > 0
    assert all(leaf.grad is None for leaf in case.leaves)


def test_floors() -> None:
    n, d = SIZES.values()
    assert made("info_nce", "none").flops == 8 * n * n * d
    assert made("uniformity", "none").flops == 4 * n * n * d  # half the pairs
    assert made("info_nce", "none").bytes == 2 * (2 * n * d + 1) * 4
    assert made("info_nce", "none").gradients_mib == (2 * n * d + 1) * 4 / 2**20


@pytest.mark.slow
def test_bench_runs_a_case_with_its_compiled_rivals(
    tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    # traced and differentiated as any; Inductor's code for a rival is run in test_cli.py
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    options = ["--case", "info_nce", "--pairs", "48,32", "--rounds", "1", "--no-growth"]
    assert cli.main(["bench", *options, "--out", str(tmp_path)]) == 0
    (case,) = json.loads((tmp_path / "result.json").read_text())["cases"]
    kinds = ("eager", "torch.compile")
    wanted = {f"{k}{how}" for k in kinds for how in ("", ", oneDNN knob", ", autocast bf16")}
    assert wanted | {"fused fp32"} <= {r["name"] for r in case["results"]}
    assert list(tmp_path.glob("info_nce*.png"))


def loose_case(**providers) -> Case:
    leaf = torch.zeros(3, requires_grad=True)

    def step(factor: float) -> torch.Tensor:
        loss = (leaf * factor + 1).sum()
        loss.backward()
        return loss.detach()

    bound = {n: f if callable(f) else lambda f=f: step(f) for n, f in providers.items()}
    return Case("a case", bound, ["ours"], [leaf], 1.0, 1.0)


def test_a_failing_rival_is_reported() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no such thing")

    results = measure.paired(loose_case(ours=1.0, rival=broken), 2)
    assert results[0].error is None and len(results[0].times_ms) == 2
    assert results[1].error == "RuntimeError: no such thing" and not results[1].times_ms


@pytest.mark.parametrize("wrong", [1.1, math.nan])
def test_a_rival_that_computes_something_else_is_not_timed(wrong: float) -> None:
    ours, same, other = measure.paired(loose_case(ours=1.0, same=1.0, other=wrong), 1)
    assert ours.error is None and same.error is None and same.difference == 0
    assert "differs from same" in other.error and not other.times_ms


def test_ours_is_no_exception() -> None:
    wrong, right, more = measure.paired(loose_case(ours=1.1, eager=1.0, more=1.0), 1)
    assert "differs from eager by 1" in wrong.error and not wrong.times_ms
    assert right.error is None and more.error is None and right.times_ms
    # of ours and a rival as it is written, float64 says which is wrong
    case = loose_case(ours=1.0, eager=1.1)
    case.truth = lambda: [torch.tensor(3.0).double(), torch.ones(3).double()]
    ours, eager = measure.paired(case, 1)
    assert ours.error is None and ours.held_to == "float64" and ours.difference == 0
    assert "differs from float64" in eager.error and not eager.times_ms


def test_without_room_for_float64_the_rival_as_it_is_written_judges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = loose_case(ours=1.0, eager=1.0, compiled=1.0)
    case.truth = lambda: pytest.fail("there is no room")
    monkeypatch.setattr(measure, "free_bytes", lambda device: 0)
    assert {r.held_to for r in measure.paired(case, 1)} == {"eager"}
    # the first that can
    case = loose_case(**{"ours": 1.0, "eager": lambda: 1 / 0, "eager, autocast bf16": 1.0})
    ours, eager, low = measure.paired(case, 1)
    assert ours.held_to == low.held_to == "ours" and "ZeroDivisionError" in eager.error

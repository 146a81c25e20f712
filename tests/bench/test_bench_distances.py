"""Every case over distances, neighbours and mining at a tiny size, as test_bench_pairs.py."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_losses import cli
from fused_losses.bench import measure, report
from fused_losses.bench.micro.cases import Case
from fused_losses.bench.micro.peers import flat, peer
from fused_losses.bench.table import CASES

MAKERS = {n: e.make for n, e in CASES.items() if e.sizes in ("distances", "bank", "batch")}


def made(name: str, rivals: str = "eager") -> Case:
    bank = CASES[name].sizes == "bank"
    sizes = {"n": 9, "m": 300, "d": 24, "k": 5} if bank else {"n": 48, "d": 32}
    return MAKERS[name](**sizes, rivals=rivals)


@pytest.mark.parametrize("name", MAKERS)
def test_every_provider_agrees_with_ours(name: str) -> None:
    case = made(name)
    results = measure.paired(case, 2)
    errors = {r.name: r.error for r in results if r.error}
    # a peer may be there and not run with this torch
    assert not set(errors) - {"torchpairwise"}
    assert results[0].name == case.ours[0] and len(results[0].times_ms) == 2
    assert len(results) - len(errors) > len(case.ours)
    for r in results:
        if r.error is None:
            assert r.difference is not None
            assert len(r.times_ms) == max(1, min(2, case.turns.get(r.name, 2))), r.name
    assert case.flops > 0 and case.bytes > 0
    assert all(leaf.grad is None for leaf in case.leaves)
    assert all(measure.paired_ratio(results[0], r) > 0 for r in results if r.error is None)


def test_mined_indices_must_be_the_right_ones() -> None:
    case = made("batch_hard_mining")
    case.providers["another row"] = lambda: case.providers["fused"]().roll(1, dims=1)
    *_, other = measure.paired(case, 1)
    assert "differs from float64" in other.error and not other.times_ms


@pytest.mark.parametrize("name", ["topk", "topk_principal"])
def test_neighbours_must_be_the_right_ones(name: str) -> None:
    case = made(name)
    case.providers["others"] = lambda: case.providers["matmul + topk"]() + 1
    *_, other = measure.paired(case, 1)
    assert "differs from float64" in other.error and not other.times_ms


class FlatIndex:
    """What of faiss' indices is called."""

    def __init__(self, *_: int) -> None:
        self.rows = torch.empty(0)

    def add(self, rows: Any) -> None:
        self.rows = torch.from_numpy(rows)

    def search(self, queries: Any, k: int) -> tuple[Any, Any]:
        best = (torch.from_numpy(queries) @ self.rows.T).topk(k)
        return best.values.numpy(), best.indices.numpy()


def test_panorama_is_given_its_axes_or_left_out_with_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    x, y = torch.randn(5, 8), torch.randn(40, 8)
    axes = torch.linalg.qr(torch.randn(8, 8)).Q
    old = SimpleNamespace(
        IndexFlatIP=FlatIndex, omp_set_num_threads=lambda _: None, __version__="1.8.0"
    )
    (plain,) = flat(old, x, y, 3, axes).values()
    assert "without Panorama: faiss 1.8.0 has none" in capsys.readouterr().err
    turned: list[FlatIndex] = []

    def made(*sizes: int) -> FlatIndex:
        turned.append(FlatIndex(*sizes))
        return turned[0]

    new = SimpleNamespace(**vars(old), IndexFlatIPPanorama=made)
    found = flat(new, x, y, 3, axes)
    torch.testing.assert_close(found["faiss IndexFlatIPPanorama"](), plain())
    torch.testing.assert_close(turned[0].rows, y @ axes)


def test_errors_from_the_truth() -> None:
    case = made("euclidean_gradient")
    results = {r.name: r for r in measure.paired(case, 1)}
    value, gradient = results["fused fp32"].errors
    assert value < 1e-5 and gradient < 1e-5
    # near rows far from the origin: where products cancel
    assert results["torch.cdist, oneDNN knob"].errors[0] > 10 * value
    assert "from float64" in "\n".join(report.table(case, list(results.values())))


def test_floors() -> None:
    n, d = 48, 32
    assert made("cityblock", "none").flops == 2 * n * n * d
    assert made("cityblock", "none").bytes == 4 * n * n + 8 * n * d
    assert made("cityblock", "none").gradients_mib == 4 * n * n / 2**20
    assert made("cityblock_gradient", "none").gradients_mib == (4 * n * n + 8 * n * d) / 2**20
    assert made("batch_hard_mining", "none").flops == n * n * d  # half the pairs
    assert made("topk", "none").flops == 2 * 9 * 300 * 24
    principal = made("topk_principal", "none")  # the coordinates that are read of every pair
    assert principal.flops == 2 * 9 * 300 * 16 and "the 16 coordinates" in principal.flops_of


def test_a_slow_provider_is_timed_once() -> None:
    case = made("all_triplets")
    case.turns = {"eager": 0, "eager, oneDNN knob": 1}
    results = {r.name: r for r in measure.paired(case, 3)}
    turns = {name: len(r.times_ms) for name, r in results.items()}
    assert (turns["eager"], turns["eager, oneDNN knob"], turns["fused fp32"]) == (1, 1, 3)
    assert results["eager"].extra_mib is not None


def test_a_peer_that_is_not_there_is_named(capsys) -> None:
    assert peer("no_such_peer") is None
    assert "without no_such_peer" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_runs_cases_with_their_compiled_rivals(
    tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    # traced and differentiated as any; Inductor's code for a rival is run in test_cli.py
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    names = ("batch_hard_mining", "cityblock_gradient", "topk")
    options = [part for name in names for part in ("--case", name)]
    sizes = ["--batch", "48,32", "--distances", "48,32", "--bank", "9,300,24,5"]
    given = [*options, *sizes, "--rounds", "1", "--no-growth", "--out", str(tmp_path)]
    cli.main(["bench", *given])
    cases = json.loads((tmp_path / "result.json").read_text())["cases"]
    assert len(cases) == len(names)
    for case in cases:
        failed = {r["name"] for r in case["results"] if r["error"]}
        assert not failed - {"torchpairwise"}
    told = capsys.readouterr().out
    for title in ("Batch-hard mining", "Matrix of cityblock", "Top-5"):
        assert title in told
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"

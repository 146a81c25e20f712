"""The cost model: counts by hand, prices recovered, the page reproducible from its data."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import ROOT

from fused_losses.bench.heads import calibration, model, page
from fused_losses.bench.heads.calibration import calibrate, compared
from fused_losses.bench.heads.model import (
    Profile,
    Step,
    gpu_profile,
    memory,
    phase_seconds,
    phases,
    step_seconds,
    traffic,
)
from fused_losses.centers.collectives import step_traffic
from fused_losses.centers.sampling import sample

DOCS = ROOT / "docs" / "generated"
PRICES = Profile("made up", 2e-9, 1e-9, 3e-9, 5e-5, 3e-9, 5e-5, start=1e-3, overlapped=False)


def test_counts_by_hand() -> None:
    step = Step(1000, dim=8, batch=4, world=3, weight_bytes=2, state_bytes=6, embedding_bytes=2)
    assert step.rows == 334 and step.gathered == 12 and step.part == 334
    found = {p.name: p for p in phases(step)}
    assert len(found) == 12
    elements = 334 * 8
    assert found["forward"].flop == 2 * 12 * elements
    assert found["backward"].flop == 3 * 2 * 12 * elements
    assert found["forward"].memory == 2 * elements
    assert found["backward"].memory == 6 * elements
    assert found["update"].memory == 3 * 2 * elements + 2 * 6 * elements
    assert found["catch up"].memory == found["draw the sample"].memory == 0  # all rows take part
    assert found["gather counts"].received == 2 * 32
    assert found["gather labels"].received == 2 * 4 * 8
    assert found["gather outlooks"].received == 2 * 8
    assert found["gather embeddings"].received == 2 * 4 * 8 * 2
    assert found["all-reduce maximum"].received == 2 * 2 / 3 * 8 * 12
    assert found["all-reduce sums"].received == 2 * 2 / 3 * 8 * 12 * 2
    assert found["reduce-scatter dX"].received == 2 * 4 * 8 * 4
    assert sum(p.passes for p in found.values()) == 9

    held = memory(step, chunk_bytes=100)
    assert held == {
        "table": 2 * elements,
        "states": 6 * elements,
        "steps of the rows": 8 * 334,
        "ids": 0,
        "batch of all ranks": 12 * 8 * (2 + 16),
        "chunk": 200,
    }


def test_seconds_by_hand() -> None:
    step = Step(1000, dim=8, batch=4, world=3)
    profile = Profile("p", flop=1.0, memory=10.0, link=100.0, hop=1e6, far_link=200.0, far_hop=1e7)
    found = phase_seconds(step, profile)
    elements = 334 * 8
    assert found["forward"] == max(2 * 12 * elements, 10 * 4 * elements)
    assert found["update"] == 10 * (3 * 4 + 2 * 4) * elements
    assert found["gather counts"] == 64 * 100 + 2 * 1e6  # three ranks: two doublings
    assert found["all-reduce maximum"] == 2 * 2 * 8 * 4 * 100 + 2 * 2 * 1e6
    assert step_seconds(step, profile) == sum(found.values())
    # two nodes of two: a doubling within and one between, bytes at the far price
    apart = phase_seconds(step, replace(profile, node=2))
    assert apart["gather counts"] == 64 * 200 + 1e6 + 1e7
    # three ranks on two processors: products take half as long again
    crowded = phase_seconds(step, replace(profile, memory=0.0, processors=2))
    assert crowded["forward"] == 1.5 * 2 * 12 * elements


def test_the_gather_goes_on_beside_the_sample() -> None:
    step = Step(10**6, batch=256, world=8, sample_rate=0.1)
    for link in (1e-12, 1e-8):
        profile = replace(gpu_profile("H100"), link=link)
        found = phase_seconds(step, profile)
        gather, beside = found["gather embeddings"], found["draw the sample"] + found["catch up"]
        rest = sum(found.values()) - gather - beside
        assert math.isclose(step_seconds(step, profile), rest + max(gather, beside))


@pytest.mark.parametrize("world", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("labels", [1, 4])
def test_traffic_is_the_formula_of_the_collectives_and_of_the_page(world: int, labels: int) -> None:
    step = Step(10**6, dim=48, batch=20, world=world, labels=labels, embedding_bytes=2)
    counted = sum(p.received for p in phases(step))
    assert counted == traffic(step)
    b, d = step.batch, step.dim
    row = 8 * labels * b + 2 * d * b + 4 * d * b + 16 * b * (2 + labels)
    assert counted == (world - 1) * (40 + row)
    assert (
        counted
        == step_traffic(
            world, b, d, labels=labels, element_bytes=2, reduced_numbers=2 + labels
        ).total
    )


def test_classes_that_take_part_are_those_the_sampler_draws() -> None:
    classes, world, batch, rate = 40_000, 4, 500, 0.1
    step = Step(classes, batch=batch, world=world, sample_rate=rate)
    labels = torch.randint(classes, (step.gathered,))
    first = step.rows
    own = labels[(labels >= first) & (labels < 2 * first)] - first
    drawn = sample(first, step.rows, rate, seed=1, step=2)
    found = torch.cat([own, drawn]).unique().numel()
    assert abs(found - step.part) < 4 * math.sqrt(step.part)


@pytest.mark.parametrize("gpu", model.GPUS)
@pytest.mark.parametrize("precision", ["half", "split"])
def test_more_costs_more(gpu: str, precision: str) -> None:
    profile = gpu_profile(gpu, precision)
    base = Step(10**6, world=16, sample_rate=0.3)
    more = [
        replace(base, classes=3 * 10**6),
        replace(base, batch=256),
        replace(base, dim=1024),
        replace(base, sample_rate=0.6),
        replace(base, weight_bytes=8),
        replace(base, state_bytes=8),
    ]
    for step in more:
        assert step_seconds(step, profile) > step_seconds(base, profile), step
        assert sum(memory(step).values()) > sum(memory(base).values()), step
    assert step_seconds(replace(base, embedding_bytes=400), profile) > step_seconds(base, profile)
    halves = replace(base, world=32)
    assert memory(halves)["table"] == memory(base)["table"] / 2
    # a batch of all ranks that stays the same: more ranks are faster
    spread = replace(halves, batch=base.batch // 2)
    slow = replace(base, classes=10**8), replace(spread, classes=10**8)
    assert step_seconds(slow[1], profile) < step_seconds(slow[0], profile)


SIZES = (
    (20_000, 32, 1.0), (60_000, 64, 1.0), (60_000, 64, 0.1), (90_000, 8, 1.0), (9_000, 256, 0.5),
)  # fmt: skip


def runs(noise: float, processors: int | None) -> list[dict]:
    """Steps that take what PRICES say, up to noise."""
    rng = random.Random(5)
    out = []
    for world in (1, 2, 3, 4):
        for classes, batch, rate in SIZES:
            step = Step(classes, 64, batch, world, rate)
            seconds = step_seconds(step, replace(PRICES, processors=processors))
            out.append(
                dict(
                    world=world,
                    classes=classes,
                    dim=64,
                    batch=batch,
                    sample_rate=rate,
                    seconds=seconds * (1 + noise * rng.uniform(-1, 1)),
                    bytes_sent=traffic(step),
                )
            )
    return out


@pytest.mark.parametrize("processors", [None, 2])
def test_calibration_finds_the_prices(processors: int | None) -> None:
    profile, found = compared(runs(0.0, processors), processors)
    for price in (*calibration.PRICED, "far_link", "far_hop"):
        assert math.isclose(getattr(profile, price), getattr(PRICES, price), rel_tol=1e-6), price
    for check in found:
        assert math.isclose(check.foretold, check.seconds, rel_tol=1e-6)
        assert math.isclose(check.fitted, check.seconds, rel_tol=1e-6)
        assert check.bytes_sent == check.counted

    noisy, found = compared(runs(0.1, processors), processors)
    assert math.isclose(noisy.flop, PRICES.flop, rel_tol=0.1)
    for check in found:
        assert abs(check.foretold / check.seconds - 1) < 0.35


def test_calibration_blames_the_right_number_of_processors() -> None:
    # told that each rank had a processor of its own, it cannot fit what two processors did
    crowded = runs(0.0, 2)
    wrong = max(abs(c.fitted / c.seconds - 1) for c in compared(crowded, None)[1])
    assert wrong > 0.1


def test_prices_are_not_negative() -> None:
    a = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([3.0, 2.0, 1.5], dtype=torch.float64)  # falls: the slope wants to be below 0
    x = calibration._nonnegative(a, b)
    assert torch.linalg.lstsq(a, b).solution[1] < 0
    torch.testing.assert_close(x, torch.tensor([b.mean(), 0.0], dtype=torch.float64))
    alone = [r for r in runs(0.0, None) if r["world"] == 1]
    profile = calibrate(alone)
    assert math.isclose(profile.flop, PRICES.flop, rel_tol=1e-9) and profile.link == 0


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("classes: expected", lambda: Step(0)),
        ("batch: expected", lambda: Step(5, batch=0)),
        ("sample_rate: expected", lambda: Step(5, sample_rate=1.5)),
        ("sample_rate: expected", lambda: Step(5, sample_rate=0.0)),
        ("name: expected one of", lambda: gpu_profile("Z80")),
        ("precision: expected", lambda: gpu_profile("H100", "int4")),
        ("at least 5 runs", lambda: calibrate(runs(0.0, None)[:4])),
        ("missing \\['seconds'\\]", lambda: calibrate([_without("seconds")] * 5)),
        ("seconds > 0", lambda: calibrate([runs(0.0, None)[0] | {"seconds": 0.0}] * 5)),
    ],
)
def test_bad_input(message: str, call: object) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def _without(key: str) -> dict:
    return {k: v for k, v in runs(0.0, None)[0].items() if k != key}


def test_published_figures_become_milliseconds_and_bytes() -> None:
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in page.partial_fc_lines()]
    by_row = {(row[0], row[1]): row for row in lines[2:]}
    last = by_row["29 M", "0.1"]
    assert last[2] == f"{1024 / 1855 * 1e3:.0f}"
    assert last[3] == f"{(1024 / 1855 - 1024 / 4738) * 1e3:.0f}"
    assert last[6] == f"{(32324 - 6056) * 2**20 / (3_625_000 - 175_000):,.0f}"
    assert abs(float(last[7].replace(",", "")) - (8 * 512 + 8)) < 2
    assert by_row["1.4 M", "1"][3:5] == ["", ""]


NUMBER = re.compile(r"\d[\d,]*\.?\d*")


def test_the_page_is_what_the_model_and_the_runs_give() -> None:
    saved = (DOCS / "simulation.md").read_text()
    fresh = page.page(page.read_runs(DOCS / "simulation_runs.json"))
    assert NUMBER.sub("#", saved) == NUMBER.sub("#", fresh)
    for a, b in zip(NUMBER.findall(saved), NUMBER.findall(fresh), strict=True):
        # a fit on another machine's LAPACK may round its third digit elsewhere
        assert math.isclose(float(a.replace(",", "")), float(b.replace(",", "")), rel_tol=0.02)


def test_page_and_plot_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured = runs(0.05, 2)
    stored = tmp_path / "simulation_runs.json"
    stored.write_text(json.dumps(measured))
    assert page.read_runs(stored)["runs"] == measured
    stored.write_text(json.dumps({"machine": "an abacus", "processors": 2, "runs": measured}))
    page.main(["--out", str(tmp_path)])
    text = (tmp_path / "simulation.md").read_text()
    assert "20 runs on an abacus" in text
    rows = [line for line in text.splitlines() if line.startswith(("| 1 | 20,000", "| 4 | 60,000"))]
    assert len(rows) == 3
    first = (tmp_path / "simulation.svg").read_bytes()
    page.plot(tmp_path / "simulation.svg")
    assert (tmp_path / "simulation.svg").read_bytes() == first

"""Lazy row optimisers (`fused_losses.centers.optimizers`) against torch.optim on whole tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import require
from test_memory import COUNTER, MIB, told_by_child
from torch import Tensor

from fused_losses import backends
from fused_losses.base.rounding import random_bits, rounding_key, stochastic
from fused_losses.centers import optimizers
from fused_losses.centers.optimizers import RowOptimizer, make_row_optimizer
from fused_losses.primitives.row_update import bounded

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
C, D = 23, 5


@pytest.fixture(params=["reference", "bounded", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backends.use_backend(require(request.param)):
        yield request.param


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ragged blocks also at these sizes."""
    monkeypatch.setattr(bounded, "BLOCK_BYTES", 3 * D * 8)
    monkeypatch.setattr(optimizers, "ROWS", 7)


def a_table(*shape: int, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(*(shape or (C, D))).to(dtype)


def some_rows(count: int = C) -> Tensor:
    """Distinct rows in any order; often few, at times none or all."""
    part = min(1.0, float(torch.rand(())) ** 3 * 1.3)
    return torch.randperm(count)[: int(part * count)]


def dense(weight: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    return torch.zeros_like(weight).index_copy_(0, rows, grad)


def sparse(weight: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    given = torch.sparse_coo_tensor(rows[None], grad, weight.shape, check_invariants=True)
    return given.coalesce()


def assert_close(got: Tensor, want: Tensor) -> None:
    """To float64's 1e-12, of each row's largest element."""
    size = want.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    assert bool((((got - want) / size).abs() < 1e-12).all())


def take_step(ours: RowOptimizer, rows: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
    """As a head does: the rows catch up, then step by tiles."""
    ours.catch_up(rows)
    ours.begin(group)
    half = len(rows) // 2
    ours.update(rows[:half], grad[:half])
    ours.update(rows[half:], grad[half:])
    ours.end()


# ---- sgd ----------------------------------------------------------------------------------------

SGD = [
    [dict(lr=0.1)],
    [dict(lr=0.1, weight_decay=0.3)],
    [dict(lr=0.1, momentum=0.9)],
    [dict(lr=0.05, momentum=0.9, weight_decay=0.2)],
    [dict(lr=0.05, momentum=0.9, weight_decay=0.2, maximize=True)],
    [dict(lr=0.05, momentum=0.8, weight_decay=0.2, dampening=0.4)],
    [dict(lr=0.05, momentum=0.9, weight_decay=0.2, nesterov=True)],
    # changed between steps: everything, at times no momentum, and a first step without
    [
        dict(lr=0.05, momentum=0.9, weight_decay=0.2, dampening=0.3),
        dict(lr=0.02, momentum=0.5, weight_decay=0.0, dampening=0.3),
        dict(lr=0.1, momentum=0.0, weight_decay=0.1, dampening=0.3),
    ],
    [
        dict(lr=0.1, momentum=0.0, weight_decay=0.1, dampening=0.3),
        dict(lr=0.1, momentum=0.7, weight_decay=0.1, dampening=0.3),
    ],
    [
        dict(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        dict(lr=0.1, momentum=0.0, weight_decay=0.1, nesterov=True),
        dict(lr=0.01, momentum=0.95, weight_decay=0.3, nesterov=True),
    ],
]


def name_of(groups: list[dict[str, Any]]) -> str:
    changing = f"{len(groups)}-groups-" if len(groups) > 1 else ""
    return changing + "-".join(name for name, value in groups[0].items() if value)


@pytest.mark.parametrize("groups", SGD, ids=name_of)
@pytest.mark.parametrize("history", [5, 4096])
def test_sgd_is_torchs_step_for_step(
    groups: list[dict[str, Any]], history: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "HISTORY", history)
    weight = a_table()
    whole = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.SGD([whole], **groups[0])
    ours = make_row_optimizer("sgd", weight, **groups[0])
    for step in range(40):
        group = {**groups[step // 6 % len(groups)]}
        group["lr"] *= 0.97**step
        rows = some_rows()
        grad = torch.randn(len(rows), D, dtype=FP64)
        whole.grad = dense(whole, rows, grad)
        theirs.param_groups[0].update(group)
        theirs.step()
        take_step(ours, rows, grad, group)
        read = some_rows()
        ours.catch_up(read)
        assert_close(weight[read], whole.detach()[read])
        assert len(ours._history) < history
    ours.settle(block_rows=4)
    assert_close(weight, whole.detach())
    if ours.states:
        assert_close(ours.states["momentum_buffer"], theirs.state[whole]["momentum_buffer"])
    assert ours.steps == 40
    assert ours.last.tolist() == [40] * C


def test_a_row_that_was_away_for_long() -> None:
    options = dict(lr=0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)
    weight = a_table(2, 3)
    whole = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.SGD([whole], **options)
    ours = make_row_optimizer("sgd", weight, **options)
    everyone, nobody = torch.arange(2), torch.arange(0)
    for step in range(1000):
        rows = nobody if step else everyone
        grad = torch.ones(len(rows), 3, dtype=FP64)
        whole.grad = dense(whole, rows, grad)
        theirs.step()
        take_step(ours, rows, grad, {})
    assert ours.last.tolist() == [1, 1]
    ours.settle()
    assert_close(weight, whole.detach())


def test_float32_is_rounded_once_however_long_a_row_was_away() -> None:
    """A decay of 1e-7 a step is below float32's half unit: step by step it would be lost."""
    weight = torch.linspace(1, 2, 64)[:, None].repeat(1, D)
    old = weight.double()
    ours = make_row_optimizer("sgd", weight, lr=1e-3, weight_decay=1e-5)
    for _ in range(1000):
        take_step(ours, torch.arange(0), torch.zeros(0, D), {})
    ours.settle()
    assert float((weight / (old * (1 - 1e-8) ** 1000) - 1).abs().max()) < 1e-7


# ---- adamw and adagrad --------------------------------------------------------------------------

RATES = (0.1, 0.03, 0.07)


def with_decay(whole: Tensor, lr: float, weight_decay: float) -> None:
    with torch.no_grad():
        whole.mul_(1 - lr * weight_decay)


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_is_sparse_adam_with_decoupled_decay(decay: float, maximize: bool) -> None:
    weight, betas, eps = a_table(), (0.8, 0.95), 1e-3
    whole = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.SparseAdam([whole], betas=betas, maximize=maximize)
    ours = make_row_optimizer(
        "adamw", weight, betas=betas, eps=eps, weight_decay=decay, maximize=maximize
    )
    for step in range(1, 25):
        rows, lr = some_rows(), RATES[step % 3]
        grad = torch.randn(len(rows), D, dtype=FP64)
        with_decay(whole, lr, decay)
        whole.grad = sparse(whole, rows, grad)
        # SparseAdam adds eps before v is corrected, AdamW after
        theirs.param_groups[0].update(lr=lr, eps=eps * (1 - betas[1] ** step) ** 0.5)
        theirs.step()
        take_step(ours, rows, grad, dict(lr=lr))
        assert_close(weight[rows], whole.detach()[rows])
    ours.settle()
    assert_close(weight, whole.detach())
    for name in ("exp_avg", "exp_avg_sq"):
        assert_close(ours.states[name], theirs.state[whole][name])


def test_adamw_with_every_row_is_torchs() -> None:
    weight = a_table()
    whole = torch.nn.Parameter(weight.clone())
    options = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    theirs = torch.optim.AdamW([whole], **options)
    ours = make_row_optimizer("adamw", weight, **options)
    for _ in range(20):
        whole.grad = torch.randn(C, D, dtype=FP64)
        theirs.step()
        ours.catch_up(slice(None))
        ours.begin({})
        ours.update(slice(0, 9), whole.grad[:9])
        ours.update(slice(9, C), whole.grad[9:])
        ours.end()
    assert_close(weight, whole.detach())


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("maximize", [False, True])
def test_adagrad_is_torchs_with_decoupled_decay(decay: float, maximize: bool) -> None:
    weight = a_table()
    whole = torch.nn.Parameter(weight.clone())
    options = dict(lr_decay=0.1, initial_accumulator_value=0.3, eps=1e-4, maximize=maximize)
    theirs = torch.optim.Adagrad([whole], **options)
    ours = make_row_optimizer("adagrad", weight, weight_decay=decay, **options)
    for step in range(24):
        rows, lr = some_rows(), RATES[step % 3]
        grad = torch.randn(len(rows), D, dtype=FP64)
        with_decay(whole, lr / (1 + step * 0.1), decay)
        whole.grad = sparse(whole, rows, grad)
        theirs.param_groups[0]["lr"] = lr
        theirs.step()
        take_step(ours, rows, grad, dict(lr=lr))
    ours.settle()
    assert_close(weight, whole.detach())
    assert_close(ours.states["sum"] + 0.3, theirs.state[whole]["sum"])


@pytest.mark.parametrize("forced", ["triton", "cuda"])
def test_a_backend_that_is_forced_for_the_loss_is_no_hindrance(forced: str) -> None:
    found = []
    for name in (forced, "bounded"):
        weight = torch.ones(C, D)
        ours = make_row_optimizer("adagrad", weight, weight_decay=0.1)
        with backends.use_backend(name):
            for rows in (torch.arange(3), torch.arange(2, 5)):
                take_step(ours, rows, torch.ones(3, D), {})
            ours.settle()
        found.append(weight)
    assert torch.allclose(*found, rtol=1e-6)


# ---- what is read and written -------------------------------------------------------------------

RULES = {
    "sgd": dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "adamw": dict(lr=0.1, weight_decay=0.1),
    "adagrad": dict(lr=0.1, weight_decay=0.1),
}
rules = pytest.mark.parametrize("rule", RULES)


@rules
def test_sub_centres_are_rows_of_their_class(rule: str) -> None:
    flat = a_table(C, 6)
    deep = flat.view(C, 2, 3).clone()
    flat_ours = make_row_optimizer(rule, flat, **RULES[rule])
    deep_ours = make_row_optimizer(rule, deep, **RULES[rule])
    for _ in range(5):
        rows = some_rows()
        grad = torch.randn(len(rows), 6, dtype=FP64)
        take_step(flat_ours, rows, grad, {})
        take_step(deep_ours, rows, grad.view(-1, 2, 3), {})
    deep_ours.settle()
    flat_ours.settle()
    assert torch.equal(deep.view(C, 6), flat)
    assert all(state.shape == deep.shape for state in deep_ours.states.values())


@rules
@pytest.mark.parametrize("choosing", [("cpu",), ()], ids=["picked", "all-as-on-a-gpu"])
def test_a_row_catches_up_once_and_not_within_its_own_step(
    rule: str, choosing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "CHOOSING", choosing)
    weight = a_table()
    ours = make_row_optimizer(rule, weight, **RULES[rule])
    take_step(ours, torch.arange(C), torch.randn(C, D, dtype=FP64), {})
    take_step(ours, torch.tensor([3]), torch.ones(1, D, dtype=FP64), {})
    ours.catch_up(slice(0, 4))
    ours.begin({})
    ours.update(torch.tensor([2]), torch.ones(1, D, dtype=FP64))
    before = weight.clone()
    ours.catch_up(slice(0, 4))
    assert torch.equal(weight, before)
    ours.catch_up(torch.tensor([7, 2, 5]))
    changed = (weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [5, 7]
    assert ours.last[[2, 5, 9]].tolist() == [3, 2, 1]
    ours.end()
    assert ours.last[[2, 3, 5, 9]].tolist() == [3, 2, 2, 1]
    ours.settle()
    before = weight.clone()
    ours.settle()
    assert torch.equal(weight, before)


@rules
def test_without_decay_an_infinite_weight_stays(rule: str) -> None:
    weight = torch.full((2, D), torch.inf)
    ours = make_row_optimizer(rule, weight, **(RULES[rule] | dict(weight_decay=0.0)))
    take_step(ours, torch.arange(2), torch.ones(2, D), {})
    take_step(ours, torch.arange(0), torch.ones(0, D), {})
    ours.settle()
    assert bool((weight == torch.inf).all())


def test_steps_that_move_nothing_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without momentum and decay no row is visited, whatever the history's length."""
    monkeypatch.setattr(optimizers, "HISTORY", 4)
    monkeypatch.setattr(optimizers, "catch_up_rows_", None)
    weight = a_table()
    before = weight.clone()
    ours = make_row_optimizer("sgd", weight, lr=0.1)
    for _ in range(10):
        take_step(ours, torch.tensor([4]), torch.ones(1, D, dtype=FP64), {})
    assert ours.last.tolist() == [0] * 4 + [10] + [0] * (C - 5)
    ours.settle()
    before[4] -= 1
    assert torch.allclose(weight, before, rtol=1e-14)


@rules
def test_saved_and_loaded_goes_on_as_if_nothing_happened(rule: str) -> None:
    weight = a_table()
    ours = make_row_optimizer(rule, weight, **RULES[rule])
    parts = [some_rows() for _ in range(8)]
    steps = [(rows, torch.randn(len(rows), D, dtype=FP64)) for rows in parts]
    for step in steps[:5]:
        take_step(ours, *step, {})
    ours.settle()
    copy = torch.full_like(weight, torch.nan)
    loaded = make_row_optimizer(rule, copy, **RULES[rule])
    copy.copy_(weight)
    for name, state in loaded.states.items():
        state.copy_(ours.states[name])
    loaded.load(ours.steps)
    for step in steps[5:]:
        take_step(ours, *step, {})
        take_step(loaded, *step, {})
    ours.settle()
    loaded.settle()
    assert loaded.steps == 8
    assert torch.equal(copy, weight)


@rules
def test_an_empty_shard(rule: str) -> None:
    ours = make_row_optimizer(rule, torch.zeros(0, D), **RULES[rule])
    take_step(ours, torch.arange(0), torch.zeros(0, D), {})
    ours.settle()
    assert ours.steps == 1


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process has touched."""
    found, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            found = line.endswith(str(path))
        elif found and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@rules
def test_mapped_rows_that_take_no_part_are_not_touched(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "BLOCK_BYTES", 1 << 20)
    count, width = 4096, 1024

    def mapped(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = shape[0] * shape[1]
        file = str(tmp_path / name)
        return torch.from_file(file, shared=True, size=size, dtype=dtype).view(shape)

    weight = mapped("weight", (count, width), FP32)
    ours = make_row_optimizer(rule, weight, allocate=mapped, **RULES[rule])
    rows = torch.tensor([5, 900, 4000])
    for _ in range(3):
        take_step(ours, rows, torch.ones(3, width), {})
    ours.catch_up(torch.tensor([7]))
    assert weight[rows].count_nonzero() == rows.numel() * width
    for name in ("weight", *ours.states):
        assert 0 < resident(tmp_path / name) < count * width * 4 // 8


CHILD = (
    COUNTER
    + """
from fused_losses.primitives.row_update import bounded
from fused_losses.centers.optimizers import make_row_optimizer
bounded.BLOCK_BYTES = 1 << 17

def run(rule, options, count):
    weight = torch.randn(count, 64)
    ours = make_row_optimizer(rule, weight, weight_decay=0.1, state_dtype=torch.bfloat16, **options)
    rows, grad = torch.arange(1000), torch.randn(1000, 64)
    def step():
        for shift in (0, count // 2):
            ours.catch_up(rows + shift)
            ours.begin({})
            ours.update(rows + shift, grad)
            ours.end()
        ours.settle(block_rows=count // 8)
    return extra(step), weight.nbytes

rules = {"sgd": dict(momentum=0.9), "adamw": {}, "adagrad": {}}
with fused_losses.use_backend(json.loads(sys.argv[1])):
    for rule, options in rules.items():
        run(rule, options, 3000)
    print(json.dumps({rule: run(rule, options, 60_000) for rule, options in rules.items()}))
"""
)


def test_no_memory_of_the_tables_size(backend: str) -> None:
    """Neither in a step nor to settle; the reference, whose blocks are the caller's, is control."""
    for rule, (extra, table) in told_by_child(CHILD, backend).items():
        bound = 3 * MIB
        assert table > 4 * bound, rule
        assert (extra < bound) == (backend != "reference"), rule


# ---- 16 bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    x = torch.randn(60, 300) * torch.logspace(-11, 4, 300)
    total = torch.zeros(60, 300, dtype=FP64)
    for seed in range(200):
        bits = random_bits(rounding_key(seed), torch.arange(60), 0, 300)
        up_or_down = stochastic(x, dtype, bits)
        total += up_or_down.double()
        exact = x.to(dtype).float()
        assert torch.equal(stochastic(exact, dtype, bits), exact.to(dtype))
    least = 2.0**-14 if dtype == FP16 else 1e-38
    digits = 10 if dtype == FP16 else 7
    unit = (x.abs().clamp_min(least).log2().floor() - digits).exp2().double()
    assert float(((up_or_down.double() - x) / unit).abs().max()) < 1
    error = (total / 200 - x) / unit
    # a fair coin's deviation is at most 1/2
    assert abs(float(error.mean())) < 5 * 0.5 / (200 * x.numel()) ** 0.5
    assert float(error.abs().max()) < 6 * 0.5 / 200**0.5


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rounding_of_what_has_no_neighbours(dtype: torch.dtype) -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 65504.0, 2.0**-24, 1e-45]])
    bits = torch.full((1, 8), -1, dtype=torch.int32)
    got = stochastic(x, dtype, bits)[0]
    assert got[:2].tolist() == [torch.inf, -torch.inf]
    assert got[2].isnan()
    assert got[3:5].tolist() == [0, 0]
    assert got.signbit()[:5].tolist() == [False, True, False, False, True]
    assert bool(got[5:].isfinite().all())


def test_the_bits_are_fair_and_differ() -> None:
    for key, table in ((rounding_key(0, 1), 0), (rounding_key(-1, 5, 1), 2)):
        bits = random_bits(key, torch.arange(500) + (1 << 40), table, 64)
        for bit in range(32):
            assert abs(float((bits >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / 32000**0.5
        assert len(bits.unique()) > 0.9999 * bits.numel()


def run_narrow(rule: str, seed: int, *, shards: int = 1, tall: bool = True) -> list[Tensor]:
    """A table in bfloat16 after some steps, with its states; sharded, or in other blocks."""
    weight = torch.linspace(1, 2, 24 * D).view(24, D).to(BF16)
    found: list[list[Tensor]] = []
    for start in range(0, 24, 24 // shards):
        part = weight[start : start + 24 // shards].clone()
        ours = make_row_optimizer(rule, part, state_dtype=BF16, seed=seed, **RULES[rule])
        ours.row_offset = start
        for step in range(4):
            rows = torch.arange(24)[step::2]
            rows = rows[(rows >= start) & (rows < start + len(part))]
            grad = torch.sin(rows[:, None] * 7.0 + torch.arange(D) + step)
            order = torch.arange(len(rows)) if tall else torch.randperm(len(rows))
            take_step(ours, rows[order] - start, grad[order], {})
        ours.settle()
        found.append([part, *ours.states.values()])
    return [torch.cat(tables) for tables in zip(*found, strict=True)]


@rules
def test_the_bits_do_not_depend_on_blocks_or_shards(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = run_narrow(rule, seed=3)
    for other in (run_narrow(rule, 3, tall=False), run_narrow(rule, 3, shards=3)):
        assert all(torch.equal(a, b) for a, b in zip(once, other, strict=True))
    monkeypatch.setattr(bounded, "BLOCK_BYTES", 1)
    again = run_narrow(rule, 3)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], run_narrow(rule, 4)[0])


def test_small_steps_add_up_in_bfloat16() -> None:
    """Each is a hundredth of a unit in the last place: rounded to nearest nothing would move."""
    start, count, width = 1.5, 200, 400
    for option, moved in ((None, 1.0), (False, 0.0)):
        weight = torch.full((4, width), start, dtype=BF16)
        ours = make_row_optimizer("sgd", weight, lr=2.0**-7 / 100, stochastic_rounding=option)
        for _ in range(count):
            take_step(ours, torch.arange(4), torch.ones(4, width, dtype=BF16), {})
        mean = float((start - weight.double()).mean()) / (count * 2.0**-7 / 100)
        assert abs(mean - moved) < 0.06


# ---- bad input ----------------------------------------------------------------------------------

W = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("name", "given", "error", "words"),
    [
        ("rmsprop", {}, ValueError, "optimizer: expected one of sgd, adamw, adagrad"),
        ("sgd", dict(weight=torch.zeros(4)), ValueError, r"weight: expected a contiguous table"),
        ("sgd", dict(weight=torch.zeros(3, 4).T), ValueError, "weight: expected a contiguous"),
        ("sgd", dict(state_dtype=FP64), TypeError, "state_dtype: expected torch.float32 or"),
        ("sgd", dict(betas=(0.9, 0.9)), TypeError, "betas: expected one of lr, momentum"),
        ("sgd", dict(lr=-1), ValueError, "lr: expected a value >= 0, got -1"),
        ("sgd", dict(momentum=-0.1), ValueError, "momentum: expected a value >= 0"),
        ("sgd", dict(nesterov=True), ValueError, "nesterov: expected a momentum"),
        (
            "sgd",
            dict(nesterov=True, momentum=0.9, dampening=0.1),
            ValueError,
            "dampening: expected 0 with nesterov",
        ),
        ("adamw", dict(betas=(0.9, 1.0)), ValueError, "betas: expected two values in"),
        ("adamw", dict(eps=-1.0), ValueError, "eps: expected a value >= 0"),
        ("adagrad", dict(lr_decay=-1.0), ValueError, "lr_decay: expected a value >= 0"),
        (
            "adagrad",
            dict(allocate=lambda name, shape, dtype: torch.zeros(2, 3)),
            ValueError,
            r"allocate: expected a contiguous \(4, 3\)",
        ),
    ],
)
def test_bad_input(name: str, given: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        make_row_optimizer(name, **{"weight": W} | given)


def test_calls_out_of_order() -> None:
    ours = make_row_optimizer("sgd", W.clone(), momentum=0.9)
    with pytest.raises(RuntimeError, match="update: expected begin"):
        ours.update(slice(0, 1), torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="end: expected begin"):
        ours.end()
    ours.begin({})
    ours.update(slice(0, 1), torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="update: a row had its part in step 1"):
        ours.update(torch.tensor([2, 0]), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="begin: the step before"):
        ours.begin({})
    with pytest.raises(IndexError, match=r"rows: expected values in \[0, 4\)"):
        ours.update(torch.tensor([4]), torch.ones(1, 3))
    with pytest.raises(ValueError, match="rows: expected distinct"):
        ours.update(torch.tensor([1, 1]), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"rows: expected shape \(2,\)"):
        ours.update(torch.tensor([1]), torch.ones(2, 3))
    with pytest.raises(ValueError, match="steps: expected a count"):
        ours.load(-1)
    ours.end()
    take_step(ours, torch.arange(0), torch.ones(0, 3), {})
    ours.begin({})
    with pytest.raises(RuntimeError, match="update: expected catch_up.* stands at step 0 of 2"):
        ours.update(torch.tensor([2]), torch.ones(1, 3))

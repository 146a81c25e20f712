"""`memory_budget` of every function that has it: kept scores change no bit of anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from conftest import require
from example_values import DIFFERENTIABLE, floats
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_losses
from fused_losses import class_losses
from fused_losses import functional as f
from fused_losses.base import memory_budget
from fused_losses.base.examples import TABLE, ExampleInputs

NAMES = [name for name in DIFFERENTIABLE if TABLE[name].takes("memory_budget")]
KEEPERS = ("bounded", "cpu")
ALL = 1 << 26

Loss = Callable[..., Tensor]


def outcome(name: str, backend: str, budget: Any) -> list[Tensor | None]:
    example, inputs = TABLE[name], ExampleInputs(260, 330, 24)
    leaves = {k: getattr(inputs, k).clone().requires_grad_() for k in example.leaves}
    vars(inputs).update(leaves)
    torch.manual_seed(0)  # of margins that are drawn
    found = list(floats(example(inputs, backend=backend, memory_budget=budget)))
    total = torch.stack([torch.where(o.isfinite(), o, 0).double().sum() for o in found]).sum()
    slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [*(o.detach() for o in found), *slopes]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keeper", KEEPERS)
def test_a_budget_changes_no_bit(keeper: str, name: str) -> None:
    backend = require(keeper)
    wanted = outcome(name, backend, 0)
    for budget in (1, 300_000, ALL, "auto"):
        for got, want in zip(outcome(name, backend, budget), wanted, strict=True):
            assert (got is None) == (want is None)
            assert got is None or want is None or torch.equal(got, want)


def drawn(n: int = 300, m: int = 300, d: int = 24) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    x, y = (torch.randn(size, d, generator=make) for size in (n, m))
    return x.requires_grad_(), y.requires_grad_()


def nce(backend: str, budget: Any) -> Loss:
    return lambda x, y: f.info_nce(
        x, y, symmetric=True, normalize=True, memory_budget=budget, backend=backend
    )


def sub_centres(backend: str, budget: Any) -> Loss:
    softmax = class_losses.Softmax()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        labels = torch.arange(len(x)) % (len(y) // 3)
        options: dict[str, Any] = dict(memory_budget=budget, backend=backend)
        return f.class_loss(x, y.unflatten(0, (-1, 3)), labels, softmax, **options)

    return loss


def supcon(backend: str, budget: Any) -> Loss:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        both, labels = torch.cat([x, y]), torch.arange(len(x) + len(y)) % 20
        options: dict[str, Any] = dict(memory_budget=budget, backend=backend)
        return f.supervised_contrastive(both, labels, normalize=True, **options)

    return loss


LOSSES = (nce, supcon, sub_centres)
each = pytest.mark.parametrize("made", LOSSES)
kept_by = pytest.mark.parametrize("keeper", KEEPERS)


def slopes_of(loss: Loss) -> tuple[Tensor, ...]:
    rows = drawn()
    return torch.autograd.grad(loss(*rows), rows)


@each
@kept_by
def test_a_graph_that_is_walked_twice_and_a_checkpoint(keeper: str, made: Any) -> None:
    backend = require(keeper)
    wanted = slopes_of(made(backend, 0))
    for budget in (300_000, ALL, "auto"):
        rows, loss = drawn(), made(backend, budget)
        value = loss(*rows)
        found = [torch.autograd.grad(value, rows, retain_graph=True) for _ in range(2)]
        for reentrant in (False, True):
            again = checkpoint(loss, *rows, use_reentrant=reentrant)
            for row in rows:
                row.grad = None
            again.backward()
            found.append(tuple(row.grad for row in rows))
        for slopes in found:
            assert all(torch.equal(a, b) for a, b in zip(slopes, wanted, strict=True))


def largest_saved(budget: Any) -> int:
    """Bytes of the largest tensor that hooks see."""
    seen = []

    def pack(t: Tensor) -> Tensor:
        seen.append(t.nbytes)
        return t.clone()

    rows, loss = drawn(), nce("bounded", budget)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss(*rows)
    wanted = slopes_of(nce("bounded", 0))
    assert all(map(torch.equal, torch.autograd.grad(value, rows), wanted))
    return max(seen)


def test_hooks_of_saved_tensors_see_what_is_kept() -> None:
    assert largest_saved(ALL) == 300 * 300 * 4
    assert largest_saved(0) == 300 * 24 * 4
    # what moves or recomputes saved tensors wants fewer of them
    assert largest_saved("auto") == 300 * 24 * 4


@kept_by
def test_second_derivatives_know_no_kept_scores(keeper: str) -> None:
    backend, found = require(keeper), []
    for budget in (0, 300_000, ALL):
        rows = drawn(70, 70, 8)
        value = nce(backend, budget)(*rows)
        slopes = torch.autograd.grad(value, rows, create_graph=True)
        square = sum(s.square().sum() for s in slopes)
        assert isinstance(square, Tensor)
        found.append(torch.autograd.grad(square, rows))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@each
@kept_by
def test_tangents_know_no_kept_scores(keeper: str, made: Any) -> None:
    """Of the loss, and of its gradient (a product with the Hessian)."""
    backend, along, found = require(keeper), torch.randn(70 - 70 % 3, 8), []
    for budget in (0, 20_000, ALL):
        x, y = (t.detach() for t in drawn(69, 69, 8))
        loss = made(backend, budget)
        slope = torch.func.grad(lambda x, loss=loss, y=y: loss(x, y))
        moved = torch.func.jvp(slope, (x,), (along,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), along)
            value = forward_ad.unpack_dual(loss(dual, y)).tangent
        assert value is not None
        found.append((*moved, value))
    assert found[0][1].abs().max() > 0
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


# compiled once for each budget: keepers, ops and symbolic sizes each meet what is kept, "auto" and
# a budget for a part meet one of them. That a traced op keeps alike for other losses, opcheck says.
COMPILED: list[tuple[str, Any, str, tuple[Any, ...]]] = [
    ("cpu", nce, "sizes", (300_000, "auto")),
    ("bounded", nce, "sizes", (ALL,)),
    ("bounded", supcon, "sizes", (300_000,)),
    ("cpu", sub_centres, "sizes", (ALL,)),
    ("bounded", sub_centres, "sizes", (300_000,)),
    ("cpu", nce, "symbols", (ALL,)),
    ("bounded", sub_centres, "symbols", (ALL,)),
]


@pytest.mark.parametrize(("keeper", "made", "shapes", "budgets"), COMPILED)
def test_compiled(keeper: str, made: Any, shapes: str, budgets: tuple[Any, ...]) -> None:
    backend, found = require(keeper), []
    for budget in (0, *budgets):
        torch._dynamo.reset()
        rows, loss = drawn(), made(backend, budget)
        if shapes == "symbols":
            # an error if they are taken for numbers
            torch._dynamo.mark_dynamic(rows[0], 0)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found.append(torch.autograd.grad(compiled(*rows), rows))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def explained(budget: Any, backend: str, symmetric: bool = True) -> fused_losses.explain.Plan:
    options: dict[str, Any] = dict(memory_budget=budget, backend=backend, symmetric=symmetric)
    return fused_losses.explain(f.info_nce, *drawn(), **options)


@kept_by
def test_explain_tells_what_is_kept(keeper: str) -> None:
    backend = require(keeper)
    none, some, all_of_it = (explained(budget, backend) for budget in (0, 300_000, ALL))
    assert none.kept_bytes == 0 and "kept" not in str(none)
    assert 0 <= some.kept_bytes <= 300_000
    # a row of scores is padded on the CPU
    assert 300 * 300 * 4 <= all_of_it.kept_bytes <= 300 * 320 * 4
    assert all_of_it.peak_extra_bytes - none.peak_extra_bytes == all_of_it.kept_bytes
    assert "of them kept scores" in str(all_of_it)


def test_explain_tells_that_nothing_is_kept() -> None:
    assert explained(ALL, "reference").kept_bytes == 0
    x, y = (t.detach() for t in drawn())
    plan = fused_losses.explain(f.info_nce, x, y, memory_budget=ALL, backend="bounded")
    assert plan.kept_bytes == 0
    x, y = drawn()
    listed = (torch.arange(9), torch.arange(9) + 1, torch.arange(9), torch.arange(9) + 2)
    options: dict[str, Any] = dict(indices=listed, memory_budget=ALL, backend="bounded")
    assert fused_losses.explain(f.contrastive, x, None, **options).kept_bytes == 0


def test_sweeps_of_one_call_share_its_budget() -> None:
    """Keys, two banks and a hardness: six sweeps, and one budget."""
    x, y = drawn()
    banks = [y.detach()[:200], y.detach()[:100]]
    options: dict[str, Any] = dict(queue=banks, hardness=0.5, backend="bounded")
    every = 2 * 300 * (300 + 200 + 100) * 4
    for budget, kept in ((every, every), (400_000, 360_000), (every + 1, every)):
        plan = fused_losses.explain(f.info_nce, x, y, memory_budget=budget, **options)
        assert plan.kept_bytes == kept


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        (-1, ValueError, "memory_budget: expected bytes >= 0, got -1"),
        (True, TypeError, "memory_budget: expected bytes or 'auto', got True"),
        (1.5, TypeError, "memory_budget: expected bytes or 'auto', got 1.5"),
        ("all", TypeError, "memory_budget: expected bytes or 'auto', got 'all'"),
        (None, TypeError, "memory_budget: expected bytes or 'auto', got None"),
    ],
)
def test_what_is_no_budget(budget: Any, error: type[Exception], words: str) -> None:
    names = {name.partition(",")[0]: name for name in NAMES}
    for name in names.values():
        with pytest.raises(error, match=words):
            TABLE[name](ExampleInputs(8, 40, 8), memory_budget=budget)


def test_every_function_with_a_budget_is_an_example() -> None:
    public = {name for name in f.__all__ if callable(getattr(f, name))}
    having = {n for n in public if "memory_budget" in inspect.signature(getattr(f, n)).parameters}
    assert having == {TABLE[name].function.__name__ for name in NAMES}


# ---- "auto" -------------------------------------------------------------------------------------


def test_auto_is_an_eighth_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "free_bytes", lambda: 8 * 240_000)
    assert explained("auto", "bounded").kept_bytes == 0  # there is one block of 300 x 300
    monkeypatch.setattr(memory_budget, "free_bytes", lambda: 8 * 360_000 - 1)
    assert explained("auto", "bounded").kept_bytes == 0
    monkeypatch.setattr(memory_budget, "free_bytes", lambda: 8 * 360_000)
    assert explained("auto", "bounded").kept_bytes == 360_000
    monkeypatch.setattr(memory_budget, "free_bytes", lambda: 1 << 50)
    assert explained("auto", "bounded").kept_bytes == 360_000


def test_auto_is_nothing_where_nothing_will_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "free_bytes", lambda: 1 << 50)
    x = torch.zeros(2, 2)
    assert memory_budget.budget_of("auto", x) == (1 << 50) // 8
    assert memory_budget.budget_of("auto", x.to("meta")) == 0
    with torch.no_grad():
        assert memory_budget.budget_of("auto", x) == 0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert memory_budget.budget_of("auto", x) == 0


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A system that has 7 kB free, and a group of the process without a limit."""
    (tmp_path / "meminfo").write_text(
        "MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   7 kB\nX: 1\n"
    )
    (tmp_path / "cgroup").write_text("0::/own\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/memory.max").write_text("max\n")
    names = dict(MEMORY="meminfo", GROUP="cgroup", GROUPS="")
    for name, file in names.items():
        monkeypatch.setattr(memory_budget, name, str(tmp_path / file))
    memory_budget._group.cache_clear()
    yield tmp_path
    memory_budget._group.cache_clear()


def limit(group: Path, most: int) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text("5000\n")
    (group / "memory.stat").write_text("active_file 700\ninactive_file 1000\nslab 3\n")
    memory_budget._group.cache_clear()


def test_what_is_free_is_the_least_that_is_told(system: Path) -> None:
    assert memory_budget.free_bytes() == 7 * 1024
    limit(system, 9000)  # what a container sees for the root
    assert memory_budget.free_bytes() == 5000
    limit(system / "own", 8000)
    assert memory_budget.free_bytes() == 4000
    limit(system / "own", 1 << 40)
    assert memory_budget.free_bytes() == 7 * 1024
    limit(system / "own", 3000)
    assert memory_budget.free_bytes() == 0


@pytest.mark.parametrize("told", ["", "MemFree: 12 kB\n", "MemAvailable: many kB\n"])
def test_a_system_that_does_not_tell(told: str, system: Path) -> None:
    (system / "meminfo").write_text(told)
    assert memory_budget.free_bytes() == 0
    (system / "meminfo").unlink()
    (system / "cgroup").unlink()
    memory_budget._group.cache_clear()
    assert memory_budget.free_bytes() == 0


def test_this_system_tells() -> None:
    if Path("/proc/meminfo").exists():
        assert 1 << 20 < memory_budget.free_bytes() < 1 << 50

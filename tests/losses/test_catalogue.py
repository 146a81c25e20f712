"""Every module of the catalogue: held to a literal formula, in all that users do with a loss."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import warnings

import pytest
import torch
from catalogue_table import CASES, DEGENERATE, Call, answered, built, drawn, leaves
from conftest import require
from torch import Tensor

import fused_losses
from fused_losses import functional, losses

NAMES = sorted(CASES)
D = 8


def truth(name: str, module: torch.nn.Module, call: Call, held: dict[str, Tensor]) -> tuple:
    """The formula's value and gradients."""
    return answered(lambda *a, **k: CASES[name].formula(module, *a, **k), call, held)


def within(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, what
    assert got.isfinite().all(), what
    error, size = (got - want).norm(), want.norm()
    assert error <= tolerance * size + 1e-12, f"{what}: {error / size.clamp_min(1e-300):.1e} off"


def test_every_module_has_a_row_and_every_row_a_module() -> None:
    assert {e.name for e in losses.catalogue()} == set(CASES)


def test_every_entry_is_public_and_told() -> None:
    for e in losses.catalogue():
        assert getattr(losses, e.name) is e.module, e.name
        assert e.name in losses.__all__, e.name
        assert e.paper.strip() and 1900 < e.year < 2100, e.name
        told = e.module.__doc__ or ""
        assert "O(" in told, f"{e.name}: its cost"
        assert len(told) > 100, e.name


@pytest.mark.parametrize("backend", ["reference", "cpu", "bounded"])
@pytest.mark.parametrize("name", NAMES)
def test_float64(name: str, backend: str) -> None:
    module = built(name, D, backend=require(backend))
    call, held = leaves(module, drawn(name, 19, D), torch.float64)
    want, slopes = truth(name, module, call, held)
    got, found = answered(module, call, held)
    tolerance = CASES[name].float64
    within(got, want, tolerance, "the value")
    for which in held:
        within(found[which], slopes[which], tolerance, which)


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_batches(name: str, kind: str) -> None:
    labels = torch.tensor(DEGENERATE[kind])
    module = built(name, D)
    call, held = leaves(module, drawn(name, len(labels), D, labels), torch.float64)
    if kind in CASES[name].refuses:
        with pytest.raises((ValueError, TypeError, IndexError), match=r"expected|at least"):
            module(*call.arguments, **call.options)
        return
    want, slopes = truth(name, module, call, held)
    got, found = answered(module, call, held)
    within(got, want, CASES[name].float64, "the value")
    for which in held:
        within(found[which], slopes[which], CASES[name].float64, which)


@pytest.mark.parametrize("name", [n for n in NAMES if CASES[n].gradcheck])
def test_gradcheck(name: str) -> None:
    module = built(name, 3)
    call, held = leaves(module, drawn(name, 7, 3), torch.float64)

    def loss(*values: Tensor) -> Tensor:
        given = dict(zip(held, values, strict=True))
        own = {k: v for k, v in given.items() if k in dict(module.named_parameters())}
        a = tuple(given.get(f"argument {i}", v) for i, v in enumerate(call.arguments))
        o = {k: given.get(k, v) for k, v in call.options.items()}
        torch.manual_seed(0)
        return torch.func.functional_call(module, own, a, o)

    # along one direction a leaf: element by element test_float64 holds it to the formula
    assert torch.autograd.gradcheck(loss, tuple(held.values()), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_no_worse_than_eager(name: str) -> None:
    module = built(name, D, torch.bfloat16)
    call, held = leaves(module, drawn(name, 19, D), torch.bfloat16)
    wide = copy.deepcopy(module).double()
    of_exact = leaves(wide, call, torch.float64)
    want, slopes = truth(name, wide, *of_exact)
    eager, of_eager = truth(name, module, call, held)
    got, found = answered(module, call, held)
    # what is stored is rounded once, whatever the sums are in
    half = torch.finfo(torch.bfloat16).eps
    assert (got - want).abs() <= (eager - want).abs() + half * want.abs() + half / 8
    for which in held:
        error, theirs = (
            (found[which] - slopes[which]).norm(),
            (of_eager[which] - slopes[which]).norm(),
        )
        assert error <= 1.25 * theirs + half * slopes[which].norm() + half / 8, which


@pytest.mark.parametrize("name", [n for n in NAMES if not CASES[n].ordered])
def test_order_of_rows(name: str) -> None:
    module = built(name, D)
    n = 19
    call, _ = leaves(module, drawn(name, n, D), torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))

    def moved(value: object) -> object:
        of_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == n
        return value[order] if of_rows else value

    want = module(*call.arguments, **call.options)
    got = built(name, D)(
        *map(moved, call.arguments), **{k: moved(v) for k, v in call.options.items()}
    )
    within(got.detach(), want.detach(), CASES[name].float64, "after a permutation")


@pytest.mark.parametrize("name", [n for n in NAMES if CASES[n].explains])
def test_nothing_as_large_as_all_pairs(name: str) -> None:
    n = CASES[name].wide or 1024
    module = built(name, D, torch.float32)
    call, held = leaves(module, drawn(name, n, D), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = fused_losses.explain(module, *call.arguments, **call.options)
    # of 2n rows the pairs are four times as many, what goes with the rows is twice as much
    twice, _ = leaves(module, drawn(name, 2 * n, D), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide = fused_losses.explain(module, *twice.arguments, **twice.options)
    assert plan.peak_extra_bytes is not None and wide.peak_extra_bytes is not None
    assert wide.peak_extra_bytes < 2.5 * plan.peak_extra_bytes + 2**20
    assert held


def compiled() -> list[str]:
    """One module of each file and primitive, and all that hold averages; `make compiles`: all."""
    every = [n for n in NAMES if CASES[n].compiles]
    if os.environ.get("FUSED_LOSSES_COMPILED") == "all":
        return every
    entries = {e.name: e for e in losses.catalogue()}
    alike: dict[tuple[str, ...], str] = {}
    for name in every:
        e = entries[name]
        alike.setdefault((e.module.__module__, e.block, e.primitive), name)
    return [n for n in every if n in alike.values() or any(True for _ in built(n, D).buffers())]


@pytest.mark.slow
@pytest.mark.parametrize("name", compiled())
def test_compiled(name: str) -> None:
    module = built(name, D, torch.float32)
    call, held = leaves(module, drawn(name, 19, D), torch.float32)
    # averages that a call moves
    before = copy.deepcopy(module.state_dict())
    want, slopes = answered(module, call, held)
    module.load_state_dict(before)
    torch._dynamo.reset()
    # traced whole: what AOTAutograd makes of a function's graph is tests/functions/test_modes.py's
    got, found = answered(torch.compile(module, fullgraph=True, backend="eager"), call, held)
    within(got, want, 1e-5, "the value")
    for which in held:
        within(found[which], slopes[which], 1e-4, which)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    answers = []
    for enabled in (False, True):
        module = built(name, D, torch.float32)
        call, held = leaves(module, drawn(name, 19, D), torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            answers.append(answered(module, call, held))
    (exact, slopes), (got, found) = answers
    within(got, exact, 1e-5, "the value")
    for which in slopes:
        within(found[which], slopes[which], 1e-4, which)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_survives(name: str, way: str) -> None:
    module = built(name, D)
    call, _ = leaves(module, drawn(name, 19, D), torch.float64)
    if way == "state_dict":
        torch.manual_seed(1)
        other = CASES[name].build(D).double()
        other.load_state_dict(module.state_dict())
    elif way == "eval":
        other = copy.deepcopy(module).eval().train()
    else:
        other = copy.deepcopy(module) if way == "deepcopy" else pickle.loads(pickle.dumps(module))
    torch.manual_seed(2)
    want = module(*call.arguments, **call.options)
    torch.manual_seed(2)
    assert torch.equal(other(*call.arguments, **call.options), want)
    assert type(module).__name__ in repr(module)


def test_a_word_is_searched_for() -> None:
    assert [e.name for e in losses.catalogue("circle loss")] == ["CircleLoss"]
    assert losses.catalogue("no such thing") == ()
    assert "MultiSimilarityLoss" in {e.name for e in losses.catalogue("2019")}


# whose function is named otherwise
NAMESAKES = {
    "SupCon": "supervised_contrastive",
    "BatchSemiHardTriplet": "semihard_triplet",
    "NTXent": "nt_xent",
}


def test_a_function_tells_where_its_module_has_other_defaults() -> None:
    """In its first line."""
    missing, told = [], 0
    for e in losses.catalogue():
        name = e.name.removesuffix("Loss")
        known = {f.replace("_", ""): f for f in functional.__all__}
        function = getattr(functional, NAMESAKES.get(name, known.get(name.lower(), "")), None)
        if function is None:
            continue
        of_module, own = (inspect.signature(c).parameters for c in (e.module, function))
        other = [
            n
            for n in of_module.keys() & own.keys()
            if inspect.Parameter.empty not in (of_module[n].default, own[n].default)
            and of_module[n].default not in (None, own[n].default)
        ]
        if other:
            first = inspect.getdoc(function).split("\n")[0]
            missing += [(function.__name__, other)] * (f"`{e.name}`" not in first)
            told += 1
    assert not missing and told > 5

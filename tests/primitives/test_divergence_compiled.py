"""Divergences in C++: rules beside Python's, every instruction set, hard data, threads, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import divergence_formulas as formulas
import pytest
import torch
from conftest import require
from divergence_formulas import PARAMS, Call
from torch import Tensor

from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.divergence.inputs import DivergenceInputs
from fused_losses.primitives.divergence.op import DIVERGENCE, DivergenceStatistics, divergence
from fused_losses.primitives.divergence.rules import DIVERGENCES

SETS = ("default", "avx2", "avx512", "avx512_bf16", "amx_bf16")
NEAR = ("forward", "reverse", "jensen_shannon", "bernoulli", "bernoulli_norm", "squared")


@pytest.fixture(autouse=True)
def _cpu() -> None:
    require("cpu")


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        extension().force_capability(request.param)
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    extension().force_capability(None)


def inputs(
    call: Call, kind: str, params: list[float] | None = None, precision: str = "fp32"
) -> DivergenceInputs:
    return DivergenceInputs(
        *vars(call).values(),
        kind=kind,
        params=PARAMS[kind] if params is None else params,
        precision=precision,
    )


def run(p: DivergenceInputs, backend: str = "cpu") -> DivergenceStatistics:
    return divergence(p, backend=backend)


def pulled(out: tuple[Tensor, ...], call: Call) -> list[Tensor]:
    """Gradients of all leaves, of one fixed random sum of the outputs."""
    drawn = torch.Generator().manual_seed(3)
    parts = [(o * torch.randn(o.shape, generator=drawn, dtype=torch.float64)).sum() for o in out]
    total = torch.stack(parts).sum()
    return list(torch.autograd.grad(total, call.leaves, allow_unused=True, materialize_grads=True))


def apart(got: Tensor, wanted: Tensor) -> float:
    """In relative L2."""
    error = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300)
    return error.item()


# ---- the rules alone: scores are rows themselves, beside a unit matrix --------------------------


def pairs_of_scores() -> tuple[Tensor, Tensor]:
    """[M, 2] each: scores of two classes, far, near, equal, of either sign."""
    first = torch.tensor([0.0, 1.0, -1.0, 30.0, -30.0], dtype=torch.float64)
    gaps = torch.tensor(
        [0.0, 1e-9, -1e-9, 1e-3, -1e-3, 0.3, -0.3, 0.5, -0.5, 2.0, -2.0, 50.0, -50.0],
        dtype=torch.float64,
    )
    u, gap, other = torch.cartesian_prod(first, gaps, gaps[:7]).unbind(1)
    return torch.stack([u, u - 0.25], 1), torch.stack([u - gap, u - 0.25 - other], 1)


@pytest.mark.parametrize("kind", PARAMS)
def test_rules_are_those_of_python(kind: str, instructions: str) -> None:
    u, v = pairs_of_scores()
    if kind == "total_variation":  # where both softmaxes are one its slope is any of both
        moved = ((u - v)[:, 0] - (u - v)[:, 1]).abs() > 1e-12
        u, v = u[moved], v[moved]
    unit = torch.eye(2, dtype=torch.float64)
    none = torch.full((len(u),), -1)
    for params in [PARAMS[kind], *([[0.6]] if kind.startswith("bernoulli") else [])]:
        found = []
        for backend in ("cpu", "bounded"):
            sides = [t.clone().requires_grad_() for t in (u, v)]
            p = DivergenceInputs(sides[0], unit, sides[1], None, none, kind=kind, params=params)
            out = run(p, backend)
            moved = torch.autograd.grad(out.folds.sum(), sides)
            found.append((*out, *moved))
        for mine, theirs in zip(*found, strict=True):
            # scores of 30 and their lse are rounded to 4e-15
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_every_kind_of_python_is_compiled() -> None:
    assert set(PARAMS) == set(DIVERGENCES)
    call = formulas.drawn(3, 4)
    with pytest.raises(ValueError, match="kind: expected a kind of divergence, got unheard"):
        p = inputs(call, "forward")._replace(kind="unheard")
        DIVERGENCE.op("cpu")(*(a.detach() if isinstance(a, Tensor) else a for a in p), 0)


# ---- whole calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(300, 61, (9, 13)), (70, 500, (33, 16)), (5, 97, (130, 7))])
@pytest.mark.parametrize("kind", PARAMS)
def test_instruction_sets_against_float64(
    kind: str, shape: tuple, dtype: torch.dtype, instructions: str
) -> None:
    n, c, d = shape
    dense, sampled = c == 97, c != 61
    call = formulas.drawn(n, c, dense=dense, sampled=sampled, rounded=torch.float32, d=d)
    wide = run(inputs(call, kind), "bounded")
    mine = call.to(dtype)
    got = run(inputs(mine, kind))
    # a score is a product of d terms of size 1, in all rounded some times as often
    bound = 64 * torch.finfo(dtype).eps
    for o, w in zip(got, wide, strict=True):
        assert apart(o, w) < bound
    for g, w in zip(pulled(got, mine), pulled(wide, call), strict=True):
        assert apart(g, w) < 4 * bound


@pytest.mark.parametrize("same_weights", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", NEAR)
def test_near_agreement_in_float32(
    kind: str, normalize: bool, same_weights: bool, instructions: str
) -> None:
    """KL of about 2e-6: values to 1e-3, gradients to 1e-5, whatever products round."""
    d = 512
    call = formulas.drawn(8, 700, plain=True, rounded=torch.float32, d=(d, d))
    call.normalize = call.teacher_normalize = normalize
    scale = 1.0 if normalize else d**-0.5
    x = (call.x.detach() * scale).float().double()
    moved = (x + 2e-3 * scale * torch.randn_like(x)).float().double()
    weight = call.weight.detach()
    other = (weight + 1e-3 * torch.randn_like(weight)).float().double()
    call.x, call.teacher = x.requires_grad_(), moved.requires_grad_()
    call.teacher_weight = (weight.clone() if same_weights else other).requires_grad_()
    wanted = formulas.divergence(call, kind, PARAMS[kind])[-1]
    mine = call.to(torch.float32)
    got = run(inputs(mine, kind)).folds
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)
    sides = ([mine.x, mine.weight, mine.teacher, mine.teacher_weight], call.leaves)
    for g, w in zip(
        *(torch.autograd.grad(f.sum(), s) for f, s in zip((got, wanted), sides, strict=True)),
        strict=True,
    ):
        assert apart(g, w) < 1e-5


@pytest.mark.parametrize("longer", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_a_score_beside_a_much_longer_one(kind: str, longer: str, instructions: str) -> None:
    """What is of one side alone has that side's roundings."""
    call = formulas.drawn(20, 500, plain=True, rounded=torch.float32, d=(9, 13))
    with torch.no_grad():
        (call.x if longer == "student" else call.teacher).mul_(2.0**13)
    mine, short = call.to(torch.float32), longer == "student"  # the teacher, or the student
    other = torch.arange(500) != call.labels[:, None]
    wanted = torch.where(other, formulas.scores(call)[short], -torch.inf).logsumexp(1)
    got = run(inputs(mine, kind))[short]
    assert apart(got, wanted) < 64 * torch.finfo(torch.float32).eps
    found, slopes = (
        torch.autograd.grad(lse.sum(), [c.teacher, c.teacher_weight] if short else [c.x, c.weight])
        for lse, c in ((got, mine), (wanted, call))
    )
    for g, w in zip(found, slopes, strict=True):
        assert apart(g, w) < 256 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", PARAMS)
def test_bf16_products_round_their_rows_and_nothing_else(kind: str) -> None:
    if not extension().has_bf16():
        pytest.skip("this CPU has no AVX512_BF16 products")
    call = formulas.drawn(40, 300, plain=True, rounded=torch.bfloat16, d=(48, 32))
    call.normalize = call.teacher_normalize = False
    single = call.to(torch.float32)
    exact = run(inputs(single, kind))
    slopes = pulled(exact, single)
    for precision in ("mixed", "bf16"):
        rounded = call.to(torch.float32)
        got = run(inputs(rounded, kind, precision=precision))
        for o, w in zip(got, exact, strict=True):
            assert apart(o, w) < 1e-5
        # of a product of G two factors are rounded to 2^-9 of each
        for g, w in zip(pulled(got, rounded), slopes, strict=True):
            assert apart(g, w) < 2**-7


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_dense_scores_of_any_dtype_and_strides(dtype: torch.dtype) -> None:
    call = formulas.drawn(19, 83, dense=True, sampled=True, rounded=torch.bfloat16)
    single = call.to(torch.float32)
    p = inputs(single, "forward")
    wanted = run(p)
    (slope,) = torch.autograd.grad(wanted.folds.sum(), single.teacher)
    for turned in (False, True):
        given = single.teacher.detach().to(dtype)
        given = (given.T.contiguous().T if turned else given).requires_grad_()
        got = run(p._replace(teacher=given))
        for o, w in zip(got, wanted, strict=True):
            assert torch.equal(o, w)
        (found,) = torch.autograd.grad(got.folds.sum(), given)
        assert found.dtype == dtype and torch.equal(found, slope.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_are_read_in_place(dtype: torch.dtype) -> None:
    call = formulas.drawn(21, 205, rounded=torch.bfloat16, d=(24, 16))
    single = call.to(torch.float32)
    wanted = run(inputs(single, "forward"))
    half = call.to(torch.float32)
    assert half.teacher_weight is not None
    for name in ("weight", "teacher_weight"):
        setattr(half, name, getattr(half, name).detach().to(dtype).requires_grad_())
    got = run(inputs(half, "forward"))
    for o, w in zip(got, wanted, strict=True):
        assert torch.equal(o, w)
    for g, w in zip(pulled(got, half), pulled(wanted, single), strict=True):
        torch.testing.assert_close(g.float(), w, rtol=2**-7, atol=1e-6)


def test_a_nan_is_its_rows_alone() -> None:
    call = formulas.drawn(9, 200, plain=True).to(torch.float32)
    with torch.no_grad():
        call.x[4] = torch.nan
        call.teacher[6, 1] = torch.inf
    for kind in PARAMS:
        found = run(inputs(call, kind))
        bad = found.folds.isnan().any(dim=0) | found.folds.isinf().any(dim=0)
        assert bad.nonzero().flatten().tolist() == [4, 6], kind
        (dx,) = torch.autograd.grad(found.folds.sum(), call.x)
        assert dx.isnan().any(dim=1).nonzero().flatten().tolist() == [4, 6], kind


# ---- kept scores --------------------------------------------------------------------------------


def kept_calls() -> Iterator[tuple[str, Call]]:
    shared: dict[str, Any] = dict(n=70, c=500, rounded=torch.float32)
    yield "two weights", formulas.drawn(**shared, d=(33, 16)).to(torch.float32)
    yield "some classes", formulas.drawn(**shared, sampled=True, d=(9, 16)).to(torch.float64)
    yield "dense", formulas.drawn(**shared, dense=True, d=(33, 1)).to(torch.float32)
    near = formulas.drawn(**shared, d=(24, 24))
    assert near.teacher_weight is not None
    with torch.no_grad():
        near.teacher.copy_(near.x * (1 + 1e-3 * torch.randn_like(near.x)))
        near.teacher_weight.copy_(near.weight * (1 + 1e-3 * torch.randn_like(near.weight)))
    yield "near", near.to(torch.float32)
    near.normalize = near.teacher_normalize = False
    yield "near, as they are", near.to(torch.float32)


@pytest.mark.parametrize("kind", PARAMS)
def test_kept_scores_change_nothing(kind: str, instructions: str) -> None:
    """Any number of classes, none twice: bits of results and of gradients, of two backwards."""
    for name, call in kept_calls():
        p = inputs(call, kind)
        wanted = divergence(p)
        slopes = pulled(wanted, call)
        for classes in (1, 250, 384, p.taking_part):
            got = divergence(p, kept_classes=classes)
            for o, w in zip(got, wanted, strict=True):
                assert torch.equal(o, w), (name, classes)
            total = torch.stack([o.sum() for o in got]).sum()
            torch.autograd.grad(total, call.leaves, retain_graph=True, allow_unused=True)
            for g, w in zip(pulled(got, call), slopes, strict=True):
                assert torch.equal(g, w), (name, classes)


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_kept_scores_of_rounded_products_change_nothing(precision: str) -> None:
    if not extension().has_bf16():
        pytest.skip("this CPU has no AVX512_BF16 products")
    for _, call in kept_calls():
        if call.x.dtype == torch.float64:
            continue
        p = inputs(call, "forward", precision=precision)
        found = [divergence(p, kept_classes=classes) for classes in (0, p.taking_part)]
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(*(pulled(f, call) for f in found), strict=True):
            assert torch.equal(a, b)


def slope_of_weight(bare: list[Any], found: tuple[Tensor, ...], moved: float) -> Tensor:
    """Of the sum of folds, once what was kept has been moved."""
    lse, teacher_lse, target, _, folds, kept = found
    grads = (*[torch.zeros_like(target)] * 4, torch.ones_like(folds))
    # of two planes one: where u and v are kept, both moved are as far apart as before
    plane = torch.zeros_like(kept[:, :1, :1])
    plane[-1] = moved
    given = (*grads, *bare, lse, teacher_lse, folds, kept + plane)
    needs = (False, False, True, False, False, False, False, False)
    return DIVERGENCE.op("cpu", "_backward")(*given, *needs)[1]


def test_the_backward_reads_what_was_kept() -> None:
    """Scores that are moved by one, of the kept tiles, move their classes' gradients alone."""
    for _, call in kept_calls():
        p = inputs(call, "squared")._replace(labels=torch.full_like(call.labels, -1))
        bare = [a.detach() if isinstance(a, Tensor) else a for a in p]
        classes = min(400, p.taking_part)
        found = DIVERGENCE.op("cpu")(*bare, classes)
        assert found[-1].shape == (p.kept_scores, classes, 128) and found[-1].dtype == p.dtype
        apart = slope_of_weight(bare, found, 1.0) - slope_of_weight(bare, found, 0.0)
        moved = apart.abs().amax(dim=1).nonzero().flatten()
        moved = moved if p.classes is None else torch.searchsorted(p.classes, moved)
        # whole tiles, of which 500 classes are four; all if there are no more
        assert moved.tolist() == list(range(len(moved)))
        assert len(moved) == classes == p.taking_part or 400 - 140 < len(moved) <= classes


# ---- threads, memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reverse", "power", "jensen_shannon", "squared"])
def test_threads_change_roundings_alone_and_none_twice(kind: str) -> None:
    before = torch.get_num_threads()
    call = formulas.drawn(130, 999, sampled=True, rounded=torch.float32)

    def once() -> list[Tensor]:
        mine = call.to(torch.float32)
        out = run(inputs(mine, kind))
        return [*out, *pulled(out, mine)]

    found = {}
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            found[threads] = once()
            for a, b in zip(found[threads], once(), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    for threads in (2, 16):
        for o, w in zip(found[threads], found[1], strict=True):
            assert apart(o, w) < 8 * torch.finfo(torch.float32).eps


def test_memory_is_of_tiles_and_grows_with_threads() -> None:
    """B=256, D=512 on both sides, however many classes there are."""
    before = torch.get_num_threads()
    told = {}
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            told[threads] = [
                extension().divergence_workspace(256, 512, 512, 4, "fp32", gradient, False)
                for gradient in (False, True)
            ]
    finally:
        torch.set_num_threads(before)
    assert max(told[2]) < 16 << 20
    assert all(a < b for a, b in zip(told[2], told[16], strict=True))
    # with AMX three quarters of a MiB a thread for what is split
    split = 12 if extension().capability() == "amx_bf16" else 0
    assert max(told[16]) < (64 + split) << 20

"""Divergences of two score matrices, every backend against formulas on probabilities."""

from __future__ import annotations

import divergence_formulas as formulas
import pytest
import torch
from divergence_formulas import PARAMS, Call
from torch import Tensor

from fused_losses.primitives.divergence import bounded
from fused_losses.primitives.divergence.inputs import DivergenceInputs
from fused_losses.primitives.divergence.op import DIVERGENCE, DivergenceStatistics, divergence
from fused_losses.primitives.divergence.rules import DIVERGENCES

FORMS = ("reference", "bounded", "cpu")
STREAMED = FORMS[1:]
SHAPES = {
    "two weights": {},
    "dense": {"dense": True},
    "sampled": {"sampled": True},
    "dense, sampled": {"dense": True, "sampled": True},
    "plain": {"plain": True},
    "dense, plain": {"dense": True, "plain": True},
}
LIMITED = {"bernoulli limit": ("bernoulli", [0.6]), "norm limit": ("bernoulli_norm", [0.6])}
KINDS = {kind: (kind, params) for kind, params in PARAMS.items()} | LIMITED


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of 16 classes, or there would be nothing to merge."""
    monkeypatch.setattr(bounded, "TILE_BYTES", 1)


def inputs(call: Call, kind: str, params: list[float]) -> DivergenceInputs:
    return DivergenceInputs(**vars(call), kind=kind, params=params)


def found(call: Call, kind: str, params: list[float], backend: str) -> DivergenceStatistics:
    return divergence(inputs(call, kind, params), backend=backend)


def pulled(out: tuple[Tensor, ...], call: Call) -> list[Tensor]:
    """Gradients of all leaves, of one fixed random sum of the outputs."""
    drawn = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=drawn, dtype=o.dtype) for o in out]
    total = torch.stack([(o * w).sum() for o, w in zip(out, weights, strict=True)]).sum()
    given = torch.autograd.grad(total, call.leaves, allow_unused=True, materialize_grads=True)
    return list(given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, shape: str, form: str) -> None:
    name, params = KINDS[kind]
    call = formulas.drawn(c=50, **SHAPES[shape])
    expected = formulas.divergence(call, name, params)
    got = found(call, name, params, form)
    torch.testing.assert_close(tuple(got), expected, rtol=1e-11, atol=1e-11)
    pairs = zip(pulled(got, call), pulled(expected, call), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def _near(moved: str, normalize: bool = False, c: int = 5_000, d: int = 64) -> Call:
    """A student that is its teacher and a little, in `moved`, float32 numbers all.

    Gaps of 2e-3: KL is half their variance, 2e-6.
    """
    call = formulas.drawn(8, c, plain=True, rounded=torch.float32, d=(d, d))
    call.normalize = call.teacher_normalize = normalize
    x = call.x.detach() * (1.0 if normalize else d**-0.5)

    def near(t: Tensor, name: str) -> Tensor:
        other = t + 2e-3 * t.square().mean().sqrt() * torch.randn_like(t) * (name in moved)
        return other.float().double().requires_grad_()

    x = x.float().double()
    call.x, call.teacher = x.requires_grad_(), near(x.detach(), "rows")
    call.teacher_weight = near(call.weight.detach(), "weights")
    return call


@pytest.mark.parametrize("form", STREAMED)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("moved", ["rows", "weights", "rows and weights"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
def test_near_agreement_keeps_its_digits(kind: str, moved: str, normalize: bool, form: str) -> None:
    call = _near(moved, normalize)
    expected = formulas.divergence(call, kind, PARAMS[kind])
    single = call.to(torch.float32)
    got = found(single, kind, PARAMS[kind], form)
    assert 2e-7 < expected[-1].mean() < 8e-6
    torch.testing.assert_close(got.folds, expected[-1], rtol=1e-3, atol=0)
    mine = torch.autograd.grad(got.folds.sum(), single.leaves)
    theirs = torch.autograd.grad(expected[-1].sum(), call.leaves)
    for a, e in zip(mine, theirs, strict=True):
        assert (a - e).norm() < 1e-5 * e.norm()


@pytest.mark.parametrize("form", STREAMED)
def test_near_agreement_of_sides_of_unlike_widths(form: str) -> None:
    """What is between two products is known to their own roundings: no error is beyond these."""
    call = _near("rows")
    more = 0.01 * torch.randn(len(call.teacher), 8, dtype=torch.float64)
    weight = call.weight.detach()
    call.teacher = torch.cat([call.teacher.detach(), more], 1).float().double()
    call.teacher_weight = torch.cat([weight, 0.01 * torch.randn(len(weight), 8)], 1)
    call.teacher_weight = call.teacher_weight.float().double()
    single = call.to(torch.float32)
    (mine,) = torch.autograd.grad(found(single, "forward", [], form).folds.sum(), single.x)
    expected = formulas.divergence(call, "forward", [])
    (theirs,) = torch.autograd.grad(expected[-1].sum(), call.x)
    # a sum of D products is off by D 2^-24 of the sum of their magnitudes, in any order
    u, v = formulas.scores(call)
    off = 65 * 2.0**-24 * (call.x.abs() @ weight.abs().T)
    off += 73 * 2.0**-24 * (call.teacher.abs() @ call.teacher_weight.abs().T)
    other = torch.arange(u.shape[1]) != call.labels[:, None]
    q = torch.softmax(torch.where(other, v, -torch.inf), 1)
    # G = q_s - q_t moves by q (the gap's error less its mean); its own product rounds it again
    moved = q * (off + (q * off).sum(1, keepdim=True)) * 1.01
    g = q * (u - v - (q * (u - v)).sum(1, keepdim=True)).abs() * 1.01
    bound = moved @ weight.abs() + (u.shape[1] * 2.0**-24) * (g @ weight.abs())
    assert ((mine - theirs).abs() <= bound).all()
    assert bound.norm() < theirs.norm()


@pytest.mark.parametrize("form", STREAMED)
@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon", "bernoulli"])
def test_differences_far_below_the_roundings_of_lse(kind: str, form: str) -> None:
    """In float64 gaps of 1e-9: half their variance, to the digits that the gaps have."""
    call = formulas.drawn(4, 60, dense=True, plain=True)
    call.weight = torch.eye(60, dtype=torch.float64).requires_grad_()
    call.x = torch.randn(4, 60, dtype=torch.float64).requires_grad_()
    gap = 1e-9 * torch.randn(4, 60, dtype=torch.float64)
    call.teacher = (call.x.detach() + gap).requires_grad_()
    got = found(call, kind, PARAMS[kind], form).folds[0]
    u, gap = call.x.detach(), call.teacher.detach() - call.x.detach()
    for i, label in enumerate(call.labels.tolist()):
        kept = torch.arange(60) != label
        a, g = u[i, kept], gap[i, kept]
        q = torch.softmax(a, 0)
        half = (q * (g - (q * g).sum()) ** 2).sum() / 2
        if kind == "jensen_shannon":
            half = half * 0.3 * 0.7
        if kind == "bernoulli":
            half = (torch.sigmoid(a) * torch.sigmoid(-a) * g**2).sum() / 2
        torch.testing.assert_close(got[i], half, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", STREAMED)
@pytest.mark.parametrize("kind", [k for k in PARAMS if k != "power"])
def test_a_student_that_is_its_teacher(kind: str, form: str) -> None:
    call = formulas.drawn(7, 90, plain=True, d=(6, 6)).to(torch.float32)
    call.teacher, call.teacher_weight = call.x, call.weight
    got = found(call, kind, PARAMS[kind], form).folds
    assert (got == 0).all()
    call.teacher, call.teacher_weight = call.x.detach(), call.weight.detach()
    got = found(call, kind, PARAMS[kind], form).folds
    of_x, of_weight = torch.autograd.grad(got.sum(), [call.x, call.weight])
    assert not of_x.any() and not of_weight.any()


@pytest.mark.parametrize("form", STREAMED)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("kind", PARAMS)
def test_peaked_scores(kind: str, temperature: float, form: str) -> None:
    """Scores to +-1e4: against the same formulas by logarithms, in float64."""
    call = formulas.drawn(5, 40, dense=True, plain=True)
    size = 500.0 / temperature
    call.weight = torch.eye(40, dtype=torch.float64).requires_grad_()
    call.x = (size * torch.randn(5, 40, dtype=torch.float64)).clamp(-1e4, 1e4).requires_grad_()
    call.teacher = (size * torch.randn(5, 40, dtype=torch.float64)).requires_grad_()
    expected = found(call, kind, PARAMS[kind], "reference")
    got = found(call, kind, PARAMS[kind], form)
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(pulled(got, call), pulled(expected, call), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


SIDES = {"unlike widths": {}, "one width": {"d": (6, 6)}, "dense": {"dense": True}}


def _beside_longer(longer: str, sides: str) -> Call:
    """Float32 numbers, one side 2^13 times the other, or its equal but for a bias of 2^13."""
    call = formulas.drawn(6, 40, plain=True, rounded=torch.float32, **SIDES[sides])
    with torch.no_grad():
        if longer == "student":
            call.x *= 2.0**13
        if longer == "teacher":
            call.teacher *= 2.0**13
    if longer == "student's bias":
        call.bias = torch.full((40,), 2.0**13, dtype=torch.float64).requires_grad_()
        if sides == "one width":
            call.teacher, call.teacher_weight = call.x, call.weight
    return call


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("longer", ["student", "teacher", "student's bias"])
@pytest.mark.parametrize("kind", PARAMS)
def test_scores_beside_much_longer_ones(kind: str, longer: str, sides: str, form: str) -> None:
    """What is of one side alone has that side's roundings, whatever the other is like."""
    call = _beside_longer(longer, sides)
    single = call.to(torch.float32)
    got = found(single, kind, PARAMS[kind], form)
    of_teacher = longer != "teacher"
    z = formulas.scores(call)[of_teacher]
    rows, weight = (call.teacher, call.teacher_weight) if of_teacher else (call.x, call.weight)
    mine = single.teacher if of_teacher else single.x
    lse = got.teacher_lse if of_teacher else got.lse
    # a product of D terms is off by D 2^-24 of their magnitudes; of dense scores there is none
    step = 2.0**-24
    off = step * z.abs()
    if weight is not None:
        off = off + rows.shape[1] * step * (rows.abs() @ weight.abs().T)
    other = torch.arange(40) != call.labels[:, None]
    masked = torch.where(other, z, -torch.inf)
    wanted, q = torch.logsumexp(masked, 1), torch.softmax(masked, 1)
    # an exponential's argument is off by its own length and that of the sum, as is the sum of all
    length = step * (z - wanted[:, None]).abs() + step * wanted.abs()[:, None]
    moved = (q * (off + length)).sum(1) + 50 * step
    assert ((lse - wanted).abs() <= moved).all()
    if kind == "power" and of_teacher:
        (power,) = PARAMS[kind]
        scaled = torch.logsumexp(power * masked, 1)
        assert ((got.folds[0] - scaled).abs() <= off.amax(1) + length.amax(1) + 50 * step).all()
    (slope,) = torch.autograd.grad(lse.sum(), mine)
    of_q = q * (off + length + moved[:, None] + 8 * step)
    if weight is None:
        assert ((slope - q).abs() <= of_q).all()
        return
    of_rows = (of_q + 40 * step * q) @ weight.abs()
    assert ((slope - q @ weight).abs() <= of_rows).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", PARAMS)
def test_rows_without_other_classes(kind: str, form: str) -> None:
    call = formulas.drawn(4, 1)
    call.labels = torch.tensor([0, -1, 0, -1])
    got = found(call, kind, PARAMS[kind], form)
    alone = call.labels == 0
    assert (got.lse[alone] == -torch.inf).all() and (got.teacher_lse[alone] == -torch.inf).all()
    assert (got.folds[-1, alone] == 0).all()
    assert all(g.isfinite().all() for g in pulled((got.folds[-1], got.target), call))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", PARAMS)
def test_no_rows(kind: str, form: str) -> None:
    call = formulas.drawn(0, 9)
    got = found(call, kind, PARAMS[kind], form)
    assert got.lse.shape == (0,) and got.folds.shape == (formulas.DIFFERENTIABLE.get(kind, 1), 0)
    assert all(not g.any() for g in pulled(got, call))


@pytest.mark.parametrize("form", STREAMED)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", PARAMS)
def test_opcheck(kind: str, dense: bool, form: str) -> None:
    # whole vectors of rows: what pads them is kept as it comes
    p = inputs(formulas.drawn(64, 20, dense=dense, sampled=True), kind, PARAMS[kind])
    kept = p.taking_part if form == "cpu" else 0
    for kept_classes in {0, kept}:
        torch.library.opcheck(DIVERGENCE.op(form), (*p, kept_classes))
    still = [a.detach() if isinstance(a, Tensor) else a for a in p]
    out = DIVERGENCE.op(form)(*still, kept)
    saved = out[0], out[1], out[4], out[5]
    grads = [torch.randn_like(o) for o in out[:5]]
    for compact in (False, True):
        needs = (compact, True, True, True, not dense, True, True, dense)
        arguments = (*grads, *still, *saved, *needs)
        torch.library.opcheck(DIVERGENCE.op(form, "_backward"), arguments)
    *_, gradient = DIVERGENCE.op(form, "_backward")(*arguments)
    assert gradient.shape == ((64,) if dense else (0,))


@pytest.mark.parametrize("form", FORMS)
def test_compact_gradients_are_the_rows_of_the_classes(form: str) -> None:
    if form == "reference":
        pytest.skip("its gradient is autograd's")
    p = inputs(formulas.drawn(4, 20, sampled=True), "forward", [])
    still = [a.detach() if isinstance(a, Tensor) else a for a in p]
    out = DIVERGENCE.op(form)(*still, 0)
    given = (*[torch.ones_like(o) for o in out[:5]], *still, out[0], out[1], out[4], out[5])
    needs = (False, True, False, True, False, False, False)
    whole, small = (
        DIVERGENCE.op(form, "_backward")(*given, compact, *needs[:2], False, *needs[3:])
        for compact in (False, True)
    )
    for full, some in ((whole[1], small[1]), (whole[3], small[3])):
        torch.testing.assert_close(full[p.classes], some)


@pytest.mark.parametrize("kind", PARAMS)
def test_forward_mode(kind: str) -> None:
    call = formulas.drawn(4, 20)
    leaves = call.leaves
    moves = [torch.randn_like(t) for t in leaves]

    def at(*given: Tensor) -> tuple[Tensor, ...]:
        names = [k for k, v in vars(call).items() if any(v is t for t in leaves)]
        moved = Call(**(vars(call) | dict(zip(names, given, strict=True))))
        return tuple(found(moved, kind, PARAMS[kind], "bounded"))

    still = tuple(t.detach() for t in leaves)
    _, tangents = torch.func.jvp(at, still, tuple(moves))
    step = 1e-6
    ahead, behind = (
        at(*(t + sign * step * m for t, m in zip(still, moves, strict=True))) for sign in (1, -1)
    )
    for tangent, a, b in zip(tangents, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (a - b) / (2 * step), rtol=1e-6, atol=1e-7)


def test_infinite_scores_show() -> None:
    call = formulas.drawn(3, 20, dense=True, plain=True)
    call.teacher = call.teacher.detach().clone()
    call.teacher[1, 2] = torch.inf
    call.labels = torch.tensor([-1, 5, -1])
    got = found(call, "forward", [], "bounded")
    assert got.teacher_lse.isnan().tolist() == got.folds[0].isnan().tolist() == [0, 1, 0]


def test_kinds_are_those_of_the_formulas() -> None:
    assert set(DIVERGENCES) == set(PARAMS)
    for kind, rule in DIVERGENCES.items():
        assert len(rule.params) == len(PARAMS[kind])
        assert rule.differentiable == formulas.DIFFERENTIABLE.get(kind, 1)


@pytest.mark.parametrize(
    "change",
    [
        ("kind", "cosine", "kind: expected one of"),
        ("params", [1.0], "params: expected 0 of 'forward'"),
        ("x", torch.zeros(6, 4), "weight: expected"),
        ("teacher", torch.zeros(5, 7), "teacher: expected 6 rows"),
        ("teacher_weight", torch.zeros(9, 7), "teacher_weight: expected 23 classes"),
        ("teacher_weight", None, "teacher: expected scores"),
        ("teacher_scale", torch.ones(6), "teacher_scale: expected None"),
        ("bias", torch.ones(3), "bias: expected shape"),
        ("labels", torch.full((6,), 23), "labels: expected class ids"),
        ("precision", "half", "precision: expected one of"),
    ],
    ids=lambda change: change[0],
)
def test_bad_inputs(change: tuple[str, object, str]) -> None:
    name, value, message = change
    p = inputs(formulas.drawn().to(torch.float32), "forward", [])._replace(**{name: value})
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        divergence(p)

"""The kernels of `distance_matrix` against float64, in Triton's interpreter.

`test_interpreted.py` runs this file. Truth: the formulas of the docstrings on float64 copies,
every difference materialised.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from far_rows import far_rows
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.primitives.distances import triton as backend
from fused_losses.primitives.distances.inputs import PRODUCTS, DistanceInputs, DistanceNeeds

STEPS = 8  # a few: sums of a few dozen rounded terms
# of products of 16-bit rows, which are exact, a float32 sum's rounding is all of the error
FORWARD = {"fp32": 2**-22, "mixed": 2**-22, "tf32": 2**-10, "bf16": 2**-8}
BACKWARD = {"fp32": 2**-20, "mixed": 2**-7, "tf32": 2**-9, "bf16": 2**-7}
LOW = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass
class Case:
    """One call of the op."""

    kind: str = "euclidean"
    n: int = 37
    m: int = 53
    d: int = 24
    dtype: torch.dtype = torch.float32
    precision: str = "fp32"
    spread: float = 1.0  # of the rows around `center`; small: every pair is near
    center: float = 0.0
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.name or f"{self.kind}-{self.n}-{self.d}-{str(self.dtype)[6:]}-{self.precision}"


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, of which a few rows are equal and a few almost, and a gradient."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, case.d, generator=g) for rows in (case.n, case.m))
    shared = min(case.n, case.m) // 3
    y[:shared] = x[:shared]
    y[shared : 2 * shared] = x[shared : 2 * shared] * (1 + 2**-5)
    x, y = ((t * case.spread + case.center).to(case.dtype) for t in (x, y))
    return x, y, torch.randn(case.n, case.m, generator=g)


def truth(kind: str, x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double(), y.double()
    if kind == "dot":
        return x @ y.T
    square = (x[:, None] - y).square().sum(2)
    return square if kind == "sqeuclidean" else square.sqrt()


def slopes(kind: str, grad: Tensor, distances: Tensor) -> Tensor:
    if kind == "dot":
        return grad.double()
    if kind == "sqeuclidean":
        return 2 * grad.double()
    zero = distances == 0
    return torch.where(zero, 0, grad.double() / torch.where(zero, 1, distances.double()))


def gradients(kind: str, grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    g = slopes(kind, grad, truth(kind, x, y))
    x, y = x.double(), y.double()
    if kind == "dot":
        return g @ y, g.T @ x
    gap = x[:, None] - y
    return torch.einsum("ij,ijd->id", g, gap), -torch.einsum("ij,ijd->jd", g, gap)


def scale_of(case: Case, grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What the terms of a gradient's sum add up to by absolute value, row by row."""
    g = slopes(case.kind, grad, truth(case.kind, x, y)).abs()
    x, y = x.double(), y.double()
    if case.kind == "dot":
        return g @ y.abs(), g.T @ x.abs()
    gap = (x[:, None] - y).abs()
    return torch.einsum("ij,ijd->id", g, gap), torch.einsum("ij,ijd->jd", g, gap)


def check_forward(case: Case, x: Tensor, y: Tensor, out: Tensor) -> None:
    """Every distance to a relative error, dots to that of their terms; equal rows exactly 0."""
    want = truth(case.kind, x, y)
    assert out.dtype == torch.float32 and out.shape == want.shape
    size = x.double().abs() @ y.double().abs().T if case.kind == "dot" else want
    error = (out.double() - want).abs()
    # a product of far pairs is off by 16 times its rounding at most
    step = FORWARD[case.precision] * (1 if case.kind == "dot" else 4)
    assert (error <= STEPS * step * size).all(), float((error / size.clamp_min(1e-30)).max())
    if case.kind != "dot":
        assert not out[(x[:, None] == y).all(2)].any()


def check_gradients(case: Case, grad: Tensor, x: Tensor, y: Tensor, found: tuple) -> None:
    want = gradients(case.kind, grad, x, y)
    sizes = scale_of(case, grad, x, y)
    step = BACKWARD[case.precision] if case.dtype == torch.float32 else LOW[case.dtype]
    for name, got, exact, size in zip(("x", "y"), found, want, sizes, strict=False):
        assert got.dtype == case.dtype and got.shape == exact.shape
        error = (got.double() - exact).abs().amax(1)
        # error of a row against the largest of its sums of terms
        allowed = STEPS * step * size.amax(1) + 2**-24
        assert (error <= allowed).all(), (name, float((error / allowed).max()))


NEEDS = DistanceNeeds(True, True, False)


def check(case: Case, seed: int = 0) -> None:
    x, y, grad = inputs(case, seed)
    out = backend.forward(DistanceInputs(x, y, None, case.kind, 2.0, case.precision))
    check_forward(case, x, y, out)
    found = backend.backward(
        grad, out, DistanceInputs(x, y, None, case.kind, 2.0, case.precision), NEEDS
    )
    assert found[2].numel() == 0
    check_gradients(case, grad, x, y, found[:2])


BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    *(Case(kind) for kind in PRODUCTS),
    *(Case(kind, d=33, dtype=t) for kind in PRODUCTS for t in (BF16, FP16)),
    *(Case(kind, precision=p) for kind in ("dot", "euclidean") for p in ("tf32", "mixed", "bf16")),
    Case("sqeuclidean", n=1, m=1, d=1),
    Case("euclidean", n=3, m=70, d=130),
    Case("sqeuclidean", n=66, m=2, d=17, dtype=BF16),
    Case("euclidean", center=100.0, name="far-from-the-origin"),
    Case("sqeuclidean", center=1000.0, name="farther"),
    Case("euclidean", center=10.0, dtype=BF16, name="far-from-the-origin-bf16"),
    Case("euclidean", center=4.0, spread=2**-6, name="all-near"),
    Case("euclidean", spread=1e-12, name="tiny"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("kind", ("sqeuclidean", "euclidean"))
@pytest.mark.parametrize("center", (0.0, 100.0))
def test_self_distances_are_zero(kind: str, center: float) -> None:
    x = torch.randn(40, 19) + center
    out = backend.forward(DistanceInputs(x, x, None, kind, 2.0, "fp32"))
    assert not out.diagonal().any() and (out > 0).sum() == 40 * 39
    found = backend.backward(torch.ones_like(out), out, DistanceInputs(x, x, None, kind), NEEDS)
    assert all(g.isfinite().all() for g in found)


def test_a_pair_decides_its_distance_alone() -> None:
    """A near pair in a tile changes nothing in the other pairs of it."""
    x, y, _ = inputs(Case())
    want = backend.forward(DistanceInputs(x, y, None, "euclidean", 2.0, "fp32"))
    y[40] = x[3]
    got = backend.forward(DistanceInputs(x, y, None, "euclidean", 2.0, "fp32"))
    assert got[3, 40] == 0
    others = torch.arange(53) != 40
    assert torch.equal(got[:, others], want[:, others])


def test_split_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of few rows, summed over several ragged splits, and in one."""
    case = Case("euclidean", n=20, m=117)
    x, y, grad = inputs(case)
    out = backend.forward(DistanceInputs(x, y, None, case.kind, 2.0, "fp32"))
    for processors in (1, 6):
        monkeypatch.setattr(gpu_device, "processors", lambda device, p=processors: p)
        found = backend.backward(
            grad, out, DistanceInputs(x, y, None, case.kind, 2.0, "fp32"), NEEDS
        )
        check_gradients(case, grad, x, y, found[:2])


def test_gradients_of_any_strides() -> None:
    """A sum's gradient is one number with strides 0, a transpose's is read across."""
    case = Case("euclidean")
    x, y, grad = inputs(case)
    out = backend.forward(DistanceInputs(x, y, None, case.kind, 2.0, "fp32"))
    for g in (
        torch.ones(()).expand(case.n, case.m),
        grad.T.contiguous().T,
        grad[:, :1].expand(-1, 53),
    ):
        found = backend.backward(g, out, DistanceInputs(x, y, None, case.kind, 2.0, "fp32"), NEEDS)
        check_gradients(case, g, x, y, found[:2])


def test_strided_rows() -> None:
    x, y, _ = inputs(Case())
    wide = torch.zeros(37, 30)
    wide[:, 3:27] = x
    want = backend.forward(DistanceInputs(x, y, None, "euclidean", 2.0, "fp32"))
    got = backend.forward(
        DistanceInputs(wide[:, 3:27], y.T.contiguous().T, None, "euclidean", 2.0, "fp32")
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_nan_and_infinity_reach_their_own_distances(kind: str) -> None:
    x, y, grad = inputs(Case())
    want = backend.forward(DistanceInputs(x, y, None, kind, 2.0, "fp32"))
    x[5, 2], y[50, 0], y[51, 1] = torch.nan, torch.nan, torch.inf
    got = backend.forward(DistanceInputs(x, y, None, kind, 2.0, "fp32"))
    assert got[5].isnan().all() and got[:, 50].isnan().all()
    assert not got[:, 51].isfinite().any()
    rows, columns = torch.arange(37) != 5, torch.arange(53) < 50
    assert torch.equal(got[rows][:, columns], want[rows][:, columns])
    _, dy, _ = backend.backward(
        grad, got, DistanceInputs(x, y, None, kind), DistanceNeeds(False, True, False)
    )
    # dot's gradients of y hold x alone, NaN in the one coordinate
    assert dy[:, 2].isnan().all() and (kind == "dot" or dy.isnan()[:, 2].all())


def test_squares_past_the_largest_float() -> None:
    """The norms overflow, the distances do not."""
    x = torch.randn(20, 8) * 1e17 + 3e19
    out = backend.forward(DistanceInputs(x, x, None, "euclidean", 2.0, "fp32"))
    want = truth("euclidean", x, x)
    assert ((out - want).abs() <= 1e-5 * want).all()


def test_nothing_to_do() -> None:
    for n, m, d in ((0, 5, 3), (5, 0, 3), (4, 3, 0)):
        x, y = torch.randn(n, d), torch.randn(m, d)
        out = backend.forward(DistanceInputs(x, y, None, "euclidean", 2.0, "fp32"))
        assert out.shape == (n, m) and not out.any()
        dx, dy, _ = backend.backward(out, out, DistanceInputs(x, y), NEEDS)
        assert dx.shape == x.shape and dy.shape == y.shape and not dx.any() and not dy.any()


def test_only_what_is_needed_is_computed() -> None:
    x, y, grad = inputs(Case())
    out = backend.forward(DistanceInputs(x, y, None, "euclidean", 2.0, "fp32"))
    both = backend.backward(grad, out, DistanceInputs(x, y), NEEDS)
    for k in range(2):
        found = backend.backward(
            grad, out, DistanceInputs(x, y), DistanceNeeds(k == 0, k == 1, False)
        )
        assert torch.equal(found[k], both[k]) and found[1 - k].shape == (0,)


def test_other_kinds_are_refused() -> None:
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match="kind: expected one of .*, got 'cityblock'"):
        backend.forward(DistanceInputs(x, x, None, "cityblock", 2.0, "fp32"))


def test_offsets_past_two_to_the_31() -> None:
    near = torch.randn(3, 16).half()
    far = far_rows(near)
    outs = [backend.forward(DistanceInputs(t, t)) for t in (near, far)]
    assert torch.equal(*outs)
    grads = [backend.backward(outs[0], outs[0], DistanceInputs(t, t), NEEDS) for t in (near, far)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

"""The primitives over pairs: every backend against the materialised formula in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import CUDA, require, widest
from pair_calls import attention, draw, statistics
from torch import Tensor

from fused_losses import backends
from fused_losses.backends.cpu import capability as cpu
from fused_losses.primitives.pairs.inputs import PairInputs, Rule
from fused_losses.primitives.pairs.op import pair_statistics

CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16", "amx_bf16")
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def compare(got: tuple, want: tuple, bound: float) -> None:
    for k, (a, b) in enumerate(zip(got[0], want[0], strict=True)):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite), k
        error = (a.double() - b)[finite].abs().max() if finite.any() else 0
        assert error <= bound * (b[finite].abs().max() if finite.any() else 1) + bound * 1e-2, k
    for name, b in want[1].items():
        a = got[1][name]
        assert (a is None) == (b is None), name
        if b is None:
            continue
        # dscale is a sum that cancels
        loose = 30 if name == "scale" else 1
        assert float((a.double() - b).norm()) <= loose * bound * float(b.norm()) + bound, name


@pytest.mark.float64
@pytest.mark.parametrize("seed", range(60))
def test_statistics_in_float64(seed: int, streamed: str) -> None:
    p, reduction, cols = draw(seed)
    got = statistics(p, reduction, cols, streamed)
    compare(got, statistics(p, reduction, cols, "reference"), BOUNDS[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(100, 115))
def test_statistics_in_other_dtypes(seed: int, dtype: torch.dtype, streamed: str) -> None:
    p, reduction, cols = draw(seed, dtype)
    want = statistics(p, reduction, cols, "reference", double=True)
    compare(statistics(p, reduction, cols, streamed), want, BOUNDS[dtype])


@pytest.mark.float64
@pytest.mark.parametrize("positives", [False, True])
@pytest.mark.parametrize("seed", range(200, 220))
def test_attention_in_float64(seed: int, positives: bool, streamed: str) -> None:
    p, _, _ = draw(seed)
    p = p._replace(triangle=False) if p.triangle and p.y_labels is not None else p
    if p.triangle:
        pytest.skip("attention has no triangle")
    compare(attention(p, positives, streamed), attention(p, positives, "reference"), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [300, 303, 304, 305])
def test_attention_in_other_dtypes(seed: int, dtype: torch.dtype, streamed: str) -> None:
    p = draw(seed, dtype)[0]._replace(triangle=False, y_labels=None, x_labels=None)
    p = p._replace(x_ids=None, y_ids=None, x_groups=None, y_groups=None)
    want = attention(p, False, "reference", double=True)
    # scores near 500 have float32 steps of 3e-5, and weights are their exponentials
    compare(attention(p, False, streamed), want, 10 * BOUNDS[dtype])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("seed", [400, 401, 402, 403])
def test_every_instruction_set(seed: int, capability: str) -> None:
    require("cpu")
    try:
        cpu.extension().force_capability(capability)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        p, reduction, cols = draw(seed)
        want = statistics(p, reduction, cols, "reference")
        compare(statistics(p, reduction, cols, "cpu"), want, 1e-10)
        single, reduction, cols = draw(seed, torch.float32)
        want = statistics(single, reduction, cols, "reference", double=True)
        compare(statistics(single, reduction, cols, "cpu"), want, BOUNDS[torch.float32])
    finally:
        cpu.extension().force_capability(None)


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
@pytest.mark.parametrize("backend", ["cpu", *CUDA])
def test_lower_precisions(precision: str, backend: str) -> None:
    why = backends.reasons_against(require(backend), torch.device("cpu"), torch.float32, precision)
    if why:
        pytest.skip(why[0])
    x, y = torch.randn(300, 96) * 0.3, torch.randn(410, 96) * 0.3
    labels = torch.arange(410, dtype=torch.int32) % 100
    p = PairInputs(x, y, torch.tensor(2.0).double(), x_labels=labels[:300], y_labels=labels)
    want = statistics(p, "lse", True, "reference", double=True)
    compare(statistics(p._replace(precision=precision), "lse", True, backend), want, 2e-2)
    if precision == "mixed":
        exact = statistics(p._replace(precision=precision), "lse", True, backend)[0]
        assert float((exact[0].double() - want[0][0]).abs().max()) < 1e-5


def test_the_maximum_is_online(backend: str) -> None:
    """At temperature 0.01 rows whose scores lie 150 below the largest keep their digits."""
    x = torch.nn.functional.normalize(torch.randn(200, 8))
    x[::2] *= 0.01
    y = torch.nn.functional.normalize(torch.randn(300, 8))
    y[::3] *= -1.5
    p = PairInputs(x, y, torch.tensor(100.0).double())
    want = statistics(p, "lse", True, "reference", double=True)
    got = statistics(p, "lse", True, backend)
    for k in (0, 4):  # the values of rows and of columns
        a, b = got[0][k][1], want[0][k][1]
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=3e-5)
    for name in ("x", "y"):
        error = (got[1][name].double() - want[1][name]).norm(dim=1)
        assert bool((error <= 1e-4 * want[1][name].norm(dim=1) + 1e-6).all()), name


def test_one_positive_a_row_near_zero_loss(backend: str) -> None:
    """softplus(lse_n - lse_p) + lse_p - mean_p: gradients of 1e-12 with their digits."""
    x = torch.nn.functional.normalize(torch.randn(300, 64))
    labels = torch.arange(300, dtype=torch.int32)

    def gradient(x: Tensor, name: str) -> Tensor:
        x = x.detach().requires_grad_()
        scale = torch.tensor(100.0, dtype=torch.float64)
        p = PairInputs(x, x, scale, x_labels=labels, y_labels=labels)
        rows, _ = pair_statistics(p, backend=name)
        positive, negative = rows.value
        loss = -torch.nn.functional.logsigmoid(positive - negative) + positive - rows.total[0]
        return torch.autograd.grad(loss.sum(), x)[0].double()

    want, got = gradient(x.double(), "reference"), gradient(x, backend)
    assert float(want.norm()) < 1e-4
    if backend == "reference":
        return  # eager float32: what this is better than
    assert float((got - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize("reduction", ["lse", "softplus", "relu"])
@pytest.mark.parametrize("triangle", [False, True])
def test_windows_in_float32(reduction: str, triangle: bool, streamed: str) -> None:
    """Scores that float32 holds exactly: quarters, with windows' ends on them and between."""
    generator = torch.Generator().manual_seed(11)
    whole = lambda *shape: torch.randint(-2, 3, shape, generator=generator).float()
    window = lambda n: torch.stack([whole(n) / 4 + k for k in (-2, 1, -1, 2)])
    n, m = 203, 203 if triangle else 131
    x, y = whole(n, 6), whole(m, 6)
    labels = torch.arange(max(n, m), dtype=torch.int32) % 7
    p = PairInputs(
        x,
        y,
        torch.tensor(0.25).double(),
        x_bias=whole(n) / 8,
        x_labels=labels[:n],
        y_labels=labels[:m],
        x_window=window(n),
        y_window=window(m),
        positive=Rule(-2.0, 0.25),
        negative=Rule(4.0, -0.5, 1.5),
    )
    if triangle:
        p = p._replace(y=x, y_labels=None, y_window=None, triangle=True)
    want = statistics(p, reduction, not triangle, "reference", double=True)
    compare(statistics(p, reduction, not triangle, streamed), want, BOUNDS[torch.float32])


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_empty(n: int, m: int, backend: str) -> None:
    x, y = torch.randn(n, 4, requires_grad=True), torch.randn(m, 4, requires_grad=True)
    rows, columns = pair_statistics(
        PairInputs(x, y, torch.tensor(1.0).double()), cols=True, backend=backend
    )
    assert rows.value.shape == (2, n) and columns.value.shape == (2, m)
    if n == 0 or m == 0:
        assert bool((rows.value == -torch.inf).all()) and bool((columns.best == -torch.inf).all())
    (rows.total.sum() + columns.total.sum()).backward()
    assert x.grad.shape == x.shape and y.grad.shape == y.shape


def test_nan_stays_in_what_depends_on_it(backend: str) -> None:
    x, y = torch.randn(200, 16), torch.randn(70, 16)
    x[3] = torch.nan
    p = PairInputs(x, y, torch.tensor(1.0).double())
    rows, columns = pair_statistics(p, cols=True, backend=backend)
    assert bool(rows.value[1, 3].isnan()) and bool(rows.value[1].isnan().sum() == 1)
    assert bool(columns.value[1].isnan().all())


def test_the_same_tensor_twice_gets_both_gradients(backend: str) -> None:
    x = torch.randn(50, 8, dtype=widest(backend), requires_grad=True)
    apart = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    scale = torch.tensor(1.0).double()

    def value(a: Tensor, b: Tensor) -> Tensor:
        rows, columns = pair_statistics(PairInputs(a, b, scale), cols=True, backend=backend)
        return rows.value[1].square().sum() + columns.value[1].sin().sum()

    value(x, x).backward()
    value(*apart).backward()
    near = 1e-12 if x.dtype == torch.float64 else 1e-5
    assert torch.allclose(x.grad, apart[0].grad + apart[1].grad, rtol=near, atol=near)


def test_strided_and_transposed_inputs(streamed: str) -> None:
    wide = torch.randn(40, 90)
    x, y = wide[:, ::3], torch.randn(30, 70).T
    p = PairInputs(x, y, torch.tensor(1.0).double())
    want = statistics(p, "lse", True, "reference", double=True)
    compare(statistics(p, "lse", True, streamed), want, 1e-5)

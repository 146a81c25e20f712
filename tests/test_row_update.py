"""Optimiser steps on some rows (`fused_losses.row_update`) against torch.optim."""

from __future__ import annotations

import ctypes
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from conftest import CUDA, require
from torch import Tensor

from fused_losses.backends import table
from fused_losses.backends.cuda import capability as cuda_capability
from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.base.rounding import rounding_key
from fused_losses.primitives.row_update import bounded
from fused_losses.row_update import adagrad_rows_, adamw_rows_, catch_up_rows_, sgd_rows_

BACKENDS = ("reference", "bounded", "cpu", *CUDA)
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# weight, state, gradient
DTYPES = [
    (FP32, FP32, FP32),
    (FP32, FP32, BF16),
    (BF16, FP32, FP32),
    (BF16, BF16, BF16),
    (FP16, FP32, FP16),
    (FP16, FP16, BF16),
    (FP32, BF16, FP32),
]
OPTIONS = [
    ("sgd", dict()),
    ("sgd", dict(weight_decay=0.2, maximize=True)),
    ("sgd", dict(momentum=0.9)),
    ("sgd", dict(momentum=0.9, dampening=0.3, weight_decay=0.1)),
    ("sgd", dict(momentum=0.8, nesterov=True, weight_decay=0.1)),
    ("adamw", dict()),
    ("adamw", dict(weight_decay=0.3, maximize=True)),
    ("adamw", dict(betas=(0.7, 0.95), eps=1e-3, weight_decay=0.0)),
    ("adamw", dict(betas=(0.0, 0.5))),
    ("adagrad", dict()),
    ("adagrad", dict(initial_accumulator_value=0.4, eps=1e-3, maximize=True)),
]
RULES = [("sgd", dict(momentum=0.9)), ("adamw", dict())]
rules = pytest.mark.parametrize(("rule", "options"), RULES, ids=["sgd", "adamw"])
LR = 0.1
ON_CUDA = ("sgd", "adamw")


def name_of(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(value) or "plain"
    return "-".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return require(request.param)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ragged blocks also at these sizes."""
    monkeypatch.setattr(bounded, "BLOCK_BYTES", 3 * 24 * 4)


class Step(NamedTuple):
    rows: Tensor
    grad: Tensor
    number: int | Tensor  # from 1


def tables_of(
    rule: str, d: int, weight: torch.dtype, state: torch.dtype, count: int = 11
) -> list[Tensor]:
    """A weight and its state, as after some steps."""
    states = {"sgd": [torch.randn], "adamw": [torch.randn, torch.rand], "adagrad": [torch.rand]}
    tables = [make(count, d).to(state) for make in states[rule]]
    return [torch.randn(count, d).to(weight), *tables]


def a_step(d: int, dtype: torch.dtype = FP32, count: int = 7, number: int = 3) -> Step:
    return Step(torch.randperm(11)[:count], torch.randn(count, d).to(dtype), number)


def ours(rule: str, tables: list[Tensor], step: Step, backend: str | None, **options: Any) -> None:
    given = {"lr": LR, "backend": backend} | options
    if rule == "adamw":
        adamw_rows_(tables[0], *step[:2], *tables[1:], **{"step": step.number} | given)
    elif rule == "adagrad":
        adagrad_rows_(tables[0], *step[:2], tables[1], **given)
    else:
        state = tables[1:] if options.get("momentum") else []
        sgd_rows_(tables[0], *step[:2], *state, **given)


def by_torch(rule: str, tables: list[Tensor], step: Step, **options: Any) -> list[Tensor]:
    """The tables after torch.optim's step on the rows alone, in float32, or float64 for such."""
    wide = FP64 if tables[0].dtype == FP64 else FP32
    out = [t.to(wide, copy=True) for t in tables]
    p = torch.nn.Parameter(out[0][step.rows])
    p.grad = step.grad.to(wide)
    if rule == "adamw":
        optimizer = torch.optim.AdamW([p], **{"lr": LR} | options)
        parts = {"exp_avg": out[1][step.rows], "exp_avg_sq": out[2][step.rows]}
        optimizer.state[p] = {"step": torch.tensor(step.number - 1.0), **parts}
    elif rule == "adagrad":
        optimizer = torch.optim.Adagrad([p], **{"lr": LR} | options)
        initial = options.get("initial_accumulator_value", 0.0)
        parts = {"sum": out[1][step.rows] + initial}
        optimizer.state[p].update(parts)
    else:
        optimizer = torch.optim.SGD([p], **{"lr": LR} | options)
        parts = {"momentum_buffer": out[1][step.rows]}
        optimizer.state[p] = dict(parts)
    optimizer.step()
    if rule == "adagrad":
        optimizer.state[p]["sum"] -= initial
    for whole, part in zip(out, [p.detach(), *(optimizer.state[p][k] for k in parts)], strict=True):
        whole[step.rows] = part
    return out


def check(rule: str, tables: list[Tensor], step: Step, backend: str, **options: Any) -> None:
    """One step of ours is torch's, to float32's rounding and once that of what it is stored in."""
    want = by_torch(rule, tables, step, **options)
    before = [t.clone() for t in tables]
    ours(rule, tables, step, backend, **options)
    others = torch.ones(len(tables[0]), dtype=torch.bool).index_fill(0, step.rows, False)
    for got, w, old in zip(tables, want, before, strict=True):
        tiny = 1e-13 if got.dtype == FP64 else 2e-6
        low = torch.finfo(got.dtype).eps if got.dtype.itemsize == 2 else 0.0
        assert torch.allclose(got.double(), w.double(), rtol=low + tiny, atol=tiny)
        assert torch.equal(got[others], old[others])


# ---- the formulas -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "options"), OPTIONS, ids=name_of)
@pytest.mark.parametrize("dtypes", [*DTYPES, (FP64,) * 3], ids=name_of)
def test_is_torch_optim_on_the_rows(
    rule: str, options: dict[str, Any], dtypes: tuple, backend: str
) -> None:
    if dtypes[0] == FP64 and backend == "cuda":
        pytest.skip(cuda_capability.reasons_against(torch.device("cpu"), FP64, "fp32")[-1])
    if rule not in ON_CUDA and backend == "cuda":
        pytest.skip(f"{rule} has no CUDA kernel")
    weight, state, grad = dtypes
    tables = tables_of(rule, 24, weight, state)
    for number in (1, 2, 50):
        check(rule, tables, a_step(24, grad, number=number), backend, **options)


def test_sgd_of_a_dense_gradient_with_zeros(backend: str) -> None:
    weight = torch.randn(11, 24)
    p = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([p], lr=LR)
    for count in (7, 5, 11):
        step = a_step(24, count=count)
        p.grad = torch.zeros_like(p).index_copy_(0, step.rows, step.grad)
        optimizer.step()
        sgd_rows_(weight, step.rows, step.grad, lr=LR, backend=backend)
    assert torch.allclose(weight, p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d", [1, 3, 4, 8, 12, 100, 300, 700])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2], DTYPES[3]], ids=name_of)
@rules
def test_any_width(rule: str, options: dict, dtypes: tuple, d: int, backend: str) -> None:
    """Whole packs or not, less than a warp's worth and more than one's."""
    check(rule, tables_of(rule, d, *dtypes[:2]), a_step(d, dtypes[2]), backend, **options)


@rules
def test_more_rows_than_a_grid_has(
    rule: str, options: dict, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_LOSSES_CUDA_PROCESSORS", "1")  # 8 blocks, of 64 rows of this width
    tables = tables_of(rule, 3, FP32, FP32, count=1300)
    rows = torch.randperm(1300)[:1100]
    check(rule, tables, Step(rows, torch.randn(1100, 3), 2), backend, **options)


@pytest.mark.parametrize(("count", "d"), [(0, 8), (3, 0)])
@rules
def test_nothing_to_do(rule: str, options: dict, count: int, d: int, backend: str) -> None:
    check(rule, tables_of(rule, d, FP32, FP32), a_step(d, count=count), backend, **options)


@pytest.mark.parametrize(("width", "first"), [(32, 4), (32, 1), (27, 0)])
@rules
def test_views(rule: str, options: dict, width: int, first: int, backend: str) -> None:
    """Of wider tables, aligned and not; what lies beside the view stays."""
    wholes = [torch.rand(11, width).to(t.dtype) for t in tables_of(rule, 1, BF16, FP32)]
    before = [w.clone() for w in wholes]
    step = a_step(24)
    step = step._replace(
        rows=torch.stack([step.rows, step.rows], 1)[:, 0], grad=step.grad.T.clone().T
    )
    check(rule, [w[:, first : first + 24] for w in wholes], step, backend, **options)
    for now, old in zip(wholes, before, strict=True):
        now[:, first : first + 24] = old[:, first : first + 24]
        assert torch.equal(now, old)


@rules
def test_numbers_on_the_device(rule: str, options: dict, backend: str) -> None:
    """lr and step as tensors, changed between calls as a captured graph's owner does."""
    lr, number = torch.tensor(1.0), torch.tensor(0.0, dtype=FP64)
    for value, step in ((0.1, a_step(24)), (0.01, a_step(24, number=4))):
        tables = tables_of(rule, 24, FP32, FP32)
        want = by_torch(rule, tables, step, **options, lr=value)
        lr.fill_(value)
        number.fill_(step.number)
        ours(rule, tables, step._replace(number=number), backend, **options, lr=lr)
        for got, w in zip(tables, want, strict=True):
            assert torch.allclose(got, w, rtol=2e-6, atol=2e-6)


def test_a_small_decay_is_not_rounded_alike_everywhere(backend: str) -> None:
    """1 - 1e-7 as a float32 is 1 - 1.2e-7: a factor would shrink every weight by a fifth more."""
    weight = torch.linspace(1, 2, 4096).view(64, 64)
    old, zero = weight.double(), torch.zeros(64, 64)
    adamw_rows_(
        weight, torch.arange(64), zero, zero.clone(), zero.clone(),
        step=1, lr=1e-3, weight_decay=1e-4, backend=backend,
    )  # fmt: skip
    assert abs(float((old - weight).mean()) / 1.5e-7 - 1) < 0.08


def test_without_decay_an_infinite_weight_stays(backend: str) -> None:
    weight = torch.full((2, 8), torch.inf)
    sgd_rows_(weight, torch.tensor([1]), torch.ones(1, 8), lr=LR, backend=backend)
    assert bool((weight == torch.inf).all())


def test_nan_stays_in_its_place(backend: str) -> None:
    tables, step = tables_of("adamw", 8, FP32, FP32), a_step(8, count=3)
    step.grad[1, 5] = torch.nan
    ours("adamw", tables, step, backend)
    for t in tables:
        assert t.isnan().nonzero().tolist() == [[int(step.rows[1]), 5]]


# ---- catching up and rounding -------------------------------------------------------------------

FACTORS = torch.tensor([[-0.1, 0.5, 0.2, 0.9], [0.0, 0.0, 0.0, 1.0], [-1.0, 0.0, 0.0, 0.0]])


def skip_on_cuda(backend: str) -> None:
    if backend == "cuda":
        pytest.skip("no CUDA kernel of it")


@pytest.mark.parametrize("dtypes", [*DTYPES, (FP64,) * 3], ids=name_of)
@pytest.mark.parametrize("buffer", [False, True])
def test_catching_up_is_a_linear_map(buffer: bool, dtypes: tuple, backend: str) -> None:
    skip_on_cuda(backend)
    rows, factors = torch.tensor([7, 2, 9]), FACTORS.double()
    tables = tables_of("sgd", 27, *dtypes[:2])[: 1 + buffer]
    before = [t.to(FP64, copy=True) for t in tables]
    catch_up_rows_(tables[0], rows, factors, *tables[1:], backend=backend)
    w, v = before[0][rows], before[1][rows] if buffer else torch.zeros(3, 27)
    a, b, c, d = factors[:, :, None].unbind(1)
    for got, old, new in zip(tables, before, (w + a * w + b * v, c * w + d * v), strict=False):
        want = old.index_copy(0, rows, new)
        low = torch.finfo(got.dtype).eps if got.dtype.itemsize == 2 else 0.0
        tiny = 1e-14 if got.dtype == FP64 else 1e-6
        assert torch.allclose(got.double(), want, rtol=low + tiny, atol=tiny)


def test_a_factor_of_0_leaves_out_what_is_infinite(backend: str) -> None:
    skip_on_cuda(backend)
    weight, buffer = torch.full((3, 9), torch.inf), torch.full((3, 9), -torch.inf)
    catch_up_rows_(
        weight, torch.arange(3), FACTORS[1].repeat(3, 1).double(), buffer, backend=backend
    )
    assert bool((weight == torch.inf).all() and (buffer == -torch.inf).all())


@pytest.mark.parametrize("dtypes", [DTYPES[3], DTYPES[4], DTYPES[5]], ids=name_of)
@pytest.mark.parametrize("d", [9, 700])
@pytest.mark.parametrize("rule", ["sgd", "adamw", "adagrad"])
def test_every_backend_rounds_with_the_same_bits(
    rule: str, d: int, dtypes: tuple, backend: str
) -> None:
    """But for where float32's own last digit decides: no more than a number in a thousand."""
    if backend == "cuda":
        pytest.skip("stochastic rounding has no CUDA kernel")
    weight, state, grad = dtypes
    tables, step = tables_of(rule, d, weight, state), a_step(d, grad)
    options = dict(momentum=0.9) if rule == "sgd" else {}
    given = dict(options, rounding_key=rounding_key(5, 2), row_offset=1 << 40)
    found = []
    for name in ("reference", backend):
        found.append([t.clone() for t in tables])
        ours(rule, found[-1], step, name, **given)
    nearest = [t.clone() for t in tables]
    ours(rule, nearest, step, backend, **options)
    for got, want, near in zip(found[1], found[0], nearest, strict=True):
        if got.dtype.itemsize == 2:
            assert float((got != want).float().mean()) < 1e-3
            assert float((got != near).float().mean()) > 0.04
        else:
            assert torch.allclose(got, want, atol=1e-6)


# ---- one pass -----------------------------------------------------------------------------------


@pytest.mark.skipif(not CUDA, reason="the host build of the CUDA kernels counts bytes")
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2], DTYPES[3]], ids=name_of)
@pytest.mark.parametrize("d", [24, 27, 512])
@rules
def test_every_byte_moves_once(rule: str, options: dict, dtypes: tuple, d: int) -> None:
    require("cuda")
    tables, step = tables_of(rule, d, *dtypes[:2]), a_step(d, dtypes[2])
    ours(rule, tables, step, "cuda", **options)
    size = [7 * d * t.element_size() for t in (*tables, step.grad)]
    loaded, stored = (ctypes.c_uint64 * 8)(), (ctypes.c_uint64 * 8)()
    cuda_launch.library().fused_losses_traffic(loaded, stored)
    assert list(loaded)[: len(size) + 1] == [*size, 7 * 8]
    assert list(stored)[: len(size) + 1] == [*size[:-1], 0, 0]


@pytest.mark.skipif(not CUDA, reason="FUSED_LOSSES_CUDA_ON_HOST is not 1")
@rules
def test_the_same_bits_in_any_order(
    rule: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("cuda")
    tables, step, found = tables_of(rule, 100, BF16, FP32), a_step(100), []
    for seed in ("1", "2", "3"):
        monkeypatch.setenv("FUSED_LOSSES_CUDA_SEED", seed)
        found.append([t.clone() for t in tables])
        ours(rule, found[-1], step, "cuda", **options)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


# ---- the op -------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", [False, True])
def test_opcheck_sgd(buffer: bool, backend: str) -> None:
    (weight, state), step = tables_of("sgd", 8, FP32, FP32), a_step(8)
    state = state if buffer else None
    for lr in (None, torch.tensor(0.1)):
        arguments = (weight, *step[:2], state, lr, 0.1, 0.9, 0.0, 0.1, False, True)
        torch.library.opcheck(getattr(torch.ops.fused_losses, f"sgd_rows_{backend}"), arguments)


def test_opcheck_adamw(backend: str) -> None:
    tables, step = tables_of("adamw", 8, FP32, FP32), a_step(8)
    op = getattr(torch.ops.fused_losses, f"adamw_rows_{backend}")
    for t in (None, torch.tensor(3.0)):
        arguments = (tables[0], *step[:2], *tables[1:], t, 0.1, t, 3.0, 0.9, 0.99, 1e-8, 0.1, False)
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("key", [None, 3])
def test_opcheck_adagrad_and_catching_up(key: int | None, backend: str) -> None:
    skip_on_cuda(backend)
    (weight, state), step = tables_of("adagrad", 8, FP32, BF16), a_step(8, count=3)
    ops = torch.ops.fused_losses
    adagrad = (weight, *step[:2], state, 0.1, 1e-8, 0.1, 0.5, False, key, 7)
    torch.library.opcheck(getattr(ops, f"adagrad_rows_{backend}"), adagrad)
    catch_up = (weight, step.rows, FACTORS.double(), state, key, 7)
    torch.library.opcheck(getattr(ops, f"catch_up_rows_{backend}"), catch_up)


@rules
def test_compiled(rule: str, options: dict, backend: str) -> None:
    tables, step = tables_of(rule, 8, FP32, FP32), a_step(8)
    want = [t.clone() for t in tables]
    ours(rule, want, step, backend, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        compiled(rule, tables, step, backend, **options)
        torch.compiler.reset()
    assert all(torch.equal(a, b) for a, b in zip(tables, want, strict=True))


def test_a_parameter_and_what_autograd_kept_of_it(backend: str) -> None:
    weight, x = torch.nn.Parameter(torch.randn(5, 8)), torch.randn(3, 8, requires_grad=True)
    loss = (x @ weight.T).sum()
    sgd_rows_(weight, torch.tensor([2]), torch.ones(1, 8), lr=LR, backend=backend)
    assert weight.requires_grad and weight.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors(backend: str) -> None:
    with torch.inference_mode():
        weight = torch.zeros(5, 8)
        sgd_rows_(weight, torch.tensor([2]), torch.ones(1, 8), lr=1.0, backend=backend)
        assert weight.sum(1).tolist() == [0, 0, -8, 0, 0]


def test_which_backend() -> None:
    assert table.order("row_update", "cuda", 8) == ("cuda", "bounded")
    assert table.order("row_update", "cpu", 8) == ("cpu", "bounded")
    weight, step = torch.zeros(11, 8), a_step(8)
    with pytest.raises(RuntimeError, match="rows are updated on cuda, cpu and bounded"):
        sgd_rows_(weight, *step[:2], lr=LR, backend="triton")
    with pytest.raises(RuntimeError, match="no CUDA kernel has stochastic rounding"):
        sgd_rows_(weight, *step[:2], lr=LR, rounding_key=1, backend="cuda")
    with pytest.raises(RuntimeError, match="no CUDA kernel has adagrad_rows_"):
        adagrad_rows_(weight, *step[:2], weight.clone(), backend="cuda")


# ---- bad input ----------------------------------------------------------------------------------

W, R, G = torch.zeros(4, 3), torch.tensor([1, 2]), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(weight=W[0]), ValueError, "weight: expected two dimensions"),
        (dict(weight=W.long()), TypeError, "weight: expected a floating"),
        (dict(weight=torch.zeros(3, 4).T), ValueError, "weight: expected rows that lie contiguous"),
        (dict(weight=W[:1].expand(4, 3)), ValueError, "weight: expected rows that lie contiguous"),
        (dict(rows=R.int()), TypeError, "rows: expected int64"),
        (dict(rows=R.float()), TypeError, "rows: expected int64"),
        (dict(rows=R[:1]), ValueError, "rows: expected shape"),
        (
            dict(rows=R + 2),
            IndexError,
            r"rows: expected values in \[0, 4\), got values from 3",
        ),
        (dict(rows=R - 2), IndexError, "got values from -1 to 0"),
        (dict(rows=R * 0), ValueError, "rows: expected distinct"),
        (dict(grad=G[:, :2]), ValueError, r"grad: expected \[K, 3\]"),
        (dict(grad=G.double()), TypeError, "grad: expected float64 where weight is"),
        (dict(grad=G.to("meta")), ValueError, "grad: expected the device"),
        (dict(momentum=0.9), ValueError, "momentum_buffer: expected a tensor"),
        (dict(momentum_buffer=W), ValueError, "momentum_buffer: expected None"),
        (
            dict(momentum_buffer=W[:2], momentum=0.9),
            ValueError,
            r"momentum_buffer: expected \(4, 3",
        ),
        (
            dict(momentum_buffer=W.half(), momentum=0.9),
            TypeError,
            "momentum_buffer: expected torch",
        ),
        (dict(momentum=-1.0), ValueError, "momentum: expected a value >= 0"),
        (dict(weight_decay=-1.0), ValueError, "weight_decay: expected a value >= 0"),
        (dict(lr=-1.0), ValueError, "lr: expected a value >= 0"),
        (dict(lr=torch.ones(2)), ValueError, "lr: expected a number or one element"),
        (dict(nesterov=True), ValueError, "nesterov: expected a momentum"),
        (
            dict(momentum_buffer=W, momentum=0.9, dampening=0.1, nesterov=True),
            ValueError,
            "nesterov: expected a momentum, and dampening=0",
        ),
    ],
)
def test_bad_input(given: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        sgd_rows_(**{"weight": W, "rows": R, "grad": G, "lr": LR} | given)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(exp_avg=W[:1]), ValueError, "exp_avg: expected"),
        (dict(exp_avg_sq=W.double()), TypeError, "exp_avg_sq: expected torch.float32"),
        (dict(betas=(0.9, 1.0)), ValueError, "betas: expected two values in"),
        (dict(eps=-1.0), ValueError, "eps: expected a value >= 0"),
        (dict(step=0), ValueError, "step: expected a count from 1 on"),
    ],
)
def test_bad_input_of_adamw(given: dict[str, Any], error: type, words: str) -> None:
    fine = dict(weight=W, rows=R, grad=G, exp_avg=W.clone(), exp_avg_sq=W.clone(), step=1)
    with pytest.raises(error, match=words):
        adamw_rows_(**fine | given)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(sum=W.double()), TypeError, "sum: expected torch.float32 or torch.bfloat16"),
        (dict(initial_accumulator_value=-1.0), ValueError, "initial_accumulator_value: expected"),
        (dict(lr=-1.0), ValueError, "lr: expected a value >= 0"),
    ],
)
def test_bad_input_of_adagrad(given: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        adagrad_rows_(**dict(weight=W, rows=R, grad=G, sum=W.clone()) | given)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(factors=torch.ones(2, 4)), ValueError, r"factors: expected \[2, 4\] float64"),
        (dict(factors=torch.ones(2, 3).double()), ValueError, r"factors: expected \[2, 4\]"),
        (dict(rows=R + 2), IndexError, r"rows: expected values in \[0, 4\)"),
        (dict(momentum_buffer=W[:2]), ValueError, "momentum_buffer: expected"),
    ],
)
def test_bad_input_of_catching_up(given: dict[str, Any], error: type, words: str) -> None:
    fine = dict(weight=W, rows=R, factors=torch.ones(2, 4).double())
    with pytest.raises(error, match=words):
        catch_up_rows_(**fine | given)


def test_the_compiled_op_checks_for_itself() -> None:
    op = getattr(torch.ops.fused_losses, f"sgd_rows_{require('cpu')}")
    rest = (None, None, 0.1, 0.0, 0.0, 0.0, False, False)
    with pytest.raises(IndexError, match=r"rows: expected values in \[0, 4\), got 4"):
        op(W.clone(), R + 2, G, *rest)
    with pytest.raises(ValueError, match=r"grad: expected \[2, 3\]"):
        op(W.clone(), R, G[:1], *rest)
    with pytest.raises(ValueError, match="weight: expected rows that lie contiguous"):
        op(torch.zeros(3, 4).T, R, G, *rest)

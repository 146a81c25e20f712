"""Optimiser steps on some rows (`fused_losses.row_update`) against torch.optim."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import row_update_cases as cases
import torch
from conftest import CUDA, require
from row_update_cases import (
    BF16,
    DTYPES,
    FACTORS,
    FP32,
    FP64,
    LR,
    ON_CUDA,
    OPTIONS,
    Step,
    a_step,
    by_torch,
    check,
    name_of,
    ours,
    rules,
    skip_on_cuda,
    tables_of,
)

from fused_losses.backends.cuda import capability as cuda_capability
from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.base.rounding import rounding_key
from fused_losses.row_update import adamw_rows_, catch_up_rows_, sgd_rows_

backend, _small_blocks = cases.backend, cases._small_blocks  # fixtures

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

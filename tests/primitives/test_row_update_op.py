"""The row updates as ops of torch, and what they refuse."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import row_update_cases as cases
import torch
from conftest import require
from row_update_cases import (
    BF16,
    FACTORS,
    FP32,
    LR,
    a_step,
    ours,
    rules,
    skip_on_cuda,
    tables_of,
)

from fused_losses.backends import table
from fused_losses.row_update import adagrad_rows_, adamw_rows_, catch_up_rows_, sgd_rows_

backend, _small_blocks = cases.backend, cases._small_blocks  # fixtures


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

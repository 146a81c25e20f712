"""Tables and steps for the tests of `fused_losses.row_update`, ours beside torch's."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from conftest import CUDA, require
from torch import Tensor

from fused_losses.primitives.row_update import bounded
from fused_losses.row_update import adagrad_rows_, adamw_rows_, sgd_rows_

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
    ("sgd", {}),
    ("sgd", dict(weight_decay=0.2, maximize=True)),
    ("sgd", dict(momentum=0.9)),
    ("sgd", dict(momentum=0.9, dampening=0.3, weight_decay=0.1)),
    ("sgd", dict(momentum=0.8, nesterov=True, weight_decay=0.1)),
    ("adamw", {}),
    ("adamw", dict(weight_decay=0.3, maximize=True)),
    ("adamw", dict(betas=(0.7, 0.95), eps=1e-3, weight_decay=0.0)),
    ("adamw", dict(betas=(0.0, 0.5))),
    ("adagrad", {}),
    ("adagrad", dict(initial_accumulator_value=0.4, eps=1e-3, maximize=True)),
]
RULES = [("sgd", dict(momentum=0.9)), ("adamw", {})]
rules = pytest.mark.parametrize(("rule", "options"), RULES, ids=["sgd", "adamw"])
LR = 0.1
ON_CUDA = ("sgd", "adamw")
# of rows that catch up
FACTORS = torch.tensor([[-0.1, 0.5, 0.2, 0.9], [0.0, 0.0, 0.0, 1.0], [-1.0, 0.0, 0.0, 0.0]])


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


def skip_on_cuda(backend: str) -> None:
    if backend == "cuda":
        pytest.skip("no CUDA kernel of it")

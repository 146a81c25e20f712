"""What a call compiles after `warm_up`: nothing, and a ragged last batch one kernel at most.

On CUDA tensors without values, through Triton's own launcher; `test_fake_gpu.py` runs this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import launch_keys
import pytest
import torch
from torch import Tensor

from fused_losses import functional as F
from fused_losses import losses, warm_up
from fused_losses.margins import ArcFace
from fused_losses.warm_up import Warmed

BF16, FP32 = torch.bfloat16, torch.float32
RAGGED = (1021, 1018, 7)


def rows(*shape: int, dtype: torch.dtype = BF16, leaf: bool = True) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda:1", requires_grad=leaf)


def labels(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64, device="cuda:1")


@dataclass(frozen=True)
class Call:
    """A function, its arguments for n rows, and its options."""

    fn: Callable[..., Any]
    args: Callable[[int], tuple]
    options: dict[str, Any] = field(default_factory=dict)


def of_classes(c: int, d: int, dtype: torch.dtype = BF16) -> Callable[[int], tuple]:
    return lambda n: (rows(n, d, dtype=dtype), rows(c, d, dtype=dtype), labels(n))


def of_pairs(d: int, dtype: torch.dtype = BF16) -> Callable[[int], tuple]:
    return lambda n: (rows(n, d, dtype=dtype), rows(n, d, dtype=dtype))


def against_bank(n: int) -> tuple:
    return rows(n, 256, leaf=False), rows(100_000, 256, leaf=False), 10


CALLS = {
    "margin_softmax": Call(
        F.margin_softmax, of_classes(100_000, 512), dict(margin=ArcFace(0.5))
    ),
    "margin_softmax fp32": Call(F.margin_softmax, of_classes(10_000, 512, FP32)),
    "linear_cross_entropy": Call(F.linear_cross_entropy, of_classes(131_072, 1024)),
    "linear_cross_entropy, narrow": Call(F.linear_cross_entropy, of_classes(10_000, 100)),
    "info_nce": Call(F.info_nce, of_pairs(512), dict(symmetric=True)),
    "info_nce fp32": Call(F.info_nce, of_pairs(128, FP32), dict(precision="mixed")),
    "supervised_contrastive": Call(
        F.supervised_contrastive, lambda n: (rows(n, 512), labels(n))
    ),
    "topk": Call(F.pairwise_topk, against_bank, dict(metric="dot")),
    "a module": Call(losses.MultiSimilarityLoss(), lambda n: (rows(n, 128), labels(n))),
}  # fmt: skip


def run(call: Call, n: int) -> None:
    out = call.fn(*call.args(n), **call.options)
    if isinstance(out, Tensor) and out.requires_grad:
        out.backward()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_compiles_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, told = CALLS[name], []
    with launch_keys.compiled(monkeypatch) as found:
        warmed = warm_up(
            call.fn, *call.args(1024), progress=lambda *of: told.append(of), **call.options
        )
        ready = found.copy()
        assert ready.total() > 0
        run(call, 1024)
        assert found == ready, found - ready
        for n in RAGGED:
            run(call, n)
        assert (found - ready).total() <= 1, found - ready
    assert [done for done, _, _ in told] == list(range(1, len(warmed) + 1))
    assert {total for _, total, _ in told} == {len(warmed)}
    assert tuple(last for _, _, last in told) == warmed
    # each is compiled once, and told once but where Triton sees less in its arguments than we do
    assert ready.total() <= len(warmed) <= 2 * ready.total()


def test_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Noted(launch_keys.NothingRuns):
        def run(self, *args: Any) -> None:
            launched.append("run")

    monkeypatch.setattr(launch_keys, "NothingRuns", Noted)
    call = CALLS["margin_softmax"]
    with launch_keys.compiled(monkeypatch):
        warm_up(call.fn, *call.args(1024), progress=False, **call.options)
        assert not launched
        run(call, 1024)
        assert launched


def test_an_unaligned_view_is_warmed_up_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with launch_keys.compiled(monkeypatch) as found:
        weight = rows(1001 * 64 + 1).detach()[1:64001].view(1000, 64).requires_grad_()
        call = Call(F.linear_cross_entropy, lambda n: (rows(n, 64), weight, labels(n)))
        aligned = Call(F.linear_cross_entropy, of_classes(1000, 64))
        warm_up(aligned.fn, *aligned.args(64), progress=False)
        before = found.copy()
        warm_up(call.fn, *call.args(64), progress=False)
        ready = found.copy()
        assert ready.total() > before.total()
        run(call, 64)
        assert found == ready


def test_progress_is_a_line_a_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = CALLS["margin_softmax"]
    with launch_keys.compiled(monkeypatch):
        warmed = warm_up(call.fn, *call.args(1024), **call.options)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(warmed) and isinstance(warmed[0], Warmed)
    assert lines[0].startswith(
        f"fused_losses: 1 of {len(warmed)} kernels ready, {warmed[0].kernel}"
    )


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with launch_keys.compiled(monkeypatch):
        with pytest.raises(ValueError, match="args: expected tensors on a GPU, .* got no tensor"):
            warm_up(F.info_nce)
        with pytest.raises(ValueError, match="got cpu"):
            warm_up(F.info_nce, torch.empty(3, 4), torch.empty(3, 4))

"""Plain eager calls pass torch.library's autograd by: the same bits, graphs and derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import require
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses
from fused_losses.primitives import op
from fused_losses.primitives.listed import op as listed
from fused_losses.primitives.pairs import op as pairs
from fused_losses.primitives.row_statistics import op as classes
from fused_losses.primitives.topk import extremes

rows = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0))
labels = torch.arange(9) % 3
CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pairs": lambda x, y: fused_losses.info_nce(x, y, symmetric=True),
    "attention": lambda x, y: fused_losses.similarity_attention(x, y, y).square().sum(),
    "classes": lambda x, y: fused_losses.margin_softmax(x, y, labels),
    "distances": lambda x, y: fused_losses.pairwise_distance(x, y).square().sum(),
    "chosen": lambda x, y: fused_losses.functional.batch_hard_triplet(x, labels, y, labels),
    "maxsim": lambda x, y: fused_losses.maxsim(x[None], y[None]).sum(),
}


@pytest.mark.parametrize("backend", ["cpu", "bounded"])
@pytest.mark.parametrize("name", CALLS)
def test_the_registered_ops_bits(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for passed_by in (True, False):
        monkeypatch.setattr(op, "seen", lambda passed_by=passed_by: not passed_by)
        if not passed_by:
            # nor is a gradient a node in C++
            monkeypatch.setattr(pairs, "offered", lambda: None)
            for module in (classes, listed, extremes):
                monkeypatch.setattr(module, "helpers", lambda *_: None)
        x, y = (t.clone().requires_grad_() for t in rows[:2])
        with fused_losses.backends.use_backend(require(backend)):
            loss = CALLS[name](x, y)
            answers.append([loss.detach(), *torch.autograd.grad(loss, (x, y))])
    for plain, registered in zip(*answers, strict=True):
        assert torch.equal(plain, registered)


def test_a_mode_finds_the_registered_op() -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, y = (t.clone().requires_grad_() for t in rows[:2])
    with Mode(), fused_losses.backends.use_backend("bounded"):
        torch.autograd.grad(fused_losses.info_nce(x, y), x)
    assert "fused_losses.pair_statistics_bounded.default" in seen
    assert "fused_losses.pair_statistics_bounded_backward.default" in seen


def test_without_a_gradient_there_is_no_graph() -> None:
    x, y = (t.clone().requires_grad_() for t in rows[:2])
    assert not fused_losses.info_nce(x.detach(), y.detach()).requires_grad
    with torch.no_grad():
        assert not fused_losses.info_nce(x, y).requires_grad
    with torch.inference_mode():
        assert fused_losses.info_nce(x, y).is_inference()

"""MatryoshkaLoss: one sweep where its loss has one, the same numbers as width by width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import require
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses
from fused_losses import losses

WIDTHS, WEIGHTS, D = [4, 8, 16], [1.0, 0.5, 2.0], 16
LOSSES = {
    "InfoNCELoss": lambda: losses.InfoNCELoss(),
    "InfoNCELoss, both ways": lambda: losses.InfoNCELoss(0.2, symmetric=True, normalize=False),
    "InfoNCELoss, rows": lambda: losses.InfoNCELoss(reduction="none"),
    "ClipLoss": lambda: losses.ClipLoss(normalize=True),
}


def rows(n: int = 19) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(n, D, dtype=torch.float64), torch.randn(n, D, dtype=torch.float64)
    return x.requires_grad_(), y.requires_grad_()


def matryoshka(loss: nn.Module, backend: str = "bounded") -> losses.MatryoshkaLoss:
    loss.backend = backend
    return losses.MatryoshkaLoss(loss.double(), WIDTHS, WEIGHTS, rows=2)


def one_by_one(module: losses.MatryoshkaLoss, x: Tensor, y: Tensor, **given: Any) -> Tensor:
    each = [module.loss(x[:, :w], y[:, :w], **given) for w in WIDTHS]
    return sum(weight * one for weight, one in zip(WEIGHTS, each, strict=True))


class Ops(TorchDispatchMode):
    """The ops of the package that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "fused_losses":
            self.seen.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def ops(call: Any) -> list[str]:
    with Ops() as found:
        call()
    return found.seen


ONE = ["nested_statistics_bounded"]
EACH = ["pair_statistics_bounded"] * len(WIDTHS)


@pytest.mark.parametrize("name", LOSSES)
def test_the_sweep_is_the_loss_width_by_width(name: str) -> None:
    module, (x, y) = matryoshka(LOSSES[name]()), rows()
    leaves = x, y, *module.parameters()
    got, want = module(x, y), one_by_one(module, x, y)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for g, w in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)
    assert ops(lambda: module(x, y)) == ONE


def test_one_table_of_centres_for_all_widths() -> None:
    # MRL-E: a sweep over classes, whose centres are cut with the rows
    x, labels = rows()[0], torch.arange(19) % 5
    labels[3] = -100
    for loss in (losses.ArcFaceLoss(7, D), losses.CosFaceLoss(7, D, reduction="none")):
        loss.backend = "bounded"
        module = losses.MatryoshkaLoss(loss.double(), WIDTHS, WEIGHTS)
        leaves = x, loss.weight
        assert ops(lambda m=module: m(x, labels)) == ONE
        got, narrow = module(x, labels), loss.weight
        each = [
            torch.func.functional_call(loss, {"weight": narrow[:, :w]}, (x[:, :w], labels))
            for w in WIDTHS
        ]
        want = sum(weight * one for weight, one in zip(WEIGHTS, each, strict=True))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for g, w in zip(
            torch.autograd.grad(got.sum(), leaves),
            torch.autograd.grad(want.sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
    # several centres a class, bends and averages are taken width by width
    for loss in (losses.SubCenterArcFaceLoss(7, D), losses.CurricularFaceLoss(7, D)):
        loss.backend = "bounded"
        module = losses.MatryoshkaLoss(loss.double(), WIDTHS, WEIGHTS)
        assert ONE[0] not in ops(lambda m=module: m(x, labels))


def test_what_has_no_sweep_is_called_once_a_width() -> None:
    x, y = rows()

    class Halved(losses.InfoNCELoss):
        def forward(self, query: Tensor, key: Tensor, **given: Any) -> Tensor:
            return super().forward(query, key, **given) / 2

    halved = matryoshka(Halved())
    assert ops(lambda: halved(x, y)) == EACH
    torch.testing.assert_close(halved(x, y), matryoshka(losses.InfoNCELoss())(x, y) / 2)
    # a hook sees every call
    hooked, seen = matryoshka(losses.InfoNCELoss()), []
    hooked.loss.register_forward_hook(lambda *call: seen.append(call))
    hooked(x, y)
    assert len(seen) == len(WIDTHS)
    # an option that the sweep does not know
    module = matryoshka(losses.InfoNCELoss())
    module.cut = ("queue",)
    queue = dict(queue=rows(5)[0])
    # a sweep over the keys and one over the bank
    assert ops(lambda: module(x, y, **queue)) == EACH * 2
    # kernels of one width have their own products
    module.loss.backend = require("cpu")
    assert ops(lambda: module(x, y)) == ["pair_statistics_cpu"] * len(WIDTHS)


def test_numbers_of_rows_go_with_the_sweep() -> None:
    x, y = rows()
    module, labels = matryoshka(losses.InfoNCELoss()), torch.arange(len(x)) // 3
    got = module(x, y, labels=labels)
    torch.testing.assert_close(got, one_by_one(module, x, y, labels=labels))
    assert ops(lambda: module(x, y, labels=labels)) == ONE


def test_explain_counts_the_sweep() -> None:
    x, y = (t.detach().float().requires_grad_() for t in rows(1024))
    plan = fused_losses.explain(matryoshka(losses.InfoNCELoss()).float(), x, y)
    assert plan.backend == "bounded"
    assert plan.peak_extra_bytes is not None
    # a matrix of scores would grow by 12 MiB a width
    twice = fused_losses.explain(
        matryoshka(losses.InfoNCELoss()).float(), torch.cat([x, x]), torch.cat([y, y])
    )
    assert twice.peak_extra_bytes is not None
    assert twice.peak_extra_bytes < plan.peak_extra_bytes + 2**22

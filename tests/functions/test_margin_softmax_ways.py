"""Margin softmax is the same whatever the layout, the order, the reduction or the labels' type."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from conftest import widest
from margin_softmax_cases import Case, Data, ask, oracle
from oracles import relative_error
from torch import Tensor

import fused_losses
from fused_losses import margins


def room_of(data: Data) -> float:
    """The relative error that sums in the data's dtype may leave in a loss or a gradient."""
    return 1e-10 if data.x.dtype == torch.float64 else 2e-5


@pytest.mark.parametrize("frozen", ["embeddings", "weight"])
def test_frozen_side_changes_nothing_for_the_other(frozen: str, backend: str) -> None:
    case = Case("frozen", 20, 9, 31)
    data = Data(case, widest(backend))
    answer = oracle(case, data)
    x = data.x.clone().requires_grad_(frozen != "embeddings")
    w = data.w.clone().requires_grad_(frozen != "weight")
    fused_losses.margin_softmax(x, w, data.labels, backend=backend).backward()
    if frozen == "weight":
        assert w.grad is None
        assert relative_error(x.grad, answer.dx) <= room_of(data)
    else:
        assert x.grad is None
        assert relative_error(w.grad, answer.dw) <= room_of(data)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda a: a.T.contiguous().T,
    "every-other-column": lambda a: torch.stack([a, a + 1], dim=2).flatten(1)[:, ::2],
    "rows-backwards-in-memory": lambda a: a.flip(0).contiguous().flip(0),
    "offset-into-storage": lambda a: torch.cat([a[:1], a])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layout_in_memory_changes_nothing(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, backend: str
) -> None:
    case = Case("layout", 20, 10, 31, bias=True, class_weight=True)
    data = Data(case, dtype)
    wide = {name: layout(getattr(data, name)) for name in ("x", "w")}
    assert torch.equal(wide["x"], data.x)

    def gradients(x: Tensor, w: Tensor, labels: Tensor, options: dict) -> tuple[Tensor, ...]:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        loss = fused_losses.margin_softmax(x, w, labels, backend=backend, **options)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    strided = {
        k: torch.stack([v, v], 1)[:, 0] if isinstance(v, Tensor) else v
        for k, v in data.options.items()
    }
    labels = torch.stack([data.labels, data.labels], 1)[:, 1]
    plain = gradients(data.x, data.w, data.labels, data.options)
    laid = gradients(wide["x"], wide["w"], labels, strided)
    # products of the same numbers; a library may sum them in another order for other strides
    room = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, wanted in zip(laid, plain, strict=True):
        assert relative_error(got, wanted.double().numpy()) <= room


def test_expanded_inputs(backend: str) -> None:
    # the same row for everyone, with stride 0; so is the gradient that reaches the op
    rng, dtype = np.random.default_rng(3), widest(backend)
    room, tiny = (1e-10, 1e-12) if dtype == torch.float64 else (1e-5, 1e-6)
    one = torch.from_numpy(rng.standard_normal((1, 6))).to(dtype).requires_grad_()
    w = torch.from_numpy(rng.standard_normal((11, 6))).to(dtype)
    label = torch.tensor([4])
    loss = fused_losses.margin_softmax(
        one.expand(5, 6), w, label.expand(5), reduction="sum", backend=backend
    )
    loss.backward()
    answer = oracles.margin_softmax(
        one.detach().numpy(), w.numpy(), label.numpy(), margin=oracles.arcface(0.5)
    )
    assert relative_error(one.grad, 5 * answer.dx) <= room
    weight = torch.from_numpy(rng.standard_normal((1, 6))).to(dtype).requires_grad_()
    x = torch.from_numpy(rng.standard_normal((3, 6))).to(dtype)
    # all classes are one vector: every class is as likely, and the sum of its gradients is 0
    loss = fused_losses.margin_softmax(
        x, weight.expand(7, 6), torch.tensor([0, 3, 6]), margin=None, backend=backend
    )
    loss.backward()
    assert abs(loss.item() - np.log(7)) <= tiny
    # a sum of 21 terms, in all |G| of 2 * 64 / |w| at most a row, of the mean over rows
    most = (21 + 16) * torch.finfo(dtype).eps / 2 * 2 * 64 / float(weight.detach().norm())
    assert weight.grad.abs().max() <= most


def test_reductions_are_of_the_same_rows(backend: str) -> None:
    case = Case("reductions", 30, 8, 19, ignored=0.3, class_weight=True)
    data = Data(case, widest(backend))
    rows, total, mean = (
        fused_losses.margin_softmax(
            data.x, data.w, data.labels, reduction=how, backend=backend, **data.options
        )
        for how in ("none", "sum", "mean")
    )
    valid = data.labels != -100
    assert (rows[~valid] == 0).all()
    torch.testing.assert_close(total, rows.sum())
    weights = data.options["class_weight"][data.labels[valid]]
    torch.testing.assert_close(mean, rows.sum() / weights.sum())


def test_another_ignore_index(backend: str) -> None:
    # -1 is the primitives' own mark, 3 is a class that exists: both only mean "ignored" here
    case = Case("ignore", 30, 8, 19)
    data = Data(case, widest(backend))
    kept = data.labels != 3
    assert not kept.all()
    by_class = fused_losses.margin_softmax(
        data.x, data.w, data.labels, ignore_index=3, backend=backend
    )
    by_minus_one = fused_losses.margin_softmax(
        data.x,
        data.w,
        torch.where(kept, data.labels, -1),
        ignore_index=-1,
        backend=backend,
    )
    wanted = oracles.margin_softmax(
        data.x.numpy()[kept],
        data.w.numpy(),
        data.labels.numpy()[kept],
        margin=oracles.arcface(0.5),
    )
    assert abs(by_class.item() - wanted.loss) <= room_of(data) * wanted.loss
    assert abs(by_minus_one.item() - wanted.loss) <= room_of(data) * wanted.loss


def test_int32_labels_and_classes(backend: str) -> None:
    case = Case("int32", 30, 8, 19, classes="unsorted")
    data = Data(case, widest(backend))
    wide = fused_losses.margin_softmax(
        data.x, data.w, data.labels, classes=data.options["classes"], backend=backend
    )
    narrow = fused_losses.margin_softmax(
        data.x, data.w, data.labels.int(), classes=data.options["classes"].int(), backend=backend
    )
    assert torch.equal(wide, narrow)


def test_all_classes_listed_is_no_classes_at_all(backend: str) -> None:
    case = Case("listed", 30, 8, 19)
    data = Data(case, widest(backend))
    _, whole, _ = ask(case, data, backend)
    _, listed, _ = ask(case, data, backend, classes=torch.randperm(19))
    room = 1e-12 if data.x.dtype == torch.float64 else 1e-4
    for name in whole:
        torch.testing.assert_close(listed[name], whole[name], rtol=room, atol=0.01 * room)


def test_unsampled_classes_get_gradient_zero(backend: str) -> None:
    case = Case("sampled", 10, 8, 200, classes="unsorted")
    data = Data(case, widest(backend))
    _, gradients, _ = ask(case, data, backend)
    out = torch.ones(200, dtype=torch.bool)
    out[data.options["classes"]] = False
    assert out.any() and (gradients["dw"][out] == 0).all()
    assert (gradients["dw"][~out].abs().sum(1) > 0).all()


@pytest.mark.parametrize("scale", [1.0, 64.0, 1000.0])
def test_shifting_every_bias_changes_nothing(scale: float, backend: str) -> None:
    # the largest score is taken out online: 1e4 more on every score must not overflow
    case = Case("shift", 30, 8, 19)
    data = Data(case, widest(backend))
    zero = torch.zeros(19, dtype=data.x.dtype)
    losses = [
        fused_losses.margin_softmax(
            data.x, data.w, data.labels, bias=zero + shift, scale=scale, backend=backend
        )
        for shift in (0.0, 1e4, -1e4)
    ]
    # a float32 score of 1e4 has steps of 1e-3
    room = 1e-10 if data.x.dtype == torch.float64 else 2e-3
    torch.testing.assert_close(losses[1], losses[0], rtol=room, atol=room)
    torch.testing.assert_close(losses[2], losses[0], rtol=room, atol=room)


def test_float32_scores_of_a_thousand_stay_finite(backend: str) -> None:
    # exp(1000) is inf in every dtype of ours
    x = torch.eye(3, 8).requires_grad_()
    w = torch.cat([torch.eye(3, 8), -torch.eye(3, 8)]).requires_grad_()
    loss = fused_losses.margin_softmax(
        x, w, torch.tensor([3, 4, 5]), margin=None, scale=1000.0, backend=backend
    )
    loss.backward()
    assert abs(loss.item() - 2000) <= 1e-3
    assert torch.isfinite(x.grad).all() and torch.isfinite(w.grad).all()


def test_order_of_the_rows_changes_nothing(streamed: str) -> None:
    case = Case("order", 100, 24, 700, reduction="none")
    data = Data(case, torch.float32)
    order = torch.randperm(100)
    rows = fused_losses.margin_softmax(
        data.x, data.w, data.labels, reduction="none", backend=streamed
    )
    mixed = fused_losses.margin_softmax(
        data.x[order], data.w, data.labels[order], reduction="none", backend=streamed
    )
    torch.testing.assert_close(mixed, rows[order], rtol=1e-6, atol=2e-5)


def test_the_same_call_twice_is_the_same_to_the_bit(streamed: str) -> None:
    case = Case("twice", 100, 24, 5000, bias=True, smoothing=0.1)
    data = Data(case, torch.float32)
    first, second = ask(case, data, streamed), ask(case, data, streamed)
    assert torch.equal(first[0], second[0])
    for name in first[1]:
        assert torch.equal(first[1][name], second[1][name]), name


def test_adaface_state_moves_once_a_call(backend: str) -> None:
    case = Case("state", 30, 8, 19, "adaface", size=20.0)
    data = Data(case, widest(backend))
    margin = margins.AdaFace(momentum=0.1).to(data.x.dtype)
    mean, std = oracles.adaface_state(np.linalg.norm(data.x.numpy(), axis=1), 20.0, 100.0, 0.1)
    loss = fused_losses.margin_softmax(data.x, data.w, data.labels, margin=margin, backend=backend)
    wanted = oracles.margin_softmax(
        data.x.numpy(), data.w.numpy(), data.labels.numpy(), margin=oracles.adaface(mean, std)
    )
    assert abs(margin.mean.item() - mean) <= 0.1 * room_of(data) * mean
    assert abs(margin.std.item() - std) <= 0.1 * room_of(data) * std
    assert abs(loss.item() - wanted.loss) <= room_of(data) * wanted.loss


def test_elastic_draws_once_a_call_and_uses_them(backend: str) -> None:
    case = Case("elastic", 30, 8, 19)
    data = Data(case, widest(backend))

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(11)

    margin = margins.ElasticArcFace(0.5, 0.1, generator=generator())
    loss = fused_losses.margin_softmax(data.x, data.w, data.labels, margin=margin, backend=backend)
    draws = 0.5 + 0.1 * torch.randn(30, generator=generator(), dtype=torch.float64)
    wanted = oracles.margin_softmax(
        data.x.numpy(),
        data.w.numpy(),
        data.labels.numpy(),
        margin=oracles.arcface(draws.numpy(), "none"),
    )
    assert abs(loss.item() - wanted.loss) <= room_of(data) * wanted.loss


def test_a_margin_needs_to_return_one_value_a_row(backend: str) -> None:
    case = Case("shape", 30, 8, 19)
    data = Data(case, widest(backend))
    with pytest.raises(ValueError, match=r"margin: expected it to return shape \(30,\), got \(\)"):
        fused_losses.margin_softmax(
            data.x, data.w, data.labels, margin=lambda t: t.mean(), backend=backend
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stats_change_neither_loss_nor_gradient(backend: str, dtype: torch.dtype) -> None:
    case = Case("stats", 30, 8, 19)
    data = Data(case, dtype if widest(backend) == torch.float64 else torch.float32)
    loss, gradients, _ = ask(case, data, backend)
    x, w = data.x.clone().requires_grad_(), data.w.clone().requires_grad_()
    alone = fused_losses.margin_softmax(x, w, data.labels, backend=backend)
    alone.backward()
    assert torch.equal(alone, loss)
    assert torch.equal(x.grad, gradients["dx"]) and torch.equal(w.grad, gradients["dw"])

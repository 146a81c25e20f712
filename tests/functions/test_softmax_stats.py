"""Statistics of a margin softmax that carry gradients, and smoothing of capped or pooled scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_goldens import exactness
from torch import Tensor

from fused_losses import linear_cross_entropy, margin_softmax
from fused_losses.margins import CosFace


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def leaves(backend: str, *shapes: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor], float]:
    """Tensors of the backend's dtype, the same in float64, and how exactly it holds them."""
    dtype, within = exactness(backend)
    mine = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return mine, [leaf.detach().double().requires_grad_() for leaf in mine], within


def alike(mine: Tensor, right: Tensor, leaves: list[Tensor], wide: list[Tensor], to: float) -> None:
    torch.testing.assert_close(mine.double(), right, rtol=20 * to, atol=20 * to)
    slopes = torch.autograd.grad(mine.sum(), leaves), torch.autograd.grad(right.sum(), wide)
    for got, want in zip(*slopes, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=100 * to, atol=100 * to)


Y = torch.tensor([0, 8, 3, -100, 3, 1])


@pytest.mark.parametrize("normalize", [False, True])
def test_statistics_with_gradients(normalize: bool, backend: str) -> None:
    given, wide, within = leaves(backend, (6, 5), (9, 5), (9,))
    options: dict[str, Any] = dict(margin=CosFace(0.25), scale=3.0, normalize=normalize)
    loss, stats = margin_softmax(
        *given[:2], Y, bias=given[2], return_stats="grad", reduction="sum", backend=backend,
        **options,
    )  # fmt: skip
    x, w, b = wide
    cosine = unit(x) @ unit(w).T if normalize else x @ w.T
    hot, kept = F.one_hot(Y.clamp_min(0), 9), Y >= 0
    z = 3 * (cosine - 0.25 * hot) + b
    own = (cosine * hot).sum(1)
    right = z.logsumexp(1) ** 2 + torch.sin(own)
    mine = stats.logsumexp**2 + torch.sin(stats.target_cosine)
    alike(loss + mine.sum(), (z.logsumexp(1) - (z * hot).sum(1) + right)[kept].sum(), given, wide,
          within)  # fmt: skip
    assert not (stats.hardest_cosine.requires_grad or stats.hit.requires_grad)
    assert stats.logsumexp[3] == 0 and stats.target_cosine[3] == 0
    same, detached = margin_softmax(
        *given[:2], Y, bias=given[2], return_stats=True, backend=backend, **options
    )
    for one, other in zip(stats, detached, strict=True):
        assert torch.equal(one, other) and not other.requires_grad
    assert same.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_smoothing_of_capped_scores(reduction: str, backend: str) -> None:
    given, wide, within = leaves(backend, (6, 5), (9, 5))
    ids = torch.tensor([8, 0, 1, 3, 5])
    for classes in (None, ids):
        got = linear_cross_entropy(
            *given, Y, label_smoothing=0.3, softcap=2.0, z_loss=0.1, memory_budget=1 << 20,
            reduction=reduction, backend=backend,
        ) if classes is None else margin_softmax(
            *given, Y, margin=None, scale=1.0, normalize=False, label_smoothing=0.3, softcap=2.0,
            z_loss=0.1, classes=classes, reduction=reduction, backend=backend,
        )  # fmt: skip
        x, w = wide
        order = torch.arange(9) if classes is None else classes.sort().values
        z = 2 * torch.tanh(x @ w[order].T / 2)
        y = torch.where(Y < 0, -100, torch.searchsorted(order, Y.clamp_min(0)))
        right = F.cross_entropy(z, y, label_smoothing=0.3, reduction="none")
        right = right + torch.where(Y < 0, 0, 0.1 * z.logsumexp(1) ** 2)
        right = right.sum() / 5 if reduction == "mean" else right
        alike(got, right, given, wide, within)


def test_smoothing_of_sub_centres(backend: str) -> None:
    given, wide, within = leaves(backend, (6, 5), (9, 3, 5))
    got = margin_softmax(
        *given, Y, margin=CosFace(0.25), scale=4.0, label_smoothing=0.2, backend=backend
    )
    x, w = wide
    cosine = (unit(w) @ unit(x).T).amax(1).T
    z = 4 * (cosine - 0.25 * F.one_hot(Y.clamp_min(0), 9))
    alike(got, F.cross_entropy(z, Y, label_smoothing=0.2), given, wide, within)


def test_a_class_that_is_alone_has_nothing_to_smooth(backend: str) -> None:
    given, _, _ = leaves(backend, (2, 3), (1, 3))
    y = torch.zeros(2, dtype=torch.long)
    loss = linear_cross_entropy(*given, y, label_smoothing=0.3, softcap=2.0, backend=backend)
    assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, given))


@pytest.mark.parametrize("wrong", ["gradients", 2, None])
def test_what_return_stats_is(wrong: Any) -> None:
    with pytest.raises(ValueError, match='return_stats: expected True, False or "grad"'):
        margin_softmax(torch.ones(2, 3), torch.ones(4, 3), Y[:2] * 0, return_stats=wrong)
